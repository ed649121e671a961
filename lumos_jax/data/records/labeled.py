"""Square images with a class each."""

from __future__ import annotations

import numpy as np

from lumos_jax.data.base import HasLabels, printable, register
from lumos_jax.data.records.base import Row
from lumos_jax.data.records.image import Images


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
