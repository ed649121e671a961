"""Pairs of posed views: a picture of an object or scene, and from which camera to see it next (Zero-1-to-3)."""

from __future__ import annotations

import dataclasses

import numpy as np

from lumos_jax.data.cameras import CAMERA_DIM, relative_camera
from lumos_jax.data.decode import decode_square, fit_square
from lumos_jax.data.loaders import RecordLoader, Row, stream
from lumos_jax.data.sources import Source

_HELD_OUT_SEED = 0x7E  # held-out pairs are the same whatever config.data.seed


@dataclasses.dataclass(frozen=True)
class Views(RecordLoader):
    """Pairs of views of one record: the target `image` and the condition `input`, uint8 (B, S, S, 3), and `camera` float32
    (B, 4), see `cameras`.

    Which two is drawn from the record's own stream: in training by its position, so that every epoch shows other pairs; of
    held-out records by their number.
    """

    source: Source
    size: int
    seed: int
    training: bool

    def row(self) -> Row:
        picture = (np.dtype(np.uint8), (self.size, self.size, 3))
        return {"image": picture, "input": picture, "camera": (np.dtype(np.float32), (CAMERA_DIM,))}

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        draw = stream(self.seed, position) if self.training else stream(_HELD_OUT_SEED, record)
        (image, target), (given, condition) = self.source.posed_views(record, draw, 2)
        pictures = {"image": self._picture(image), "input": self._picture(given)}
        return pictures | {"camera": relative_camera(target, condition)}

    def _picture(self, data: bytes | np.ndarray) -> np.ndarray:
        fit = fit_square if isinstance(data, np.ndarray) else decode_square
        return fit(data, self.size)
