"""Aspect buckets: images of many shapes train in batches of one size each.

Sides are multiples of a step, and the area is that of a square of `base` pixels a side, less ten percent at most. At base / 16
these are the 40 sizes of PixArt's tables for 256, 512 and 1024 pixels.

    sizes of all records --nearest ratio--> bucket of each record --> for each bucket, seeded permutations of its records
    step s --seeded permutation of an epoch's steps--> (bucket, its k-th batch) --> rows k B + r of the bucket's order

All of it is a function of (seed, step) and of the sizes, so every host sees the same bucket at the same step. Sizes come from
the images' headers, read once and kept in a file under the source's fingerprint.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import numpy as np

from lumos_jax import fileio, progress
from lumos_jax.data import order
from lumos_jax.data.arrays import ArrayFile, kept_once
from lumos_jax.data.base import CorruptRecord, Data, Source, digest
from lumos_jax.data.decode import size_of
from lumos_jax.data.files import system_error

LEAST_AREA = 0.9  # of the square's
PARTS = 16  # steps a side of the square
LEAST_STEP = 4  # pixels: small images, as of the embedded scenes, have few patches
_READERS = 32  # threads that read headers: they mostly wait for the disk
_KEPT_FROM = 1 << 20  # records from which buckets are kept in a file
_CHUNK = 1 << 12  # records
_VERSION = 1  # of that file
_LEFT_OUT = (21, 11)  # (height, width) in steps of base / 16 that the rule allows and PixArt's tables do not have


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Height and width in pixels; `ratio` is their quotient to two decimals, as PixArt compares and embeds it."""

    height: int
    width: int

    @property
    def ratio(self) -> float:
        return round(self.height / self.width, 2)


@functools.cache
def make_buckets(base: int, ratios: tuple[float, float] = (0.25, 4.0)) -> tuple[Bucket, ...]:
    """The buckets around base x base pixels, by rising ratio: sides are multiples of base / 16, and of 4 px at least.

    ratios: smallest and largest height over width.
    Raises ValueError: no such multiple is the base.
    """
    step = max(base // PARTS, LEAST_STEP)
    if base % step:
        raise ValueError(
            f"config.data.image_size={base} has no buckets of other shapes: it is no multiple of {step} px"
        )
    side, found = base // step, []
    for height in range(1, side * side + 1):
        for width in range(1, side * side // height + 1):
            allowed = height * width > LEAST_AREA * side * side and ratios[0] <= height / width <= ratios[1]
            if allowed and not (side == PARTS and (height, width) == _LEFT_OUT):
                found.append(Bucket(height * step, width * step))
    return tuple(sorted(found, key=lambda bucket: bucket.height / bucket.width))


def nearest(buckets: Sequence[Bucket], ratio: np.ndarray) -> np.ndarray:
    """Which bucket's ratio is nearest by |difference|, for ratios (N,) of height over width: int (N,). Of two, the first."""
    values, first = np.unique([bucket.ratio for bucket in buckets], return_index=True)
    above = np.minimum(np.searchsorted(values, ratio), len(values) - 1)
    below = np.maximum(above - 1, 0)
    return first[np.where(np.abs(values[below] - ratio) <= np.abs(values[above] - ratio), below, above)]


def square(buckets: Sequence[Bucket]) -> int:
    """Which bucket is the square one."""
    return next(i for i, bucket in enumerate(buckets) if bucket.height == bucket.width)


def table(data: Data) -> tuple[Bucket, ...]:
    """The buckets of config.data."""
    return make_buckets(data.image_size, data.aspect_ratios)


def assign(data: Data, source: Source, batch_size: int) -> np.ndarray | ArrayFile:
    """The bucket of each record, that of the nearest ratio: (records,) uint8. One without a readable header is in the square.

    Buckets in which the training records would not fill one batch an epoch are closed: their records go to the nearest of
    the others. Of many records, it is kept in a file under the source's fingerprint.
    """
    buckets, count = table(data), len(source)
    about = [source.fingerprint(), data.image_size, data.aspect_ratios, data.holdout, batch_size, _VERSION]
    folder = fileio.cache_directory("buckets") if count >= _KEPT_FROM else None
    dtype = np.min_scalar_type(len(buckets) - 1)
    return kept_once(
        folder and folder / f"{digest(about)}.npy",
        (count,),
        dtype,
        lambda: _assigned(data, source, batch_size, buckets, dtype),
    )


def _assigned(
    data: Data, source: Source, batch_size: int, buckets: Sequence[Bucket], dtype: np.dtype
) -> Iterator[np.ndarray]:
    sizes = [record_sizes(part.source) for part in source.parts]

    def ratios(number: int, begin: int, end: int) -> np.ndarray:
        height, width = sizes[number](begin, end).astype(np.float64).T
        return np.where((height > 0) & (width > 0), height / np.maximum(width, 1), 1.0)

    pieces = [(i, *piece) for i, part in enumerate(source.parts) for piece in _pieces(len(part.source))]
    with futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda piece: nearest(buckets, ratios(*piece)).astype(dtype), pieces))
    starts = [source.parts[number].first + begin for number, begin, _ in pieces]
    weights = Weights(data, source)
    counts = np.zeros((len(source.parts), len(buckets)), np.int64)
    for (number, begin, end), start, piece in zip(pieces, starts, found, strict=True):
        counts[number] += np.bincount(
            np.delete(piece, weights.held_within(start, start + end - begin)), minlength=len(buckets)
        )
    kept = weights.share(counts) * len(source) >= batch_size
    kept[square(buckets)] = True
    numbers = np.flatnonzero(kept)
    for piece, own in zip(pieces, found, strict=True):
        closed = ~kept[own]
        if closed.any():
            others = nearest([buckets[i] for i in numbers], ratios(*piece)[closed])
            own[closed] = numbers[others]
        yield own


