"""Several sources as one, each with a weight."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from lumos_jax.data import base

_FIELDS = {"source", "path", "name", "split", "num_scenes", "weight"}


def _of_part(method: str) -> Callable:
    """The method of the source that a record belongs to."""

    def call(self: MixtureSource, index: int, *arguments: Any) -> Any:
        which, inner = self.locate(index)
        return getattr(self.sources[which], method)(inner, *arguments)

    return call


@base.register("mixture")
class MixtureSource(base.Source, base.HasCaptions, base.HasLabels, base.HasClips, base.HasViews):
    """Several sources as one: records are numbered source after source; `weights` say how often each is drawn."""

    needs = "mixture"
    in_mixture = False
    read, describe, captions = map(_of_part, ("read", "describe", "captions"))
    label, posed_views, clip = map(_of_part, ("label", "posed_views", "clip"))

    def __init__(self, sources: Sequence[base.Source], weights: Sequence[float]):
        self.sources, self.weights = sources, weights
        self._ends = list(itertools.accumulate(map(len, sources)))

    @classmethod
    def open(cls, data: base.Data) -> MixtureSource:
        return cls(*zip(*(_open_part(data, number) for number in range(len(data.mixture))), strict=True))

    @property
    def parts(self) -> Sequence[base.Part]:
        return list(map(base.Part, [0, *self._ends], self.sources, self.weights))

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """Record number -> (which source, its record)."""
        return base.locate(self._ends, index)

    @property
    def remote(self) -> bool:
        return any(source.remote for source in self.sources)

    def fetch(self, images: Sequence[int], captions: Sequence[int] = ()) -> base.Fetched:
        found = base.Fetched({}, {})
        for first, source, _ in self.parts:
            own = [[r - first for r in records if first <= r < first + len(source)] for records in (images, captions)]
            for every, part in zip(found, source.fetch(*own), strict=True):
                every.update((first + record, value) for record, value in part.items())
        return found

    @property
    def classes(self) -> Sequence[str]:
        first, *others = (tuple(source.classes) for source in self.sources)
        if any(other != first for other in others):
            raise ValueError("config.data.mixture: its sources have other classes: a label would mean several things")
        return first

    def fingerprint(self) -> str:
        return base.joint_fingerprint((source.fingerprint() for source in self.sources), self.weights)


def _open_part(data: base.Data, number: int) -> tuple[base.Source, float]:
    where, fields = f"config.data.mixture[{number}]", dict(data.mixture[number])
    name, weight = fields.get("source"), fields.get("weight")
    allowed = [name for name, source in sorted(base.SOURCES.items()) if source.in_mixture]
    if unknown := set(fields) - _FIELDS:
        raise ValueError(f"{where} has unknown field(s) {sorted(unknown)}; it takes {sorted(_FIELDS)}")
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < float("inf"):
        raise ValueError(f"{where} needs weight, a number above 0, not {weight!r}")
    if name == "cached":
        raise ValueError(f"{where}: a cache is no part of a mixture; cache the mixture as a whole, to keep its order")
    if name not in allowed:
        raise ValueError(f"{where} needs source, not {name!r}: one of {', '.join(allowed)}")
    needed = base.SOURCES[name].needs.rpartition(".")[2]
    if needed and not fields.get(needed):
        raise ValueError(f"{where}: source {name} needs {needed}")
    try:
        # Nothing is taken over from config.data itself: an entry's path and name are its own.
        scenes = dataclasses.replace(data.scenes, num_scenes=fields.get("num_scenes", data.scenes.num_scenes))
        tfds = dataclasses.replace(data.tfds, name=fields.get("name", ""), split=fields.get("split", "train"))
        own = {"mixture": (), "source": name, "path": fields.get("path", ""), "scenes": scenes, "tfds": tfds}
        return base.make_source(dataclasses.replace(data, **own)), float(weight)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
