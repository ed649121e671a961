"""Square images with a class each."""

from __future__ import annotations

import dataclasses

import numpy as np

from lumos_jax.data.base import Data, HasLabels, Source, printable
from lumos_jax.data.records.base import Loader, Row, Use, register
from lumos_jax.data.records.image import Images


@register("labeled")
@dataclasses.dataclass(frozen=True)
class Labeled(Loader):
    """Square images and their classes: `image` as of Images, `label` int32 (B,)."""

    needs = HasLabels
    images: Images

    @classmethod
    def check(cls, data: Data, source: Source) -> None:
        super().check(data, source)
        if len(source.classes) != data.num_classes:
            few = ", ".join(map(printable, source.classes[:3]))
            raise ValueError(
                f"config.data.num_classes={data.num_classes}, but the source has {len(source.classes)} ({few} "
                "...): set it to that"
            )

    @classmethod
    def make(cls, data: Data, source: Source, use: Use) -> Labeled:
        return cls(Images.make(data, source, use))

    @property
    def source(self) -> Source:
        return self.images.source

    def row(self) -> Row:
        return self.images.row() | {"label": (np.dtype(np.int32), ())}

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        return self.images.load(position, record) | {"label": np.int32(self.source.label(record))}
