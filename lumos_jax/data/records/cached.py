"""Batches of what a cache holds: latents and features in place of images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lumos_jax.data.records.base import TEXT, Loader, Row
from lumos_jax.data.records.captioned import caption_record, which_caption
from lumos_jax.data.sources import cached


class CachedLoader(Loader):
    """Every array of a record; see `sources.cached`."""

    @functools.cached_property
    def manifest(self) -> cached.Manifest:
        return cached.read_manifest(self.data.path)

    def check(self) -> None:
        captioned = "caption" in self.manifest.arrays
        if captioned != (self.data.sample_type == "captioned"):
            raise ValueError(
                f"config.data.path={self.data.path!r}: config.data.sample_type={self.data.sample_type}, and this cache "
                f"holds {'captions' if captioned else 'no captions'}: set it back, or make another cache"
            )

    def row(self) -> Row:
        # By name: NumPy alone does not know bfloat16.
        return {name: (cached.ALL_DTYPES[dtype], shape) for name, (dtype, shape) in self.manifest.arrays.items()}

    def load(self, position: int, record: int) -> dict[str, Any]:
        found = self.read(record)
        return {**found.arrays, "problem": "" if found.weight else found.problem}

    def read(self, number: int) -> cached.Record:
        """A record. Raises ValueError if it is damaged."""
        record, arrays = cached.decode_record(self.source.read(number)), self.manifest.arrays
        held = cached.described(record.arrays, [name for name, (_, shape) in arrays.items() if -1 in shape])
        if record.number != number or held != arrays:
            raise ValueError("another record than the manifest says")
        return record


class CachedCaptions(CachedLoader):
    """As CachedLoader, of a cache of captions: `feature` (B, L, C) of the caption that was chosen, padded with zeros,
    `token_mask` (B, L) bool where it is of several tokens, and `caption` (B,) str."""

    def row(self) -> Row:
        held = super().row()
        dtype, (length, features) = held["feature"]
        row = {name: kind for name, kind in held.items() if name in ("image", "latent")} | {"caption": TEXT}
        if length >= 0:
            return row | {"feature": (dtype, (length, features))}
        length = self.manifest.made_by["encoder.max_tokens"]
        return row | {"feature": (dtype, (length, features)), "token_mask": (np.dtype(bool), (length,))}

    def records_of(self, element: Sequence[tuple[int, int]]) -> tuple[Sequence[int], Sequence[int]]:
        return [one for _, record in element for one in {record, caption_record(self, record)}], ()

    def load(self, position: int, record: int) -> dict[str, Any]:
        own, other = self.read(record), caption_record(self, record)
        paired = own if other == record else self.read(other)
        texts = tuple(cached.to_text(paired.arrays[name]) for name in ("caption", "caption_detailed"))
        which = which_caption(self, position, record, texts)
        feature = paired.arrays[("feature", "feature_detailed")[which]]
        loaded = {name: array for name, array in own.arrays.items() if name in ("image", "latent")}
        if "token_mask" in (row := self.row()):
            length = row["feature"][1][0]
            loaded["token_mask"] = np.arange(length) < len(feature)
            feature = np.pad(feature, ((0, length - len(feature)), (0, 0)))
        problem = "; ".join(part.problem for part in (own, paired) if not part.weight)
        return loaded | {"feature": feature, "caption": texts[which], "problem": problem}
