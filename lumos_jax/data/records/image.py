"""Square images."""

from __future__ import annotations

import dataclasses

import numpy as np

from lumos_jax.data.base import Data, Source
from lumos_jax.data.decode import to_square
from lumos_jax.data.records.base import Loader, Row, Use, record_rng, register


@register("image")
@dataclasses.dataclass(frozen=True)
class Images(Loader):
    """Square images: `image` uint8 (B, S, S, 3)."""

    source: Source
    size: int
    seed: int
    random_crop: bool
    flip: bool

    @classmethod
    def make(cls, data: Data, source: Source, use: Use) -> Images:
        crop, flip = use.training and data.crop == "random", use.training and data.flip
        return cls(source, data.image_size, data.seed, crop, flip)

    def row(self) -> Row:
        return {"image": (np.dtype(np.uint8), (self.size, self.size, 3))}

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        data = self.source.read(record)
        shift, flip = 0.5, False
        if self.random_crop or self.flip:
            random = record_rng(self.seed, position).random(2)
            shift = float(random[0]) if self.random_crop else 0.5
            flip = bool(self.flip and random[1] < 0.5)
        return {"image": to_square(data, self.size, shift=shift, flip=flip)}
