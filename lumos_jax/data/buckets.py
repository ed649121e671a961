"""Which record trains in which aspect bucket (see `aspect` for the sizes), and in which order the buckets take turns.

    sizes of all records --nearest ratio--> bucket of each record --> for each bucket, seeded permutations of its records
    step s --seeded permutation of an epoch's steps--> (bucket, its k-th batch) --> rows k B + r of the bucket's order

All of it is a function of (seed, step) and of the sizes, so every host sees the same bucket at the same step. Sizes come from
the images' headers, read once and kept in a file under the source's fingerprint.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import sys
import zlib
from concurrent import futures

import grain
import numpy as np
import tqdm

from lumos_jax import config
from lumos_jax.data import aspect, order
from lumos_jax.data.decode import size_of
from lumos_jax.data.sources import MixtureSource, Source

_READERS = 32  # threads that read headers: they mostly wait for the disk
_SAID_FROM = 20_000  # records from which reading headers takes long enough to be reported


def table(data: config.Data) -> tuple[aspect.Bucket, ...]:
    """The buckets of config.data."""
    return aspect.make_buckets(data.image_size, data.bucket_step, data.bucket_ratios)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Attributes:
    buckets: the table.
    bucket_of: (records,) uint8, the number of each record's bucket.
    """

    buckets: tuple[aspect.Bucket, ...]
    bucket_of: np.ndarray


def assign(data: config.Data, source: Source, batch_size: int) -> Assignment:
    """The bucket of each record: the one with the nearest ratio. A record without a readable header goes to the square.

    Buckets in which the training records would not fill one batch an epoch are closed: their records go to the nearest of
    the others.
    """
    buckets = table(data)
    sizes = record_sizes(data, source)
    known = (sizes > 0).all(axis=1)
    ratio = np.where(known, sizes[:, 0] / np.maximum(sizes[:, 1], 1), 1.0)
    share = np.bincount(aspect.nearest(buckets, ratio), weights=_weights(data, source), minlength=len(buckets))
    kept = [i for i, records in enumerate(share * len(source)) if records >= batch_size or i == aspect.square(buckets)]
    nearest = aspect.nearest([buckets[i] for i in kept], ratio)
    return Assignment(buckets, np.array(kept, np.uint8)[nearest])


def _weights(data: config.Data, source: Source) -> np.ndarray:
    """How often each record is drawn; the sum is 1. Held-out records are not."""
    weights = np.ones(len(source))
    weights[order.holdout_records(data, source)] = 0
    if isinstance(source, MixtureSource):
        for number, (part, weight) in enumerate(zip(source.sources, source.weights, strict=True)):
            own = slice(source.start(number), source.start(number) + len(part))
            weights[own] *= weight / weights[own].sum()
    return weights / weights.sum()


class BucketSteps(grain.MapDataset):
    """Step -> the (position, record) pairs of the rows that one host reads, all of one bucket."""

    def __init__(self, data: config.Data, source: Source, assignment: Assignment, *, batch_size: int,
                 rows: tuple[int, ...], start_step: int):  # fmt: skip
        weights = _weights(data, source)
        share = np.bincount(assignment.bucket_of, weights=weights, minlength=len(assignment.buckets))
        used = np.flatnonzero(share)
        super().__init__([_order_of(data, source, assignment, weights, bucket) for bucket in used])
        batches = np.count_nonzero(weights) / batch_size
        self._ends = np.cumsum(np.maximum(np.round(batches * share[used]), 1).astype(np.int64))
        self._batch_size, self._rows, self._start = batch_size, rows, start_step
        self._seed = zlib.crc32(f"{data.seed}/buckets".encode())

    def __len__(self) -> int:
        return sys.maxsize // max(self._batch_size, 1) - self._start - 1

    def __str__(self) -> str:
        return f"BucketSteps(buckets={len(self._parents)}, batch_size={self._batch_size}, rows={len(self._rows)})"

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step = self._start + index
        epoch, place = divmod(step, int(self._ends[-1]))
        turn = order.permuted(place, int(self._ends[-1]), (self._seed + epoch) % 2**32)
        bucket = int(np.searchsorted(self._ends, turn, side="right"))
        begin = int(self._ends[bucket - 1]) if bucket else 0
        batch = epoch * (int(self._ends[bucket]) - begin) + turn - begin
        first, inner = step * self._batch_size, batch * self._batch_size
        return [(first + row, int(self._parents[bucket][inner + row])) for row in self._rows]


def _order_of(data, source, assignment: Assignment, weights: np.ndarray, bucket: int) -> grain.MapDataset:
    """Position -> record number over all epochs of one bucket; of a mixture, its parts in turns by weight."""
    chosen = (assignment.bucket_of == bucket) & (weights > 0)
    parts = source.sources if isinstance(source, MixtureSource) else [source]
    orders, shares, start = [], [], 0
    for number, part in enumerate(parts):
        records = start + np.flatnonzero(chosen[start : start + len(part)])
        if len(records):
            seed = zlib.crc32(f"{data.seed}/{number}/bucket {bucket}".encode())
            orders.append(_Among(records.astype(np.uint32), seed))
            shares.append(weights[records].sum())
        start += len(part)
    return order.mixed(orders, shares)


class _Among(grain.MapDataset):
    """Position -> one of the records given, over all epochs."""

    def __init__(self, records: np.ndarray, seed: int):
        super().__init__()
        self._records, self._seed = records, seed

    def __len__(self) -> int:
        return sys.maxsize

    def __str__(self) -> str:
        return f"_Among({len(self._records)} records)"

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self._records))
        return int(self._records[order.permuted(place, len(self._records), (self._seed + epoch) % 2**32)])


def record_sizes(data: config.Data, source: Source) -> np.ndarray:
    """Upright (height, width) of every record's picture, int32 (records, 2); zeros where there is no readable header."""
    if isinstance(source, MixtureSource):
        return np.concatenate([record_sizes(data, part) for part in source.sources])
    if hasattr(source, "sizes"):
        return source.sizes(np.arange(len(source))).astype(np.int32)
    if not data.bucket_index:
        return _read_sizes(source)
    kept = pathlib.Path(data.bucket_index).expanduser() / f"{source.fingerprint()}.npy"
    if kept.exists():
        sizes = np.load(kept)
        if sizes.shape != (len(source), 2):
            raise ValueError(f"{kept} does not hold the sizes of {len(source)} pictures: remove it")
        return sizes
    sizes = _read_sizes(source)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_name(f".{kept.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.save(file, sizes)
    partial.replace(kept)
    return sizes


def _read_sizes(source: Source) -> np.ndarray:
    def one(index: int) -> tuple[int, int]:
        try:
            return size_of(source.file(index) if hasattr(source, "file") else io.BytesIO(source.read(index)))
        except OSError:
            return 0, 0

    with futures.ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(one, range(len(source)))
        found = tqdm.tqdm(found, "sizes of pictures", len(source), disable=len(source) < _SAID_FROM)
        return np.fromiter((side for size in found for side in size), np.int32, 2 * len(source)).reshape(-1, 2)
