"""Several sources as one, each with a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lumos_jax.data.base import (
    SOURCES,
    Captions,
    Clip,
    Data,
    HasCaptions,
    HasClips,
    HasLabels,
    HasViews,
    Part,
    Source,
    digest,
    make_source,
    register,
)  # fmt: skip

_FIELDS = {"source", "path", "name", "split", "num_scenes", "weight"}


@register("mixture")
class MixtureSource(Source, HasCaptions, HasLabels, HasClips, HasViews):
    """Several sources as one: records are numbered source after source; `weights` say how often each is drawn."""

    needs = "mixture"
    in_mixture = False

    def __init__(self, sources: list[Source], weights: list[float]):
        self.sources, self.weights = sources, weights
        self._starts = np.cumsum([0, *map(len, sources)])

    @classmethod
    def open(cls, data: Data) -> MixtureSource:
        sources, weights = zip(*(_open_part(data, number) for number in range(len(data.mixture))), strict=True)
        return cls(list(sources), list(weights))

    @property
    def parts(self) -> Sequence[Part]:
        return [Part(int(first), *part) for first, *part in zip(self._starts, self.sources, self.weights, strict=False)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Record number -> (which source, its record)."""
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return which, index - int(self._starts[which])

    def _call(self, method: str, index: int, *arguments) -> Any:
        which, inner = self.locate(index)
        return getattr(self.sources[which], method)(inner, *arguments)

    def read(self, index: int) -> bytes | np.ndarray:
        return self._call("read", index)

    def describe(self, index: int) -> str:
        return self._call("describe", index)

    def captions(self, index: int) -> Captions:
        return self._call("captions", index)

    def label(self, index: int) -> int:
        return self._call("label", index)

    def posed_views(self, index: int, rng: np.random.Generator, count: int) -> list[tuple[Any, np.ndarray]]:
        return self._call("posed_views", index, rng, count)

    def clip(self, index: int, frames: int, stride: int, share: float, size: int) -> Clip:
        return self._call("clip", index, frames, stride, share, size)

    @property
    def classes(self) -> Sequence[str]:
        first, *others = (tuple(source.classes) for source in self.sources)
        if any(other != first for other in others):
            raise ValueError(
                "config.data.mixture: its sources have other classes, so a label would mean several things"
            )
        return first

    def fingerprint(self) -> str:
        return digest(zip((source.fingerprint() for source in self.sources), self.weights, strict=True))


def _open_part(data: Data, number: int) -> tuple[Source, float]:
    where, fields = f"config.data.mixture[{number}]", dict(data.mixture[number])
    unknown = set(fields) - _FIELDS
    if unknown:
        raise ValueError(f"{where} has unknown field(s) {sorted(unknown)}; it takes {sorted(_FIELDS)}")
    weight = fields.pop("weight", None)
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < float("inf"):
        raise ValueError(f"{where} needs weight, a number above 0, not {weight!r}")
    allowed = {name: source for name, source in SOURCES.items() if source.in_mixture}
    if fields.get("source") == "cached":
        raise ValueError(
            f"{where}: a cache is no part of a mixture; cache the mixture as a whole, which keeps its order"
        )
    if fields.get("source") not in allowed:
        raise ValueError(f"{where} needs source, not {fields.get('source')!r}: one of {', '.join(sorted(allowed))}")
    needed = allowed[fields["source"]].needs
    if needed and not fields.get(needed.rpartition(".")[2]):
        raise ValueError(f"{where}: source {fields['source']} needs {needed.rpartition('.')[2]}")
    try:
        # Nothing is taken over from config.data itself: an entry's path and name are its own.
        own = dataclasses.replace(
            data,
            mixture=(),
            source=fields["source"],
            path=fields.get("path", ""),
            scenes=dataclasses.replace(data.scenes, num_scenes=fields.get("num_scenes", data.scenes.num_scenes)),
            tfds=dataclasses.replace(data.tfds, name=fields.get("name", ""), split=fields.get("split", "train")),
        )
        return make_source(own), float(weight)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
