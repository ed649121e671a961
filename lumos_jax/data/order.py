"""Which record stands where: a pure function of (seed, position), with no memory that grows with the data.

Row r of the global batch of step s is record pi(s B + r), pi a seeded permutation of the training records for each epoch (of
each source of a mixture, which are then interleaved by weight). Hosts and workers only choose which rows they read. Held-out
records are the first of a fixed permutation; training permutes the rest.

With config.data.order=block pi permutes blocks of consecutive records instead, see `blocks`.

Permutations are Grain's index shuffle, which needs no memory. It walks through 2^16 numbers to find the next one in range,
which for a folder of 300 files takes longer than reading the file: small ones are sorted random numbers instead.
"""

from __future__ import annotations

import functools
import itertools
import sys
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from lumos_jax.data import blocks
from lumos_jax.data.base import Data, Source

# The held-out choice does not follow config.data.seed: two runs that differ in their order hold out the same records.
_HOLDOUT_SEED = 0x1005

MAX_RECORDS = 2**32 - 1  # Grain's index shuffle works on 32 bits
Order = Callable[[int], int]  # position -> record number, without end
BatchOf = Callable[[int], tuple[Order, int]]  # step -> the order whose batch it takes, and which of them
Steps = Callable[[int], list[tuple[int, int]]]  # number of a step -> the (position, record) pairs of its rows
_SMALL = 1 << 12  # records below which a permutation is a table


def permuted(position: int, count: int, seed: int) -> int:
    """Where the seeded permutation of 0 .. count - 1 takes a position; count at most MAX_RECORDS, seed in [0, 2^32)."""
    if count < _SMALL:
        return int(_table(count, seed)[position])
    from grain.experimental import index_shuffle  # Grain imports JAX, and only training needs it

    return index_shuffle(position, max_index=count - 1, seed=seed, rounds=4)


@functools.lru_cache(maxsize=64)
def _table(count: int, seed: int) -> np.ndarray:
    # The bits of Philox are the same in every version of NumPy; those of its own shuffles need not be.
    return np.argsort(np.random.Philox(key=[seed, count]).random_raw(count), kind="stable")


def holdout_records(data: Data, source: Source) -> list[int]:
    """The `data.holdout` records that no training batch holds; of a mixture, spread over its sources by weight.
    Raises ValueError: there are not more records than that."""
    chosen = []
    for part, count in zip(source.parts, holdout_counts(data, source), strict=True):
        chosen.append([part.first + permuted(i, len(part.source), _HOLDOUT_SEED) for i in range(count)])
    # Taken in turns, so that the first few of them come from all sources.
    return [record for turn in itertools.zip_longest(*chosen) for record in turn if record is not None]


def holdout_counts(data: Data, source: Source) -> list[int]:
    """How many records each part holds out; they add up to `data.holdout`."""
    weights = [part.weight for part in source.parts]
    edges = [round(data.holdout * total / sum(weights)) for total in itertools.accumulate(weights, initial=0.0)]
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


def endless(record: Callable[[int], int], count: int, name: str) -> Order:
    """All epochs of `count` records, each permuted in its own way; `record` gives those of places 0 .. count - 1."""
    return _epochs(lambda place, seed: int(record(permuted(place, count, seed))), count, name)


def _epochs(record: Callable[[int, int], int], count: int, name: str) -> Order:
    seed = zlib.crc32(name.encode())  # a hash, so that epoch 1 of a user's seed 0 is not epoch 0 of seed 1

    def at(position: int) -> int:
        epoch, place = divmod(position, count)
        return record(place, (seed + epoch) % 2**32)

    return at


def training_order(data: Data, source: Source, batch_size: int = 1) -> Order:
    """Position -> record number, of the records that are not held out. batch_size: rows of a global batch, for order=block."""

    def of_part(number: int, first: int, count: int, held: int) -> Order:
        name = f"{data.seed}/{number}"
        return endless(lambda place: first + permuted(held + place, count, _HOLDOUT_SEED), count - held, name)

    held, parts = holdout_counts(data, source), source.parts
    weights = [part.weight for part in parts]
    if data.order == "block":
        rows = [max(1, round(batch_size * weight / sum(weights))) for weight in weights]
        named = zip(training_blocks(data, source), rows, itertools.count(), strict=False)
        return mixed([_block_order(data, *part, count, number) for part, count, number in named], weights)
    return mixed([of_part(i, part.first, len(part.source), held[i]) for i, part in enumerate(parts)], weights)


def training_blocks(data: Data, source: Source) -> list[tuple[int, blocks.Blocks]]:
    """The first record of each source of a mixture, and its records that are not held out in blocks."""
    held = holdout_counts(data, source)
    chosen = [
        [permuted(i, len(part.source), _HOLDOUT_SEED) for i in range(n)]
        for part, n in zip(source.parts, held, strict=True)
    ]
    return [
        (part.first, blocks.Blocks(len(part.source), records, data.block_records))
        for part, records in zip(source.parts, chosen, strict=True)
    ]


def _block_order(data: Data, first: int, own: blocks.Blocks, rows: int, number: int) -> Order:
    place = functools.partial(
        blocks.place_at,
        count=len(own),
        block=data.block_records,
        window=data.block_window,
        rows=rows,
        permuted=permuted,
    )
    return _epochs(lambda at, seed: first + own.record(place(at, seed=seed)), len(own), f"{data.seed}/{number}/blocks")


def mixed(orders: Sequence[Order], weights: Sequence[float]) -> Order:
    """Endless orders as one, interleaved by weight."""
    if len(orders) == 1:
        return orders[0]
    import grain  # imports JAX

    # Grain counts the weights in hundredths of the smallest and cuts off the rest; rounded first, they err by half of one.
    hundredths = [round(100 * weight / min(weights)) for weight in weights]
    return grain.MapDataset.mix(
        [grain.MapDataset.range(sys.maxsize).map(one) for one in orders], hundredths
    ).__getitem__


def host_steps(batch_of: BatchOf, *, batch_size: int, rows: Sequence[int], start_step: int) -> Steps:
    """Steps from `start_step` on -> the (position, record) pairs of the rows that one host reads."""

    def at(index: int) -> list[tuple[int, int]]:
        step = start_step + index
        order, batch = batch_of(step)
        return [(step * batch_size + row, order(batch * batch_size + row)) for row in rows]

    return at
