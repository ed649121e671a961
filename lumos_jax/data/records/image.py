"""Square images, alone or with a class each."""

from __future__ import annotations

import numpy as np

from lumos_jax.data.base import HasLabels, printable, register
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


@register("labeled")
class Labeled(Images):
    """`image` as of Images, `label` int32 (B,)."""

    needs = HasLabels

    def check(self) -> None:
        super().check()
        classes = self.source.classes
        if len(classes) != self.data.num_classes:
            raise ValueError(
                f"config.data.num_classes={self.data.num_classes}, but the source has {len(classes)} "
                f"({', '.join(map(printable, classes[:3]))} ...): set it to that"
            )

    def row(self) -> Row:
        return super().row() | {"label": (np.dtype(np.int32), ())}

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        return super().load(position, record) | {"label": self.source.label(record)}
