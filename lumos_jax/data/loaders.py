"""(position, record) pairs of one step -> the arrays of its batch: read, decode, draw what is random about a record."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lumos_jax import config, fileio
from lumos_jax.data import aspect, cached, captions, workers
from lumos_jax.data.decode import UndecodableImage, decode_cover, decode_square, fit_square
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

    def row_of(self, element: Sequence[tuple[int, int]]) -> Row:
        """`row` of this batch, where batches differ; `row` itself is the largest then."""
        return self.row()

    def map(self, element: Sequence[tuple[int, int]]) -> HostBatch:
        batch = new_batch(element, self.row_of(element))
        for row, (position, record) in enumerate(element):
            try:
                loaded = fileio.with_retries(functools.partial(self.load, position, record))
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
class BucketPictures(RecordLoader):
    """Pictures of one aspect bucket a batch: `image` uint8 (B, h, w, 3), and `size` float32 (B, 3), the original height and
    width and the bucket's ratio. assigned: None puts every record into the square bucket."""

    source: Source
    seed: int
    flip: bool
    table: tuple[aspect.Bucket, ...]
    assigned: np.ndarray | None  # (records,), the number of each record's bucket

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
        if self.flip and stream(self.seed, position).random(2)[1] < 0.5:
            pixels = pixels[:, ::-1]
        return {"image": pixels, "size": np.array([*own, bucket.ratio], np.float32)}


@dataclasses.dataclass(frozen=True)
class Captioned(RecordLoader):
    """Pictures and a caption each: `image` and `size` as `pictures` gives them, `caption` (B,) str.

    training: the choice between raw and detailed hangs on the position, not on the record. noise: share of records with
    another's caption. both: no choice is made; the detailed one is `caption_detailed`.
    """

    pictures: Pictures | BucketPictures
    training: bool
    detailed: float
    clean: bool
    noise: float
    both: bool

    @property
    def source(self) -> Source:
        return self.pictures.source

    def row(self) -> Row:
        return self.pictures.row() | self._texts()

    def row_of(self, element: Sequence[tuple[int, int]]) -> Row:
        return self.pictures.row_of(element) | self._texts()

    def _texts(self) -> Row:
        return dict.fromkeys(("caption", "caption_detailed") if self.both else ("caption",), (np.dtype(object), ()))

    def load(self, position: int, record: int) -> dict[str, Any]:
        loaded = self.pictures.load(position, record)
        told = self.source.captions(captions.partner(record, len(self.source), self.noise, self.pictures.seed))
        told = tuple(map(captions.clean, told)) if self.clean else told
        if self.both:
            return loaded | {"caption": told[0], "caption_detailed": told[1]}
        draw = stream(self.pictures.seed, position if self.training else record).random(3)[2]
        return loaded | {"caption": told[captions.choose(told, draw, self.detailed)]}


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
    arrays: Row  # of each record; -1 for a length that differs

    def row(self) -> Row:
        return self.arrays

    def map(self, element: Sequence[tuple[int, int]]) -> HostBatch:
        batch = new_batch(element, self.row())
        for row, (position, number) in enumerate(element):
            try:
                loaded, problem = fileio.with_retries(functools.partial(self.load, position, number))
            except (ValueError, OSError) as error:
                reject(batch, row, f"{self.source.describe(number)}: {str(error)[:_REASON_LENGTH]}")
                continue
            if problem:
                reject(batch, row, problem)
            for name, array in loaded.items():
                batch[name][row] = array
        return batch

    def load(self, position: int, number: int) -> tuple[Mapping[str, np.ndarray], str]:
        """The arrays of one row, and why it has no weight."""
        record = self.read(number)
        return record.arrays, "" if record.weight else record.problem

    def read(self, number: int) -> cached.Record:
        """A record. Raises ValueError or OSError if it is damaged."""
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

    def load(self, position: int, number: int) -> tuple[Mapping[str, np.ndarray], str]:
        record = self.read(number)
        other = captions.partner(number, len(self.source), self.noise, self.seed)
        told = record if other == number else self.read(other)
        lacking = [f"{part.problem}" for part in (record, told) if not part.weight]
        draw = stream(self.seed, position if self.training else number).random(3)[2]
        texts = tuple(cached.to_text(told.arrays[name]) for name in ("caption", "caption_detailed"))
        which = captions.choose(texts, draw, self.detailed)
        feature = told.arrays[("feature", "feature_detailed")[which]]
        loaded = {name: array for name, array in record.arrays.items() if name in ("image", "latent")}
        loaded["caption"] = texts[which]
        if self.several:
            missing = self.length - len(feature)
            loaded["token_mask"] = np.arange(self.length) < len(feature)
            feature = np.pad(feature, ((0, missing), (0, 0)))
        return loaded | {"feature": feature}, "; ".join(lacking)


