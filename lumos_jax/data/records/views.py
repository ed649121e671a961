"""Pairs of posed views: an image of an object or scene, and from which camera to see it next (Zero-1-to-3)."""

from __future__ import annotations

import numpy as np

from lumos_jax.data.base import HasViews, register
from lumos_jax.data.cameras import CAMERA_DIM, relative_camera
from lumos_jax.data.decode import decode_square
from lumos_jax.data.records.base import Loader, Row, record_rng

_HELD_OUT_SEED = 0x7E  # held-out pairs are the same whatever config.data.seed


@register("views")
class Views(Loader):
    """Pairs of views of one record: the target `image` and the condition `input`, uint8 (B, S, S, 3), and `camera` float32
    (B, 4), see `cameras`.

    Which two is chosen by the record's own random numbers: in training by its position, so that every epoch shows other pairs;
    of held-out records by their number.
    """

    needs = HasViews

    def row(self) -> Row:
        return {"image": self.square, "input": self.square, "camera": (np.dtype(np.float32), (CAMERA_DIM,))}

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        rng = record_rng(self.data.seed, position) if self.training else record_rng(_HELD_OUT_SEED, record)
        (image, target), (given, condition) = self.source.posed_views(record, rng, 2)
        pixels = (decode_square(view, self.data.image_size) for view in (image, given))
        return dict(zip(("image", "input"), pixels, strict=True), camera=relative_camera(target, condition))
