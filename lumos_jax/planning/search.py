"""What makes a run fit a target and run fast: advice from shapes alone, and a search that compiles and writes a config file."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lumos_jax import config, fileio, progress
from lumos_jax.planning.ahead import gib
from lumos_jax.planning.chips import Target
from lumos_jax.planning.figures import Figures, estimate
from lumos_jax.planning.job import make_job

REMAT = ("none", "dots", "qkv", "mlp", "full")  # from most memory to least
# What the search may change.
FIELDS = ("train.batch_size", "optimizer.accumulate", "model.remat", "model.dtype", "mesh.fsdp")


def _ways_over(chips: int) -> list[int]:
    """Numbers of chips that parameters can be split over."""
    return [n for n in range(1, chips + 1) if chips % n == 0]


def suggest(figures: Figures, devices: Sequence[Any]) -> list[str]:
    """Settings to try for a run that did not fit, each with its reason, the most promising first; compiles nothing."""
    job, usable = figures.job, figures.target.chip.usable
    settings, now, resident = job.settings, job.held, job.resident_bytes()
    tips = []
    larger = [n for n in _ways_over(job.mesh.size // settings.mesh.context) if n > job.mesh.shape["fsdp"]]
    for fsdp in larger if now > usable / 2 else ():
        held = make_job(config.replace(settings, {"mesh.fsdp": fsdp}), devices, job.cached).held
        if held < usable / 2:
            tips.append(
                f"--config.mesh.fsdp={fsdp} splits the state over {fsdp} chips: {gib(held)} on each instead of {gib(now)}, "
                f"which leaves {gib(usable - held)} for the step"
            )
            break
    for policy in REMAT[REMAT.index(settings.model.remat) + 1 :]:
        tips.append(f"--config.model.remat={policy} saves less of the forward pass and recomputes it")
    per_chip = settings.train.batch_size // (job.mesh.shape["data"] * job.mesh.shape["fsdp"])
    parts = next((n for n in range(settings.optimizer.accumulate + 1, per_chip + 1) if per_chip % n == 0), None)
    if parts:
        tips.append(f"--config.optimizer.accumulate={parts} takes the batch in {parts} parts, with the same gradient")
    if now > usable / 4 and settings.optimizer.state_dtype == "float32":
        tips.append(
            f"--config.optimizer.state_dtype=bfloat16 halves the optimizer's {gib(resident['optimizer'])} and the EMA; a "
            "little noise"
        )
    if now > usable / 4 and settings.optimizer.ema_memory == "device":
        tips.append(
            f"--config.optimizer.ema_memory=host keeps the EMA ({gib(resident['ema'])}) in host memory; it is "
            "copied every step"
        )
    return tips or ["more chips, or a smaller network: the state alone does not fit"]


def search(
    settings: config.Settings, target: Target, devices: Sequence[Any], cached: bool, say: Callable[[str], None]
) -> list[Figures]:
    """Tries mesh splits, remat policies, batches and precisions; returns every run that was compiled, fitting or not.

    First every policy on every split, with the config's batch: saving more is not always faster. Then, with the best of these,
    other batches, and bfloat16 where the config has float32. If none fits, the batch in two parts on every split.

    settings: where the search starts. say: called with a line about each run that was compiled.
    """
    found: list[Figures] = []

    def attempt(start: config.Settings, changes: Mapping[str, Any]) -> None:
        tried = config.replace(start, changes)
        parts = tried.optimizer.accumulate * (target.chips // settings.mesh.context)
        if "optimizer.accumulate" in changes and tried.train.batch_size % parts:
            return  # the same gradient in less memory, where it divides
        found.append(estimate(tried, target, devices, cached=cached))
        say(line(found[-1]))
        bar.update()

    splits = _splits(settings, target, devices, cached)
    bar = progress.bar(total=len(splits) * len(REMAT) + 3, unit="program")
    for fsdp in splits:
        for remat in REMAT:
            attempt(settings, {"mesh.fsdp": fsdp, "model.remat": remat})
    best, halved = winner(found, settings), 2 * settings.optimizer.accumulate
    if best is None:
        for fsdp in splits:
            attempt(settings, {"mesh.fsdp": fsdp, "model.remat": REMAT[-1], "optimizer.accumulate": halved})
        bar.close()
        return found
    start = best.job.settings
    attempt(start, {"optimizer.accumulate": halved})
    attempt(start, {"train.batch_size": 2 * start.train.batch_size})
    if start.model.dtype != "bfloat16":
        attempt(start, {"model.dtype": "bfloat16"})
    bar.close()
    return found


def _splits(settings: config.Settings, target: Target, devices: Sequence[Any], cached: bool) -> list[int]:
    """Ways to split parameters that leave memory for a step: the smallest, one in the middle, the largest."""
    roomy = []
    for fsdp in _ways_over(target.chips // settings.mesh.context):
        if fsdp == 1 or settings.train.batch_size % fsdp == 0:
            job = make_job(config.replace(settings, {"mesh.fsdp": fsdp}), devices, cached)
            roomy += [fsdp] if job.held < 0.75 * target.chip.usable else []
    return list(dict.fromkeys([*roomy[:1], *roomy[len(roomy) // 2 :][:1], *roomy[-1:]]))


def line(f: Figures) -> str:
    """A run of the search in one line."""
    s = f.job.settings
    what = (f"batch {f.batch_size:>5} in {s.optimizer.accumulate}, remat {s.model.remat:<4}, {s.model.dtype}, "
            f"fsdp {s.mesh.fsdp:>3}: {f.step.memory.total / 2**30:6.2f} GiB")  # fmt: skip
    if not f.fits:
        return f"{what}, does not fit"
    if f.seconds is None:
        return f"{what}, fits"
    return f"{what}, {f.seconds * 1e3:7.1f} ms, {f.images_per_second / f.target.chips:7.1f} images/s a chip, MFU {f.mfu:.1%}"


def _cost(f: Figures) -> tuple[float, float]:
    """To be minimized: seconds an image, or the amount of recomputation where times are unknown; then memory."""
    recomputed = REMAT.index(f.job.settings.model.remat)
    return recomputed if f.seconds is None else f.seconds / f.batch_size, f.step.memory.total


def pareto(found: Sequence[Figures]) -> list[Figures]:
    """Those that fit and that no other beats in both speed and memory, fastest first."""
    front: list[Figures] = []
    for f in sorted((f for f in found if f.fits), key=_cost):
        if not front or _cost(f)[1] < _cost(front[-1])[1]:
            front.append(f)
    return front


def winner(found: Sequence[Figures], settings: config.Settings) -> Figures | None:
    """The fastest that fits at the config's batch and precision, which are part of a recipe; else at any."""

    def recipe(s: config.Settings) -> tuple:
        return s.train.batch_size, s.model.dtype

    fitting = [f for f in found if f.fits]
    own = [f for f in fitting if recipe(f.job.settings) == recipe(settings)]
    return min(own or fitting, key=_cost, default=None)


def write_config(path: str, base: str, overrides: Mapping[str, Any], best: Figures) -> None:
    """Writes the config file `path`: `base`, as configs/i2i.py:desk, with the changes of the command line, "group.field" ->
    value, and those of the search."""
    file, _, size = base.partition(":")
    flat = config.flatten_settings(dataclasses.asdict(best.job.settings))
    values = dict(overrides) | {name: flat[name] for name in FIELDS}
    lines = [
        f'"""{base} as `lumos_jax.plan --search` fitted it to {best.target}."""',
        "",
        "import runpy",
        "",
        "",
        f"def get_config(size={size!r}):",
        f'    config = runpy.run_path({str(pathlib.Path(file).absolute())!r})["get_config"](size)',
        *(f"    config.{name} = {value!r}" for name, value in values.items()),
        "    return config",
        "",
    ]
    fileio.write_whole(path, "\n".join(lines))
