"""Which record stands where: a pure function of (seed, position), with no memory that grows with the data.

Row r of the global batch of step s is record pi(s B + r), pi a seeded permutation of the training records for each epoch (of
each source of a mixture, which are then interleaved by weight). Hosts and workers only choose which rows they read. Held-out
records are the first of a fixed permutation; training permutes the rest.

Permutations are Grain's index shuffle, which needs no memory. It walks through 2^16 numbers to find the next one in range,
which for a folder of 300 files takes longer than reading the file: small ones are sorted random numbers instead.
"""

from __future__ import annotations

import functools
import itertools
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from lumos_jax.data.base import Data, Source

# The held-out choice does not follow config.data.seed: two runs that differ in their order hold out the same records.
_HOLDOUT_SEED = 0x1005

MAX_RECORDS = 2**32 - 1  # Grain's index shuffle works on 32 bits


_SMALL = 1 << 12  # records below which a permutation is a table


def permuted(position: int, count: int, seed: int) -> int:
    """Where the seeded permutation of 0 .. count - 1 takes a position; count at most MAX_RECORDS, seed in [0, 2^32)."""
    if count < _SMALL:
        return int(_table(count, seed)[position])
    return _index_shuffle()(position, max_index=count - 1, seed=seed, rounds=4)


@functools.cache
def _index_shuffle() -> Callable:
    from grain.experimental import index_shuffle  # Grain imports JAX, and only training needs it

    return index_shuffle


@functools.lru_cache(maxsize=64)
def _table(count: int, seed: int) -> np.ndarray:
    # The bits of Philox are the same in every version of NumPy; those of its own shuffles need not be.
    return np.argsort(np.random.Philox(key=[seed, count]).random_raw(count), kind="stable")


def holdout_records(data: Data, source: Source) -> list[int]:
    """The `data.holdout` records that no training batch holds; of a mixture, spread over its sources by weight.

    Raises:
      ValueError: there are not more records than that.
    """
    chosen = []
    for part, count in zip(source.parts, holdout_counts(data, source), strict=True):
        chosen.append([part.first + permuted(i, len(part.source), _HOLDOUT_SEED) for i in range(count)])
    # Taken in turns, so that the first few of them come from all sources.
    longest = max(map(len, chosen))
    return [column[i] for i in range(longest) for column in chosen if i < len(column)]


def holdout_counts(data: Data, source: Source) -> list[int]:
    """How many records each part holds out; they add up to `data.holdout`."""
    weights = [part.weight for part in source.parts]
    edges, total, whole = [0], 0.0, sum(weights)
    for weight in weights:
        total += weight
        edges.append(round(data.holdout * total / whole))
    counts = [after - before for before, after in itertools.pairwise(edges)]  # rounded, and exact in their sum
    for (_, part, _), count in zip(source.parts, counts, strict=True):
        if len(part) > MAX_RECORDS:
            raise ValueError(f"{len(part)} records are more than the {MAX_RECORDS} that can be put in order")
        if count >= len(part):
            raise ValueError(
                f"config.data.holdout={data.holdout} leaves nothing to train on: {part.describe(0)} ... has {len(part)} "
                "records. Lower data.holdout (and eval.num_examples, eval.sheet), or set eval.every=0"
            )
    return counts


class Order(Protocol):
    """Position -> record number."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> int: ...


def training_order(data: Data, source: Source) -> Order:
    """Position -> record number, without end."""
    orders = [
        PartOrder(len(part), held, first=first, seed=zlib.crc32(f"{data.seed}/{number}".encode()))
        for number, ((first, part, _), held) in enumerate(zip(source.parts, holdout_counts(data, source), strict=True))
    ]
    return mixed(orders, [part.weight for part in source.parts])


def mixed(orders: Sequence[Order], weights: Sequence[float]) -> Order:
    """Endless orders as one, interleaved by weight."""
    if len(orders) == 1:
        return orders[0]
    import grain  # imports JAX

    # Grain counts the weights in hundredths of the smallest and cuts off the rest; rounded first, they err by half of one.
    least = min(weights)
    return grain.MapDataset.mix(
        [grain.MapDataset.source(order) for order in orders], [round(100 * weight / least) for weight in weights]
    )


class Endless:
    def __len__(self) -> int:
        return sys.maxsize


class PartOrder(Endless):
    """Position -> record number, over all epochs of one source."""

    def __init__(self, count: int, held: int, *, first: int, seed: int):
        self._count, self._held, self._first, self._seed = count, held, first, seed

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._count - self._held)
        # The seed is a hash of the user's, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        kept = permuted(place, self._count - self._held, (self._seed + epoch) % 2**32)
        return self._first + permuted(self._held + kept, self._count, _HOLDOUT_SEED)


class HostSteps:
    """Step -> the (position, record) pairs of the rows that one host reads."""

    def __init__(self, order: Order, *, batch_size: int, rows: tuple[int, ...], start_step: int):
        self._order, self._batch_size, self._rows, self._start = order, batch_size, rows, start_step

    def __len__(self) -> int:
        return sys.maxsize // max(self._batch_size, 1) - self._start - 1

    def __getitem__(self, index: int) -> list[tuple[int, int]]:
        first = (self._start + index) * self._batch_size
        positions = [first + row for row in self._rows]
        return [(position, int(self._order[position])) for position in positions]


class Listed:
    """Step -> (0, record) pairs of a batch that is given."""

    def __init__(self, batches: Sequence[Sequence[int]]):
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> list[tuple[int, int]]:
        return [(0, record) for record in self._batches[index]]
