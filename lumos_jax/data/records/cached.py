"""Batches of what a cache holds: latents and features in place of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lumos_jax.data import captions
from lumos_jax.data.base import Data, Source
from lumos_jax.data.records.base import Loader, Row, Use, record_rng
from lumos_jax.data.sources import cached


@dataclasses.dataclass(frozen=True)
class CachedLoader(Loader):
    """Every array of a record; see `sources.cached`."""

    source: Source
    arrays: Row  # of each record; -1 for a length that differs

    def row(self) -> Row:
        return self.arrays

    def load(self, position: int, record: int) -> Mapping[str, Any]:
        found = self.read(record)
        return {**found.arrays, "problem": "" if found.weight else found.problem}

    def read(self, number: int) -> cached.Record:
        """A record. Raises ValueError if it is damaged."""
        record = cached.decode_record(self.source.read(number))
        held = cached.described(record.arrays, [name for name, (_, shape) in self.arrays.items() if -1 in shape])
        if record.number != number or held != {
            name: (dtype.name, shape) for name, (dtype, shape) in self.arrays.items()
        }:
            raise ValueError("another record than the manifest says")
        return record


@dataclasses.dataclass(frozen=True)
class CachedCaptions(CachedLoader):
    """As CachedLoader, of a cache of captions: `feature` (B, L, C) of the caption that was chosen, padded with zeros,
    `token_mask` (B, L) bool where it is of several tokens, and `caption` (B,) str."""

    length: int  # L
    seed: int
    training: bool
    detailed: float
    noise: float

    @property
    def several(self) -> bool:
        return -1 in self.arrays["feature"][1]

    def row(self) -> Row:
        fixed = {name: kind for name, kind in self.arrays.items() if name in ("image", "latent")}
        dtype, (length, features) = self.arrays["feature"]
        if not self.several:
            return fixed | {"feature": (dtype, (length, features)), "caption": (np.dtype(object), ())}
        mask = (np.dtype(bool), (self.length,))
        return fixed | {
            "feature": (dtype, (self.length, features)), "token_mask": mask, "caption": (np.dtype(object), ())
        }  # fmt: skip

    def load(self, position: int, record: int) -> Mapping[str, Any]:
        own = self.read(record)
        other = captions.partner(record, len(self.source), self.noise, self.seed)
        paired = own if other == record else self.read(other)
        random = record_rng(self.seed, position if self.training else record).random(3)[2]
        texts = tuple(cached.to_text(paired.arrays[name]) for name in ("caption", "caption_detailed"))
        which = captions.choose(texts, random, self.detailed)
        feature = paired.arrays[("feature", "feature_detailed")[which]]
        loaded = {name: array for name, array in own.arrays.items() if name in ("image", "latent")}
        loaded["caption"] = texts[which]
        if self.several:
            missing = self.length - len(feature)
            loaded["token_mask"] = np.arange(self.length) < len(feature)
            feature = np.pad(feature, ((0, missing), (0, 0)))
        problem = "; ".join(part.problem for part in (own, paired) if not part.weight)
        return loaded | {"feature": feature, "problem": problem}


def make(data: Data, source: Source, use: Use) -> CachedLoader:
    """The loader of the cache at config.data.path. Raises ValueError if it holds another sample type."""
    manifest = cached.read_manifest(data.path)
    # By name: NumPy alone does not know bfloat16.
    arrays = {name: (np.dtype(cached.ALL_DTYPES[dtype]), shape) for name, (dtype, shape) in manifest.arrays.items()}
    if ("caption" in arrays) != (data.sample_type == "captioned"):
        raise ValueError(
            f"config.data.path={data.path!r}: config.data.sample_type={data.sample_type}, and this cache holds "
            f"{'captions' if 'caption' in arrays else 'no captions'}: set it back, or make another cache"
        )
    if data.sample_type != "captioned":
        return CachedLoader(source, arrays)
    length, noise = manifest.made_by["encoder.max_tokens"], data.captions.noise if use.training else 0.0
    return CachedCaptions(source, arrays, length, data.seed, use.training, data.captions.detailed_caption_prob, noise)
