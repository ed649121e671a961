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
from collections.abc import Sequence

import numpy as np
from tqdm.contrib.concurrent import thread_map

from lumos_jax import fileio
from lumos_jax.data import order
from lumos_jax.data.base import CorruptRecord, Data, Source
from lumos_jax.data.decode import size_of
from lumos_jax.data.files import made_once, system_error

LEAST_AREA = 0.9  # of the square's
PARTS = 16  # steps a side of the square
LEAST_STEP = 4  # pixels: small images, as of the embedded scenes, have few patches
_READERS = 32  # threads that read headers: they mostly wait for the disk
_PROGRESS_FROM = 20_000  # records from which reading headers takes long enough to be reported
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
    """Which bucket's ratio is nearest by |difference|, for ratios (N,) of height over width: int (N,)."""
    return np.abs(np.array([[bucket.ratio] for bucket in buckets]) - ratio).argmin(axis=0)


def square(buckets: Sequence[Bucket]) -> int:
    """Which bucket is the square one."""
    return next(i for i, bucket in enumerate(buckets) if bucket.height == bucket.width)


def table(data: Data) -> tuple[Bucket, ...]:
    """The buckets of config.data."""
    return make_buckets(data.image_size, data.aspect_ratios)


def assign(data: Data, source: Source, batch_size: int) -> np.ndarray:
    """The bucket of each record, that of the nearest ratio: (records,) uint8. One without a readable header is in the square.

    Buckets in which the training records would not fill one batch an epoch are closed: their records go to the nearest of
    the others.
    """
    buckets, sizes = table(data), record_sizes(data, source)
    ratio = np.where((sizes > 0).all(axis=1), sizes[:, 0] / np.maximum(sizes[:, 1], 1), 1.0)
    share = np.bincount(nearest(buckets, ratio), weights=_weights(data, source), minlength=len(buckets))
    kept = [i for i, records in enumerate(share * len(source)) if records >= batch_size or i == square(buckets)]
    return np.array(kept, np.uint8)[nearest([buckets[i] for i in kept], ratio)]


def _weights(data: Data, source: Source) -> np.ndarray:
    """How often each record is drawn; the sum is 1. Held-out records are not."""
    weights = np.ones(len(source))
    weights[order.holdout_records(data, source)] = 0
    if len(source.parts) > 1:
        for part in source.parts:
            own = slice(part.first, part.first + len(part.source))
            weights[own] *= part.weight / weights[own].sum()
    return weights / weights.sum()


class BucketOrder:
    """Which batch of which bucket's order each step takes; see `order.host_steps`. bucket_of: as `assign` gives it."""

    def __init__(self, data: Data, source: Source, bucket_of: np.ndarray, batch_size: int):
        weights = _weights(data, source)
        share = np.bincount(bucket_of, weights=weights)
        used = np.flatnonzero(share)
        self._orders = [_order_of(data, source, np.where(bucket_of == bucket, weights, 0), bucket) for bucket in used]
        batches = np.maximum(np.round(np.count_nonzero(weights) / batch_size * share[used]), 1)
        self._starts = [0, *map(int, np.cumsum(batches))]
        self.steps_per_epoch, self._seed = self._starts[-1], zlib.crc32(f"{data.seed}/buckets".encode())

    def batch_of(self, step: int) -> tuple[order.Order, int]:
        epoch, place = divmod(step, self.steps_per_epoch)
        turn = order.permuted(place, self.steps_per_epoch, (self._seed + epoch) % 2**32)
        bucket = bisect.bisect_right(self._starts, turn) - 1
        begin, end = self._starts[bucket : bucket + 2]
        return self._orders[bucket], epoch * (end - begin) + turn - begin


def _order_of(data: Data, source: Source, weights: np.ndarray, bucket: int) -> order.Order:
    """Position -> record number over all epochs of one bucket; of a mixture, its parts in turns by weight."""
    orders, shares = [], []
    for number, part in enumerate(source.parts):
        records = part.first + np.flatnonzero(weights[part.first : part.first + len(part.source)])
        if len(records):
            records = records.astype(np.uint32)
            orders.append(order.endless(records.__getitem__, len(records), f"{data.seed}/{number}/bucket {bucket}"))
            shares.append(weights[records].sum())
    return order.mixed(orders, shares)


def record_sizes(data: Data, source: Source) -> np.ndarray:
    """Upright (height, width) of every record's image, int32 (records, 2); zeros where there is no readable header."""
    if len(source.parts) > 1:
        return np.concatenate([record_sizes(data, part.source) for part in source.parts])
    known = source.sizes(np.arange(len(source)))
    if known is not None:
        return known.astype(np.int32)
    folder = fileio.cache_directory("sizes")
    kept = folder and folder / f"{source.fingerprint()}.npz"
    return made_once(kept, ["sizes"], lambda: {"sizes": _read_sizes(source)})["sizes"]


def _read_sizes(source: Source) -> np.ndarray:
    def one(index: int) -> tuple[int, int]:
        try:
            with fileio.with_retries(functools.partial(source.open_image, index)) as file:
                return size_of(file)
        except (OSError, CorruptRecord) as error:
            if system_error(error):  # or the record would be in another bucket from now on
                raise
            return 0, 0

    quiet = len(source) < _PROGRESS_FROM
    found = thread_map(one, range(len(source)), max_workers=_READERS, desc="sizes of images", disable=quiet)
    return np.array(found, np.int32).reshape(-1, 2)
