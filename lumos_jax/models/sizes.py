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
    """The size that config.model names.

    Raises:
      ValueError: unknown name, or a custom size that does not divide into heads and sin-cos positions.
    """
    if model.size != "custom" and model.size not in SIZES:
        raise ValueError(f"config.model.size={model.size!r} is not one of {', '.join(SIZES)}, custom")
    size = SIZES.get(model.size) or Size(model.width, model.depth, model.heads)
    if min(size) < 1 or size.width % size.heads or size.width % 4:
        raise ValueError(
            f"config.model: width={size.width}, depth={size.depth}, heads={size.heads} make no transformer: "
            "all are positive, and width is a multiple of heads and of 4 (sin-cos positions)"
        )
    return size
