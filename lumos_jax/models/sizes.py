"""Sizes of the diffusion transformer: the table of the DiT paper (Peebles & Xie 2023, table 1)."""

from __future__ import annotations

import dataclasses

from lumos_jax import config


@dataclasses.dataclass(frozen=True)
class Size:
    """width: D. depth: number of blocks. heads: H; the head dim is D / H."""

    width: int
    depth: int
    heads: int


SIZES = {
    "S": Size(width=384, depth=12, heads=6),
    "B": Size(width=768, depth=12, heads=12),
    "L": Size(width=1024, depth=24, heads=16),
    "XL": Size(width=1152, depth=28, heads=16),
}


def make_size(model: config.Model) -> Size:
    """The size that config.model names.

    Raises:
      ValueError: unknown name, or a custom size that does not divide into heads and sin-cos positions.
    """
    if model.size == "custom":
        size = Size(model.width, model.depth, model.heads)
    elif model.size in SIZES:
        size = SIZES[model.size]
    else:
        raise ValueError(f"config.model.size={model.size!r} is not one of {', '.join(SIZES)}, custom")
    if min(dataclasses.astuple(size)) < 1 or size.width % size.heads or size.width % 4:
        raise ValueError(
            f"config.model: width={size.width}, depth={size.depth}, heads={size.heads} make no transformer: "
            "all are positive, and width is a multiple of heads and of 4 (sin-cos positions)"
        )
    return size
