"""What official scorers found about exported samples, with our intervals."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from lumos_jax.evaluation import intervals
from lumos_jax.evaluation.intervals import Estimate
from lumos_jax.evaluation.lists import Item


def geneval(path: str | pathlib.Path, items: Sequence[Item]) -> Estimate:
    """GenEval's overall score, the mean of its categories, from the results.jsonl of its evaluate_images.py.

    Args:
      path: the file: an object a line with `filename`, ending in 00000/samples/0000.png, and `correct`.
      items: of the samples that `evaluate export --format=geneval` wrote.

    Raises:
      ValueError: it cannot be read, or does not hold exactly these samples.
    """
    correct: dict[str, bool] = {}
    try:
        for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            name = pathlib.PurePosixPath(record["filename"])
            correct[f"{name.parents[1].name}/{name.stem}"] = bool(record["correct"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is no results.jsonl of GenEval: {type(error).__name__}: {error}") from error
    other = sorted(correct.keys() ^ {item.id for item in items})
    if other:
        raise ValueError(f"{path} is not about these samples: {len(other)} are in one of the two alone, as {other[0]}")
    values = np.array([correct[item.id] for item in items], np.float64)
    prompts, tags = np.array([(item.group, item.extra["tag"]) for item in items]).T
    return intervals.category_mean(values, prompts, tags)