def _pieces(count: int, size: int = 1 << 20) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + size, count)) for begin in range(0, count, size))


class Weights:
    """How often each record is drawn; the sum is 1. Those of one source of a mixture weigh the same, held-out ones nothing.

    Sums over records are rounded as by adding the weights of all records up, which older versions did: what is rounded from
    them, and so the order of a run, is the same.
    """

    def __init__(self, data: Data, source: Source):
        self.parts, self.held = source.parts, np.sort(np.array(order.holdout_records(data, source), np.int64))
        self.training = len(source) - len(self.held)
        ends = [part.first + len(part.source) for part in self.parts]
        self._each, total = [1.0] * len(self.parts), float(self.training)
        if len(self.parts) > 1:
            training = [
                end - part.first - len(self.held_within(part.first, end))
                for part, end in zip(self.parts, ends, strict=True)
            ]
            self._each = [part.weight / count for part, count in zip(self.parts, training, strict=True)]
            total = _sum(self._of_records, 0, len(source))
        self._each = [weight / total for weight in self._each]

    def held_within(self, begin: int, end: int) -> np.ndarray:
        """The held-out records of begin .. end - 1, counted from `begin`."""
        first, last = np.searchsorted(self.held, (begin, end))
        return self.held[first:last] - begin

    def share(self, counts: np.ndarray) -> np.ndarray:
        """The weight of (sources, buckets) numbers of training records: (buckets,)."""
        return np.array([self._added(bucket) for bucket in counts.T])

    def sum(self, number: int, count: int) -> float:
        """The weight of `count` training records of a source."""
        return _sum(lambda begin, end: np.full(end - begin, self._each[number]), 0, count)

    def _added(self, counts: Sequence[int]) -> float:
        total = 0.0
        for weight, count in zip(self._each, counts, strict=True):
            for begin, end in _pieces(int(count)):
                total = np.cumsum(np.append(total, np.full(end - begin, weight)))[-1]
        return total

    def _of_records(self, begin: int, end: int) -> np.ndarray:
        bounds = [min(max(part.first, begin), end) - begin for part in self.parts] + [end - begin]
        weights = np.repeat(self._each, np.diff(bounds))
        weights[self.held_within(begin, end)] = 0
        return weights


def _sum(values: Callable[[int, int], np.ndarray], begin: int, end: int) -> float:
    """values(begin, end).sum() without such a large array: NumPy adds halves up, of multiples of 8, and these in turn."""
    count = end - begin
    if count <= 1 << 20:
        return values(begin, end).sum()
    middle = begin + count // 2 - count // 2 % 8
    return _sum(values, begin, middle) + _sum(values, middle, end)


