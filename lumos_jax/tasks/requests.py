"""What the command line of `lumos_jax.sample` asks of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def check(asked: Mapping[str, Any], needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Checks that what was asked is what a task can answer.

    Args:
      asked: the flags that were given, by name.
      needed, optional: names of flags.

    Raises:
      ValueError: a flag is missing, or is for other tasks.
    """
    missing = [name for name in needed if name not in asked]
    foreign = [name for name in asked if name not in needed + optional]
    if missing:
        raise ValueError(f"this run draws from {' and '.join(f'--{name}' for name in needed)}: give {missing[0]}")
    if foreign:
        allowed = ", ".join(f"--{name}" for name in needed + optional) or "noise alone"
        raise ValueError(f"--{foreign[0]} says nothing to this run, which draws from {allowed}")


def images(asked: Mapping[str, Any], load: Callable[[str], np.ndarray]) -> np.ndarray:
    """The pictures of --images, uint8 (R, S, S, 3), where nothing else is asked. Raises ValueError as `check` and `load`."""
    check(asked, ("images",))
    return np.stack([load(path) for path in asked["images"]])
