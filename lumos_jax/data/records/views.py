"""Pairs of posed views: an image of an object or scene, and from which camera to see it next (Zero-1-to-3)."""

from __future__ import annotations

import dataclasses

import numpy as np

from lumos_jax.data.base import Data, HasViews, Source
from lumos_jax.data.cameras import CAMERA_DIM, relative_camera
from lumos_jax.data.decode import to_square
from lumos_jax.data.records.base import Loader, Row, Use, record_rng, register

_HELD_OUT_SEED = 0x7E  # held-out pairs are the same whatever config.data.seed


@register("views")
@dataclasses.dataclass(frozen=True)
class Views(Loader):
    """Pairs of views of one record: the target `image` and the condition `input`, uint8 (B, S, S, 3), and `camera` float32
    (B, 4), see `cameras`.

    Which two is chosen by the record's own random numbers: in training by its position, so that every epoch shows other pairs;
    of held-out records by their number.
    """

    needs = HasViews
    source: Source
    size: int
    seed: int
    training: bool

    @classmethod
    def make(cls, data: Data, source: Source, use: Use) -> Views:
        return cls(source, data.image_size, data.seed, use.training)

    def row(self) -> Row:
        image = (np.dtype(np.uint8), (self.size, self.size, 3))
        return {"image": image, "input": image, "camera": (np.dtype(np.float32), (CAMERA_DIM,))}

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        rng = record_rng(self.seed, position) if self.training else record_rng(_HELD_OUT_SEED, record)
        (image, target), (given, condition) = self.source.posed_views(record, rng, 2)
        images = {"image": to_square(image, self.size), "input": to_square(given, self.size)}
        return images | {"camera": relative_camera(target, condition)}
