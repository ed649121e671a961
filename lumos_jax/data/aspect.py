"""Aspect buckets: the sizes in which pictures of many shapes train, one bucket a batch. A rule; imports no room.

Sides are multiples of a step, and the area is that of a square of `base` pixels a side, less ten percent at most. At base / 16
these are the 40 sizes of PixArt's tables for 256, 512 and 1024 pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

LEAST_AREA = 0.9  # of the square's
PARTS = 16  # steps a side of the square, unless said otherwise
_LEFT_OUT = (21, 11)  # (height, width) in steps of base / 16 that the rule allows and PixArt's tables do not have


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Height and width in pixels; `ratio` is their quotient to two decimals, as PixArt compares and embeds it."""

    height: int
    width: int

    @property
    def ratio(self) -> float:
        return round(self.height / self.width, 2)


def make_buckets(base: int, step: int = 0, ratios: tuple[float, float] = (0.25, 4.0)) -> tuple[Bucket, ...]:
    """The buckets around base x base, by rising ratio.

    Args:
      base: pixels a side of the square bucket.
      step: pixels of which sides are multiples; 0 takes base / 16.
      ratios: smallest and largest height over width.

    Raises:
      ValueError: the step does not divide the base, or the ratios leave no square.
    """
    step = step or base // PARTS
    if step < 1 or base % step:
        raise ValueError(f"buckets around {base} px: sides cannot be multiples of {step or f'{base}/{PARTS}'} px")
    if not ratios[0] <= 1 <= ratios[1]:
        raise ValueError(f"buckets with ratios from {ratios[0]} to {ratios[1]} leave out the square")
    side, found = base // step, []
    for height in range(1, side * side + 1):
        for width in range(1, side * side // height + 1):
            allowed = height * width > LEAST_AREA * side * side and ratios[0] <= height / width <= ratios[1]
            if allowed and not (side == PARTS and (height, width) == _LEFT_OUT):
                found.append(Bucket(height * step, width * step))
    return tuple(sorted(found, key=lambda bucket: bucket.height / bucket.width))


def nearest(buckets: Sequence[Bucket], ratio: np.ndarray) -> np.ndarray:
    """Which bucket's ratio is nearest by |difference|, for ratios (N,) of height over width: int (N,)."""
    distances = np.abs(np.array([bucket.ratio for bucket in buckets])[:, None] - np.asarray(ratio)[None])
    return distances.argmin(axis=0)


def square(buckets: Sequence[Bucket]) -> int:
    """Which bucket is the square one."""
    return next(i for i, bucket in enumerate(buckets) if bucket.height == bucket.width)