class BucketOrder:
    """Which batch of which bucket's order each step takes; see `order.host_steps`. bucket_of: as `assign` gives it."""

    def __init__(self, data: Data, source: Source, bucket_of: np.ndarray | ArrayFile, batch_size: int):
        weights = Weights(data, source)
        members = [Members(bucket_of, part.first, len(part.source), len(table(data)), weights) for part in source.parts]
        counts = np.array([one.counts for one in members])
        share = weights.share(counts)
        used = np.flatnonzero(share)

        def order_of(bucket: int) -> order.Order:
            """Position -> record number over all epochs of one bucket; of a mixture, its parts in turns by weight."""
            there = np.flatnonzero(counts[:, bucket])
            orders = [
                order.endless(
                    functools.partial(members[i].record, bucket),
                    int(counts[i, bucket]),
                    f"{data.seed}/{i}/bucket {bucket}",
                )
                for i in there
            ]
            return order.mixed(orders, [weights.sum(i, int(counts[i, bucket])) for i in there])

        self._orders = [order_of(int(bucket)) for bucket in used]
        batches = np.maximum(np.round(weights.training / batch_size * share[used]), 1)
        self._starts = [0, *map(int, np.cumsum(batches))]
        self.steps_per_epoch, self._seed = self._starts[-1], zlib.crc32(f"{data.seed}/buckets".encode())

    def batch_of(self, step: int) -> tuple[order.Order, int]:
        epoch, place = divmod(step, self.steps_per_epoch)
        turn = order.permuted(place, self.steps_per_epoch, (self._seed + epoch) % 2**32)
        bucket = bisect.bisect_right(self._starts, turn) - 1
        begin, end = self._starts[bucket : bucket + 2]
        return self._orders[bucket], epoch * (end - begin) + turn - begin


class Members:
    """The training records of each bucket in a source, found by their counts in every `_CHUNK` records: 40 bytes a thousand."""

    def __init__(self, bucket_of: np.ndarray | ArrayFile, first: int, count: int, buckets: int, weights: Weights):
        self._bucket_of, self._first, self._end, self._weights = bucket_of, first, first + count, weights
        found = [np.zeros((1, buckets), np.int64)]
        for begin, end in _pieces(count):
            own = (
                np.array(bucket_of[first + begin : first + end], np.int64) + np.arange(end - begin) // _CHUNK * buckets
            )
            own = np.delete(own, weights.held_within(first + begin, first + end))
            chunks = -(-(end - begin) // _CHUNK)
            found.append(np.bincount(own, minlength=chunks * buckets).reshape(chunks, buckets))
        self._before = np.ascontiguousarray(np.cumsum(np.concatenate(found), axis=0).T.astype(np.uint32))
        self.counts = self._before[:, -1].astype(np.int64)

    def record(self, bucket: int, place: int) -> int:
        """The training record that stands at a place among those of a bucket."""
        chunk = int(np.searchsorted(self._before[bucket], np.uint32(place), "right")) - 1
        begin = self._first + chunk * _CHUNK
        end = min(begin + _CHUNK, self._end)
        own = np.equal(self._bucket_of[begin:end], bucket)
        own[self._weights.held_within(begin, end)] = False
        return begin + int(np.flatnonzero(own)[place - int(self._before[bucket, chunk])])


def record_sizes(source: Source) -> Callable[[int, int], np.ndarray]:
    """begin, end -> upright (height, width) of these records' images, int (end - begin, 2); zeros where there is no readable
    header. The source knows them, or headers are read, once, and kept."""
    if source.sizes(np.arange(min(1, len(source)))) is not None:
        return lambda begin, end: source.sizes(np.arange(begin, end))
    folder = fileio.cache_directory("sizes")
    file = folder and folder / f"{source.fingerprint()}.npy"
    found = kept_once(file, (len(source), 2), np.dtype(np.int32), lambda: _read_sizes(source))
    return lambda begin, end: found[begin:end]


def _read_sizes(source: Source) -> Iterator[np.ndarray]:
    def one(index: int) -> tuple[int, int]:
        try:
            with fileio.with_retries(functools.partial(source.open_image, index)) as file:
                return size_of(file)
        except (OSError, CorruptRecord) as error:
            if system_error(error):  # or the record would be in another bucket from now on
                raise
            return 0, 0

    with (
        futures.ThreadPoolExecutor(_READERS) as pool,
        progress.bar(description="sizes of images", total=len(source), unit="image") as bar,
    ):
        for begin, end in _pieces(len(source), 1 << 14):
            yield np.array(list(pool.map(one, range(begin, end))), np.int32).reshape(-1, 2)
            bar.update(end - begin)
