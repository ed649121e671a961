"""Results of runs: one small JSON file a run and seed, and means and differences over seeds with 95 % intervals.

    mean +- t s / sqrt(n),   t Student's with n - 1 degrees of freedom, s the deviation over n seeds                      (1)

A difference of two runs is (1) of the differences of equal seeds: these have the same order of the data, noise, held-out
records and items to sample, which then cancel. With three seeds t is 4.30: only clear differences exclude 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Container, Mapping, Sequence
from typing import Any

from lumos_jax import fileio
from lumos_jax.evaluation import metrics
from lumos_jax.evaluation.intervals import LEVEL

Result = dict[str, Any]  # see Study.result_of for its fields
# Of metrics.jsonl, those that are better when lower; of scores of samples, lumos_jax.evaluation knows.
_LOWER = ("held_out_loss", "score_flow_error")


TITLES = {
    "held_out_loss": "held-out loss", "fd_scene_vit": "FD, shipped ViT", "fd_vgg16": "FD, VGG16", "fvd": "FVD",
    "psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "flow_error": "flow error, px", "caption_count": "count",
    "caption_colour": "color", "caption_shape": "shape", "caption_all": "all of it", "scenes": "prompts",
    "score_psnr": "PSNR, dB", "score_ssim": "SSIM",
    "score_flow_error": "flow error, px", "score_count": "count", "score_colour": "color",
    "score_shape": "shape", "score_all": "all of it",
}  # fmt: skip


def title_of(score: str) -> str:
    """A score's name, or that of a category of one, as people read it."""
    name, _, tag = score.partition("/")
    return tag.replace("_", " ") or TITLES.get(name, name)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds. low, high: of its 95 % interval; NaN for one seed."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{self.mean:.4g}"
        reach = self.high - self.mean
        places = min(4, max(0, 1 - math.floor(math.log10(reach)))) if reach else 4  # two digits of the reach
        return f"{self.mean:.{places}f} ± {reach:.{places}f}"


def interval(values: Sequence[float]) -> Interval:
    """Equation (1). Raises ValueError without values."""
    if not values:
        raise ValueError("no values to average")
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    from scipy.special import stdtrit  # takes a moment to load

    reach = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - reach, mean + reach, count)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Interval | None:
    """a - b of values by seed, paired; None if they have no seed in common."""
    common = sorted(a.keys() & b.keys())
    return interval([a[seed] - b[seed] for seed in common]) if common else None


def lower_is_better(score: str) -> bool:
    """Of a score, or of a name in metrics.jsonl."""
    short = score.partition("/")[0]
    return metrics.METRICS[short].lower if short in metrics.METRICS else score in _LOWER


def verdict(score: str, gain: Interval) -> str:
    """What the difference of `score`, of what is claimed to be better minus the other, says of the claim."""
    if gain.seeds < 2:
        return "one seed: undecided"
    low, high = (-gain.high, -gain.low) if lower_is_better(score) else (gain.low, gain.high)
    return "holds" if low > 0 else "the opposite holds" if high < 0 else "undecided"


class Results:
    """The folder of results.

    Attributes:
      left_out: why results were not used, one line each.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        self.left_out: dict[str, str] = {}

    def path(self, name: str, seed: int) -> pathlib.Path:
        return self.folder / f"{name}-seed{seed}.json"

    def read(self, name: str, seed: int) -> Result | None:
        """As it is on disk; None if there is none. Raises ValueError if it is damaged."""
        path = self.path(name, seed)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and repeat the command") from error

    def get(self, name: str, seed: int, identity: Mapping[str, Any]) -> Result | None:
        """A run's result, if it is of these settings; else it is named in `left_out`. identity: of Study.identity."""
        found = self.read(name, seed)
        if found is None:
            return None
        if found["digest"] == identity["digest"]:
            self.left_out.pop(self.path(name, seed).name, None)
            return found
        then, now = found["settings"], identity["settings"]
        changed = sorted(key for key in then | now if then.get(key) != now.get(key))
        why = ", ".join(f"{key} {_shown(then, key)} then, {_shown(now, key)} now" for key in changed[:4])
        why += f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        self.left_out[self.path(name, seed).name] = why or f"its prior {found.get('prior')} is not today's"
        return None

    def save(self, result: Result) -> None:
        fileio.save_json(result, self.path(result["name"], result["seed"]))

    def undeclared(self, names: Container[str]) -> list[str]:
        """Files of runs that have none of these names, as of other steps."""
        paths = sorted(self.folder.glob("*-seed*.json"))
        return [path.name for path in paths if path.stem.rpartition("-seed")[0] not in names]

    def all(self) -> list[Result]:
        """Every result, of whatever settings."""
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("*-seed*.json"))]


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "default"


def scores_of(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """An entry of a result's `evaluations` -> score name -> value, without the bias of few samples; `scenes/TAG` besides."""
    values = {}
    for name, entry in evaluation["scores"].items():
        values[name] = entry["value"] if entry["corrected"] is None else entry["corrected"]
        values |= {f"{name}/{tag}": share for tag, share in entry.get("categories", {}).items()}
    return values
