"""Images with a caption each; square, or in aspect buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lumos_jax.data import aspect, captions
from lumos_jax.data.base import Captions, HasCaptions, register
from lumos_jax.data.decode import decode_cover
from lumos_jax.data.records.base import TEXT, Loader, Row, record_rng
from lumos_jax.data.records.image import Images


@register("captioned")
class Captioned(Images):
    """`image` as of Images, `caption` (B,) str: raw or detailed; with `everything` both, the latter as `caption_detailed`.

    With config.data.aspect_ratios a batch has the shape of one bucket, `image` uint8 (B, h, w, 3), and `size` float32 (B, 3):
    the original height and width and the bucket's ratio.
    """

    needs = HasCaptions

    def row(self) -> Row:
        row = super().row() | dict.fromkeys(("caption", "caption_detailed") if self.everything else ("caption",), TEXT)
        if self.data.has_buckets:
            row |= _bucket_row(max(aspect.table(self.data), key=lambda bucket: bucket.height * bucket.width))
        return row

    def row_of(self, element: Sequence[tuple[int, int]]) -> Row:
        return self.row() | (_bucket_row(self._bucket(element[0][1])) if self.data.has_buckets else {})

    def records_of(self, element: Sequence[tuple[int, int]]) -> tuple[Sequence[int], Sequence[int]]:
        return [record for _, record in element], [caption_record(self, record) for _, record in element]

    def _bucket(self, record: int) -> aspect.Bucket:
        table = aspect.table(self.data)
        return table[aspect.square(table) if self.assigned is None else self.assigned[record]]

    def load(self, position: int, record: int) -> dict[str, Any]:
        loaded = self._load_cover(position, record) if self.data.has_buckets else super().load(position, record)
        texts = self.source.captions(caption_record(self, record))
        texts = tuple(map(captions.clean, texts)) if self.data.captions.clean else texts
        if self.everything:
            return loaded | {"caption": texts[0], "caption_detailed": texts[1]}
        return loaded | {"caption": texts[which_caption(self, position, record, texts)]}

    def _load_cover(self, position: int, record: int) -> dict[str, np.ndarray]:
        bucket = self._bucket(record)
        pixels, own = decode_cover(self.source.read(record), bucket.height, bucket.width)
        flip = self.augmentation(*record_rng(self.data.seed, position).random(2))["flip"]
        return {"image": pixels[:, ::-1] if flip else pixels, "size": np.array([*own, bucket.ratio], np.float32)}


def _bucket_row(bucket: aspect.Bucket) -> Row:
    image = np.dtype(np.uint8), (bucket.height, bucket.width, 3)
    return {"image": image, "size": (np.dtype(np.float32), (3,))}


def caption_record(loader: Loader, record: int) -> int:
    """The record whose caption this one has: its own, or in training, with config.data.captions.noise, another's."""
    noise = loader.data.captions.noise if loader.training else 0.0
    return captions.partner(record, len(loader.source), noise, loader.data.seed)


def which_caption(loader: Loader, position: int, record: int, texts: Captions) -> int:
    """0, the raw caption, or 1, the detailed one: chosen by the position in training, by the record otherwise."""
    draw = record_rng(loader.data.seed, position if loader.training else record).random(3)[2]
    return captions.choose(texts, draw, loader.data.captions.detailed_caption_prob)
