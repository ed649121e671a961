"""(position, record) pairs of one step -> the arrays of its batch: read, decode, draw what is random about a record."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np

from lumos_jax import config
from lumos_jax.data import cached, workers
from lumos_jax.data.decode import UndecodableImage, decode_square, fit_square
from lumos_jax.data.sources import Source, printable

HostBatch = dict[str, np.ndarray]
Row = dict[str, tuple[np.dtype, tuple[int, ...]]]  # of the arrays of a batch: name -> dtype and shape of one row
_PROBLEM_LENGTH, _REASON_LENGTH = 240, 100  # characters


class BatchLoader(grain.transforms.Map):
    """(position, record) pairs of one step -> HostBatch; picklable."""

    @abc.abstractmethod
    def row(self) -> Row:
        """Dtype and shape of one row of each array."""


class RecordLoader(BatchLoader):
    """A batch loader that loads one record after the other; what cannot be read or decoded is a row of weight 0."""

    source: Source

    @abc.abstractmethod
    def load(self, position: int, record: int) -> Mapping[str, np.ndarray]:
        """The arrays of one row, as `row` describes them.

        Raises:
          UndecodableImage or OSError: the record is damaged.
        """

    def map(self, element: Sequence[tuple[int, int]]) -> HostBatch:
        batch = new_batch(element, self.row())
        for row, (position, record) in enumerate(element):
            try:
                loaded = self.load(position, record)
            except (UndecodableImage, OSError) as error:
                reject(batch, row, f"{self.source.describe(record)}: {str(error)[:_REASON_LENGTH]}")
                continue
            for name, array in loaded.items():
                batch[name][row] = array
        return batch


def stream(seed: int, position: int) -> np.random.Generator:
    """A record's own random numbers: nothing is carried from one record to the next."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, position], np.uint64)))


@dataclasses.dataclass(frozen=True)
class Pictures(RecordLoader):
    """Square pictures: `image` uint8 (B, S, S, 3)."""

    source: Source
    size: int
    seed: int
    random_crop: bool
    flip: bool

    def row(self) -> Row:
        return {"image": (np.dtype(np.uint8), (self.size, self.size, 3))}

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        data = self.source.read(record)
        shift, flip = 0.5, False
        if self.random_crop or self.flip:
            draw = stream(self.seed, position).random(2)
            shift = float(draw[0]) if self.random_crop else 0.5
            flip = bool(self.flip and draw[1] < 0.5)
        fit = fit_square if isinstance(data, np.ndarray) else decode_square
        return {"image": fit(data, self.size, shift=shift, flip=flip)}


@dataclasses.dataclass(frozen=True)
class Labelled(RecordLoader):
    """Square pictures and their classes: `image` as of Pictures, `label` int32 (B,)."""

    pictures: Pictures

    @property
    def source(self) -> Source:
        return self.pictures.source

    def row(self) -> Row:
        return self.pictures.row() | {"label": (np.dtype(np.int32), ())}

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        return self.pictures.load(position, record) | {"label": np.int32(self.source.label(record))}


@dataclasses.dataclass(frozen=True)
class CachedLoader(BatchLoader):
    """(position, record) pairs -> HostBatch of what a cache holds; see `data.cached`."""

    source: Source
    arrays: Row

    def map(self, element: Sequence[tuple[int, int]]) -> HostBatch:
        batch = new_batch(element, self.arrays)
        for row, (_, number) in enumerate(element):
            try:
                record = cached.decode_record(self.source.read(number))
                held = {name: (array.dtype, array.shape) for name, array in record.arrays.items()}
                if record.number != number or held != self.arrays:
                    raise ValueError("another record than the manifest says")
            except (ValueError, OSError) as error:
                reject(batch, row, f"{self.source.describe(number)}: {str(error)[:_REASON_LENGTH]}")
                continue
            if not record.weight:
                reject(batch, row, record.problem)
            for name, array in record.arrays.items():
                batch[name][row] = array
        return batch

    def row(self) -> Row:
        return self.arrays


def new_batch(element: Sequence[tuple[int, int]], row: Row) -> HostBatch:
    """Zeros of weight 1 for these (position, record) pairs."""
    count = len(element)
    batch = {name: workers.new_array((count, *shape), dtype) for name, (dtype, shape) in row.items()}
    return batch | {
        "weight": np.ones(count, np.float32),
        "record": np.array([record for _, record in element], np.int64),
        "problem": np.zeros(count, f"<U{_PROBLEM_LENGTH}"),
    }


def reject(batch: HostBatch, row: int, problem: str) -> None:
    batch["weight"][row] = 0.0
    batch["problem"][row] = problem[-_PROBLEM_LENGTH:]  # the end of a path and the reason say most


def make_loader(data: config.Data, source: Source, *, training: bool) -> BatchLoader:
    """What makes batches of the records of a source, as config.data.record says. Random crops and mirrors only in training.

    Raises:
      ValueError: the source has no such records.
    """
    if data.source == "cached":
        arrays = cached.read_manifest(data.path).arrays
        return CachedLoader(source, {name: (np.dtype(dtype), shape) for name, (dtype, shape) in arrays.items()})
    if data.record not in _MAKERS:
        raise ValueError(f"config.data.record={data.record!r} is not one of {', '.join(_MAKERS)}")
    return _MAKERS[data.record](data, source, training)


def _pictures(data: config.Data, source: Source, training: bool) -> Pictures:
    return Pictures(source, data.image_size, data.seed, training and data.crop == "random", training and data.flip)


def _labelled(data: config.Data, source: Source, training: bool) -> Labelled:
    for part in getattr(source, "sources", [source]):
        if not hasattr(part, "label"):
            raise ValueError(
                f"config.data.record=labelled: {part.describe(0)} ... have no labels. Sources that do are scenes, folder (a "
                "folder a class) and tfds (a feature that is a class label)"
            )
    if len(source.classes) != data.classes:
        few = ", ".join(map(printable, source.classes[:3]))
        raise ValueError(
            f"config.data.classes={data.classes}, but the source has {len(source.classes)} ({few} ...): set it to that"
        )
    return Labelled(_pictures(data, source, training))


def _clips(data: config.Data, source: Source, training: bool) -> BatchLoader:
    from lumos_jax.data.clips import make_clips

    return make_clips(data, source, training)


def _views(data: config.Data, source: Source, training: bool) -> RecordLoader:
    from lumos_jax.data.views import Views, parts

    for part in parts(source):
        if not hasattr(part, "posed_views"):
            raise ValueError(
                f"config.data.record=views needs pictures with cameras, and {part.describe(0)} has none: set "
                "config.data.source to scenes or objaverse"
            )
    return Views(source, data.image_size, data.seed, training)


# config.data.record -> (config.data, source, training) -> loader.
_MAKERS: Mapping[str, Callable[[config.Data, Source, bool], BatchLoader]] = {
    "image": _pictures,
    "labelled": _labelled,
    "clip": _clips,
    "views": _views,
}
