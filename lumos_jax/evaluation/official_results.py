"""Scores that official scorers gave to exported samples, with our intervals.

geneval  results.jsonl of GenEval's evaluate_images.py
dpg      the text file of ELLA's compute_dpg_bench.py (--res-path), run with --pic-num=4
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lumos_jax.evaluation import intervals
from lumos_jax.evaluation.intervals import Estimate
from lumos_jax.evaluation.lists import Item, read_text

# Path of the grid, the scores of its four samples, and their mean; other lines of the file are totals.
_DPG_LINE = re.compile(r"(.+)((?:, [\d.]+(?:e-\d+)?){4}), [\d.]+(?:e-\d+)?")


def geneval(path: str | pathlib.Path, items: Sequence[Item]) -> Estimate:
    """GenEval's overall score, the mean of its categories.

    Args:
      path: the file: an object a line with `filename`, ending in 00000/samples/0000.png, and `correct`.
      items: of the samples that `evaluate export --format=geneval` wrote.

    Raises:
      ValueError: it cannot be read, or does not hold exactly these samples.
    """
    correct = {}
    try:
        for line in read_text(pathlib.Path(path)).splitlines():
            record = json.loads(line)
            name = pathlib.PurePosixPath(record["filename"])
            correct[f"{name.parents[1].name}/{name.stem}"] = float(bool(record["correct"]))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is no results.jsonl of GenEval: {type(error).__name__}: {error}") from error
    values = _values(path, correct, items)
    prompts, tags = np.array([(item.group, item.extra["tag"]) for item in items]).T
    return intervals.category_mean(values, prompts, tags)


def dpg(path: str | pathlib.Path, items: Sequence[Item]) -> Estimate:
    """DPG-Bench's score in [0, 100]: the mean over prompts and their four samples; prompts are the clusters.

    path, items: as for `geneval`, of `evaluate export --format=dpg`. Raises ValueError likewise.
    """
    scores = {}
    for found in filter(None, map(_DPG_LINE.fullmatch, read_text(pathlib.Path(path)).splitlines())):
        prompt = pathlib.PurePosixPath(found[1]).stem
        scores |= {f"{prompt}/{k:04d}": 100 * float(score) for k, score in enumerate(found[2].split(", ")[1:])}
    if not scores:
        raise ValueError(f"{path} has no scores of DPG-Bench for four samples a prompt: run it with --pic-num=4")
    return intervals.clustered_mean(_values(path, scores, items), np.array([item.group for item in items]))


SCORERS: Mapping[str, Callable[[str, Sequence[Item]], Estimate]] = {"geneval": geneval, "dpg": dpg}


def _values(path: str | pathlib.Path, by_id: Mapping[str, float], items: Sequence[Item]) -> np.ndarray:
    """The values in the items' order. Raises ValueError unless they are of exactly these items."""
    if other := sorted(by_id.keys() ^ {item.id for item in items}):
        raise ValueError(f"{path} is not about these samples: {len(other)} are in one of the two alone, as {other[0]}")
    return np.array([by_id[item.id] for item in items])
