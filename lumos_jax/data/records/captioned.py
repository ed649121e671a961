"""Images with a caption each; square, or in aspect buckets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lumos_jax.data import aspect, captions
from lumos_jax.data.base import Data, HasCaptions, Source
from lumos_jax.data.decode import decode_cover
from lumos_jax.data.records.base import Loader, Row, Use, record_rng, register
from lumos_jax.data.records.image import Images


@dataclasses.dataclass(frozen=True)
class BucketImages(Loader):
    """Images of one aspect bucket a batch: `image` uint8 (B, h, w, 3), and `size` float32 (B, 3), the original height and
    width and the bucket's ratio. assigned: None puts every record into the square bucket."""

    source: Source
    seed: int
    flip: bool
    table: tuple[aspect.Bucket, ...]
    assigned: np.ndarray | None  # (records,), the number of each record's bucket

    @classmethod
    def make(cls, data: Data, source: Source, use: Use) -> BucketImages:
        return cls(source, data.seed, use.training and data.flip, aspect.table(data), use.assigned)

    def bucket(self, record: int) -> aspect.Bucket:
        return self.table[aspect.square(self.table) if self.assigned is None else self.assigned[record]]

    def row(self) -> Row:
        return self._row(max(self.table, key=lambda bucket: bucket.height * bucket.width))

    def row_of(self, element: Sequence[tuple[int, int]]) -> Row:
        return self._row(self.bucket(element[0][1]))

    def _row(self, bucket: aspect.Bucket) -> Row:
        image = (np.dtype(np.uint8), (bucket.height, bucket.width, 3))
        return {"image": image, "size": (np.dtype(np.float32), (3,))}

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        bucket = self.bucket(record)
        pixels, own = decode_cover(self.source.read(record), bucket.height, bucket.width)
        if self.flip and record_rng(self.seed, position).random(2)[1] < 0.5:
            pixels = pixels[:, ::-1]
        return {"image": pixels, "size": np.array([*own, bucket.ratio], np.float32)}


@register("captioned")
@dataclasses.dataclass(frozen=True)
class Captioned(Loader):
    """Images and a caption each: `image` (and `size`) as `images` gives them, `caption` (B,) str.

    training: the choice between raw and detailed depends on the position, not on the record. noise: share of records with
    another's caption. both: no choice is made; the detailed one is `caption_detailed`.
    """

    needs = HasCaptions
    images: Images | BucketImages
    training: bool
    detailed: float
    clean: bool
    noise: float
    both: bool

    @classmethod
    def make(cls, data: Data, source: Source, use: Use) -> Captioned:
        images = (BucketImages if data.buckets.enabled else Images).make(data, source, use)
        noise = data.captions.noise if use.training else 0.0
        return cls(
            images, use.training, data.captions.detailed_caption_prob, data.captions.clean, noise, use.everything
        )

    @property
    def source(self) -> Source:
        return self.images.source

    def row(self) -> Row:
        return self.images.row() | self._texts()

    def row_of(self, element: Sequence[tuple[int, int]]) -> Row:
        return self.images.row_of(element) | self._texts()

    def _texts(self) -> Row:
        return dict.fromkeys(("caption", "caption_detailed") if self.both else ("caption",), (np.dtype(object), ()))

    def load(self, position: int, record: int) -> dict[str, Any]:
        loaded = self.images.load(position, record)
        texts = self.source.captions(captions.partner(record, len(self.source), self.noise, self.images.seed))
        texts = tuple(map(captions.clean, texts)) if self.clean else texts
        if self.both:
            return loaded | {"caption": texts[0], "caption_detailed": texts[1]}
        random = record_rng(self.images.seed, position if self.training else record).random(3)[2]
        return loaded | {"caption": texts[captions.choose(texts, random, self.detailed)]}
