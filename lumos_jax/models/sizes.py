"""Sizes of the diffusion transformer: the table of the DiT paper (Peebles & Xie 2023, table 1)."""

from __future__ import annotations

from typing import NamedTuple

from lumos_jax import config


class Size(NamedTuple):
    """width: D. depth: number of blocks. heads: H; the head dim is D / H."""

    width: int
    depth: int
    heads: int


SIZES = {"S": Size(384, 12, 6), "B": Size(768, 12, 12), "L": Size(1024, 24, 16), "XL": Size(1152, 28, 16)}


def make_size(model: config.Model) -> Size:
    """The size that config.model names. Raises ValueError for an unknown name."""
    if (custom := config.custom_size(model.size)) is not None:
        return Size(*custom)
    if model.size not in SIZES:
        raise ValueError(f"config.model.size={model.size!r} is not one of {', '.join(SIZES)}, or as 128x4x4")
    return SIZES[model.size]
