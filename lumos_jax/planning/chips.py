"""The chips that `lumos_jax.plan` knows, and targets such as v5e:16x16 or h100:8.

Sources, per chip:
  v5e, v6e, v5p   Cloud TPU documentation, "System architecture" (cloud.google.com/tpu/docs/v5e, v6e, v5p): peak, HBM, HBM
                  bandwidth, interconnect bandwidth, which counts both directions of all links; clocks follow from the peak
                  and the size of the matrix units (v5e: 4 of 128 x 128; v5p: 8; v6e: 2 of 256 x 256)
  a100, h100      NVIDIA's data sheets of the SXM parts with 80 GB: dense bfloat16, memory bandwidth, NVLink in both directions
Programs cannot use all memory: `usable` of v5e is the limit that its compiler reports, of the others about the same share.
"""

from __future__ import annotations

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip."""

    name: str  # as in a target
    platform: str  # tpu | cuda
    usable: int  # bytes of memory that a program may take
    peak: float  # dense bfloat16 FLOP/s
    bandwidth: float  # of its memory, bytes/s
    links: float  # bytes/s that it can receive over all links at once: half of what counts both directions
    dims: int  # of the grid of chips; 0 for GPUs, which are all connected
    clock: float  # Hz of the compiler's cycles; 0 if the compiler estimates none


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", int(15.75 * GIB), 197e12, 819e9, 200e9, 2, 197e12 / (2 * 4 * 128**2)),
        Chip("v5p", "tpu", int(95.74 * GIB), 459e12, 2765e9, 600e9, 3, 459e12 / (2 * 8 * 128**2)),
        Chip("v6e", "tpu", int(31.25 * GIB), 918e12, 1640e9, 400e9, 2, 918e12 / (2 * 2 * 256**2)),
        Chip("a100", "cuda", 85_100_068_864, 312e12, 2039e9, 300e9, 0, 0.0),
        Chip("h100", "cuda", 84_942_979_072, 989e12, 3352e9, 450e9, 0, 0.0),
    )
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine: chips of one kind, in a grid (TPU) or a number of them (GPUs of one host)."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def layout(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        return f"{self.chip.name}:{self.layout}"


def parse_target(text: str) -> Target:
    """ "v5e:16x16", "v5p:4x4x4", "h100:8" -> Target. Raises ValueError for an unknown chip or a shape that its grid lacks."""
    name, _, layout = text.partition(":")
    if name not in CHIPS:
        raise ValueError(
            f"--target={text}: {name!r} is not one of {', '.join(CHIPS)}; write CHIP:SHAPE, as v5e:4x4 or h100:8"
        )
    wanted = CHIPS[name].dims or 1
    example = {1: f"{name}:8", 2: f"{name}:4x4", 3: f"{name}:4x4x4"}[wanted]
    if not re.fullmatch(r"\d+(x\d+)*", layout) or layout.count("x") + 1 != wanted:
        raise ValueError(f"--target={text}: {name} takes {wanted} number(s) behind the colon, as {example}")
    shape = tuple(map(int, layout.split("x")))
    if min(shape) < 1:
        raise ValueError(f"--target={text}: every side is 1 or more, as {example}")
    if CHIPS[name].platform == "tpu" and (shape[0] % 2 or shape[1] % 2):
        raise ValueError(
            f"--target={text}: hosts of {name} hold 2 x 2 chips, so the first two sides are even, as {example}"
        )
    return Target(CHIPS[name], shape)