def new_batch(element: Sequence[tuple[int, int]], row: Row) -> HostBatch:
    """Zeros of weight 1 for these (position, record) pairs."""
    count = len(element)
    batch = {
        name: np.full((count, *shape), "", object) if dtype.hasobject else workers.new_array((count, *shape), dtype)
        for name, (dtype, shape) in row.items()
    }
    return batch | {
        "weight": np.ones(count, np.float32),
        "record": np.array([record for _, record in element], np.int64),
        "problem": np.zeros(count, f"<U{_PROBLEM_LENGTH}"),
    }


def reject(batch: HostBatch, row: int, problem: str) -> None:
    batch["weight"][row] = 0.0
    batch["problem"][row] = problem[-_PROBLEM_LENGTH:]  # the end of a path and the reason say most


def make_loader(
    data: config.Data,
    source: Source,
    *,
    training: bool,
    everything: bool = False,
    assigned: np.ndarray | None = None,
) -> BatchLoader:
    """What makes batches of the records of a source, as config.data.sample_type says.

    Args:
      data: config.data.
      source: as `make_source` gives it.
      training: random crops and mirrors, captions that change from epoch to epoch.
      everything: not for training, but all of a record that training may choose from, as a cache keeps it.
      assigned: with config.data.buckets, (records,) the number of each record's bucket; None takes the square one.

    Raises:
      ValueError: the source has no such records.
    """
    if data.source == "cached":
        return _cached(data, source, training)
    if data.sample_type not in _MAKERS:
        raise ValueError(f"config.data.sample_type={data.sample_type!r} is not one of {', '.join(_MAKERS)}")
    made = _MAKERS[data.sample_type](data, source, training, everything)
    if not data.buckets:
        return made
    table = aspect.make_buckets(data.image_size, data.bucket_step, data.bucket_ratios)
    pictures = BucketPictures(source, data.seed, training and data.flip, table, assigned)
    return dataclasses.replace(made, pictures=pictures)


class _Unopened:
    """In the place of a source of any kind of records, to describe what batches of them hold."""

    captions = label = clip = posed_views = None

    def __init__(self, classes: int):
        self.classes = range(classes)


def describe_row(data: config.Data) -> Row:
    """What batches of config.data hold, decoded from records of any source; none is opened, and caches are passed by."""
    unopened = _Unopened(data.classes)
    return make_loader(dataclasses.replace(data, source="folder"), unopened, training=True).row()


def _cached(data: config.Data, source: Source, training: bool) -> CachedLoader:
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
    length, noise = manifest.made_by["encoder.max_tokens"], data.caption_noise if training else 0.0
    return CachedCaptions(source, arrays, length, data.seed, training, data.detailed_caption_prob, noise)


def _pictures(data: config.Data, source: Source, training: bool, everything: bool = False) -> Pictures:
    return Pictures(source, data.image_size, data.seed, training and data.crop == "random", training and data.flip)


def require(source: Source, method: str, told: str) -> None:
    """Refuses a source, or a part of a mixture, that does not know what a record needs.

    Args:
      source: as `make_source` gives it.
      method: what sources that know it have.
      told: "of which records: {}, what is the matter", to be filled with the name of a record.

    Raises:
      ValueError: it lacks the method.
    """
    for part in getattr(source, "sources", [source]):
        if not hasattr(part, method):
            raise ValueError(f"config.data.sample_type={told.format(part.describe(0))}")


def _captioned(data: config.Data, source: Source, training: bool, everything: bool) -> Captioned:
    require(source, "captions", "captioned: {} ... have no captions. Sources that do are scenes, folder (a.txt beside a.jpg, "
            "or captions.jsonl), webdataset (a.txt or a.json), arrayrecord (tf.train.Example with a feature caption) and tfds "
            "(a text)")  # fmt: skip
    pictures = _pictures(data, source, training)
    noise = data.caption_noise if training else 0.0
    return Captioned(pictures, training, data.detailed_caption_prob, data.clean_captions, noise, everything)


def _labelled(data: config.Data, source: Source, training: bool, everything: bool) -> Labelled:
    require(source, "label", "labeled: {} ... have no labels. Sources that do are scenes, folder (a folder a class) and tfds "
            "(a feature that is a class label)")  # fmt: skip
    if len(source.classes) != data.classes:
        few = ", ".join(map(printable, source.classes[:3]))
        raise ValueError(
            f"config.data.classes={data.classes}, but the source has {len(source.classes)} ({few} ...): set it to that"
        )
    return Labelled(_pictures(data, source, training))


def _clips(data: config.Data, source: Source, training: bool, everything: bool) -> BatchLoader:
    from lumos_jax.data.clips import make_clips

    return make_clips(data, source, training)


def _views(data: config.Data, source: Source, training: bool, everything: bool) -> RecordLoader:
    from lumos_jax.data.views import Views

    require(source, "posed_views", "views: {} ... have no cameras. Sources that do are scenes and objaverse")
    return Views(source, data.image_size, data.seed, training)


# config.data.sample_type -> (config.data, source, training, everything) -> loader.
_MAKERS: Mapping[str, Callable[[config.Data, Source, bool, bool], BatchLoader]] = {
    "image": _pictures,
    "captioned": _captioned,
    "labeled": _labelled,
    "clip": _clips,
    "views": _views,
}
