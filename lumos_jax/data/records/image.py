"""Square images."""

from __future__ import annotations

import numpy as np

from lumos_jax.data.base import register
from lumos_jax.data.decode import decode_square
from lumos_jax.data.records.base import Loader, Row, record_rng


@register("image")
class Images(Loader):
    """`image` uint8 (B, S, S, 3)."""

    def row(self) -> Row:
        return {"image": self.square}

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        augmentation = self.augmentation(*record_rng(self.data.seed, position).random(2))
        return {"image": decode_square(self.source.read(record), self.data.image_size, **augmentation)}
