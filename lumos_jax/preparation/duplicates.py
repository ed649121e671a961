"""Duplicates among rows of 64-bit perceptual hashes: every pair within a Hamming distance, and which row of a group is kept.

Pairs are found by bands. Of 64 bits in k + e blocks, two hashes at distance <= k agree in at least e blocks. Each choice of e
blocks is a table: hashes are sorted by the bits of those blocks, and only those that agree in all of them are compared. k = 2
and e = 1 makes 3 tables of 21 bits, k = 4 and e = 2 makes 15 of 21. Every table set finds every pair; the cheapest for the
number of hashes is taken. Blocks are interleaved, as neighboring bits of a pHash are the most alike from image to image.

A row is dropped if, and only if, a row that is kept lies within the distance and ranks above it. So a chain of images, each
close to the next, does not collapse into one: what is dropped is close to what was kept for it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

MAX_DISTANCE = 8  # 3.5e7 pairs of 500M random hashes are that close; of distance 4, 4,600
_BLOCK = 1 << 15  # hashes that are compared at a time; they stay in the processor's cache
_LARGE = 1 << 15  # hashes that agree in a table, above which they are compared by tables of their other bits
_SORT, _COMPARE = 1.5e-7, 1.4e-9  # seconds to bring a hash into a table, and to compare a pair; only their ratio counts


class Table(NamedTuple):
    """order: the 64 bits (0: least significant), those of the table first. bits: how many those are."""

    order: tuple[int, ...]
    bits: int

    @property
    def mask(self) -> int:
        return sum(1 << bit for bit in self.order[: self.bits])


def tables(distance: int, count: int, positions: Sequence[int] = range(64)) -> list[Table]:
    """The cheapest tables that find all pairs of `count` hashes within the distance by their bits at `positions`."""

    def cost(equal: int) -> float:
        number, bits = math.comb(distance + equal, equal), equal * len(positions) // (distance + equal)
        return number * count * (_SORT + _COMPARE * count / 2 ** (bits + 1))

    return table_set(distance, min((1, 2, 3), key=cost), positions)


def table_set(distance: int, equal: int, positions: Sequence[int] = range(64)) -> list[Table]:
    """A table for each choice of `equal` of distance + equal blocks of bits."""
    blocks, made = distance + equal, []
    for chosen in itertools.combinations(range(blocks), equal):
        band = [bit for block in chosen for bit in positions[block::blocks]]
        made.append(Table((*band, *(bit for bit in range(64) if bit not in set(band))), len(band)))
    return made


def rearranged(hashes: np.ndarray, table: Table) -> np.ndarray:
    """Hashes (N,) uint64 with the bits of a table as the most significant ones; `restored` is its inverse."""
    return _permuted(hashes, tuple(63 - table.order.index(bit) for bit in range(64)))


def restored(words: np.ndarray, table: Table) -> np.ndarray:
    return _permuted(words, table.order[::-1])


def _permuted(values: np.ndarray, places: tuple[int, ...]) -> np.ndarray:
    """Bit b of each value moved to places[b]."""
    moved, result = _moved_bytes(places), np.empty(len(values), np.uint64)
    for first in range(0, len(values), _BLOCK):
        octets = np.ascontiguousarray(values[first : first + _BLOCK], "<u8").view(np.uint8).reshape(-1, 8)
        result[first : first + _BLOCK] = moved[0].take(octets[:, 0])
        for byte in range(1, 8):
            result[first : first + _BLOCK] |= moved[byte].take(octets[:, byte])
    return result


@functools.cache
def _moved_bytes(places: tuple[int, ...]) -> np.ndarray:
    """(8, 256) uint64: what each byte of a value becomes."""
    every, moved = np.arange(256, dtype=np.uint64), np.zeros((8, 256), np.uint64)
    for bit, place in enumerate(places):
        moved[bit // 8] |= (every >> np.uint64(bit % 8) & np.uint64(1)) << np.uint64(place)
    return moved


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of different hashes within a Hamming distance: (P, 2) uint64 of (N,), the smaller first, ascending."""
    pairs = np.concatenate([np.zeros((0, 2), np.uint64), *_by_tables(hashes, distance, range(64), _LARGE)])
    return pairs[np.lexsort(pairs.T[::-1])]


def _by_tables(hashes: np.ndarray, distance: int, positions: Sequence[int], large: int) -> list[np.ndarray]:
    plan = tables(distance, len(hashes), positions) if distance > 0 else []
    words = (np.sort(rearranged(hashes, table)) for table in plan)
    return [pairs_of_table(sorted_words, plan, i, distance, large) for i, sorted_words in enumerate(words)]


def pairs_of_table(
    words: np.ndarray, plan: Sequence[Table], number: int, distance: int, large: int = _LARGE
) -> np.ndarray:
    """The pairs (P, 2) of hashes that agree in table `number` of the plan and in none before it.

    words: (N,) hashes as `rearranged` for that table, different and ascending: all that agree in it, of some or of all values.
    """
    found = [np.zeros((0, 2), np.uint64), *_close(words, plan[number].bits, distance, large)]
    pairs = restored(np.concatenate(found).ravel(), plan[number]).reshape(-1, 2)
    differing, seen = pairs[:, 0] ^ pairs[:, 1], np.zeros(len(pairs), bool)
    for earlier in plan[:number]:
        seen |= differing & np.uint64(earlier.mask) == 0
    return np.sort(pairs[~seen], axis=1)


def _close(words: np.ndarray, bits: int, distance: int, large: int) -> Iterator[np.ndarray]:
    """Pairs (n, 2) within the distance, of words that agree in their first bits."""
    if not len(words):
        return
    changes = np.flatnonzero((words[1:] ^ words[:-1]) >> np.uint64(64 - bits)) + 1
    starts = np.concatenate([[0], changes])
    sizes = np.diff(np.concatenate([starts, [len(words)]]))
    by_size = np.argsort(sizes, kind="stable")
    sizes = sizes[by_size]
    for size in np.unique(sizes[sizes > 1]):
        first, last = np.searchsorted(sizes, [size, size + 1])
        if size > large:
            for start in starts[by_size[first:last]]:  # once: hashes that are alike throughout agree in all tables
                yield from _by_tables(words[start : start + size], distance, range(64 - bits), len(words))
            continue
        width = max(1, _BLOCK // int(size))
        for begin in range(first, last, width):
            # One column for each run of equal bits, so that all runs of a size are compared at a time.
            columns = starts[by_size[begin : min(begin + width, last)]]
            matrix = words[columns[None, :] + np.arange(size)[:, None]]
            for step in range(1, size):
                near = np.bitwise_count(matrix[step:] ^ matrix[:-step]) <= distance
                if near.any():
                    row, column = np.nonzero(near)
                    yield np.stack([matrix[row, column], matrix[row + step, column]], 1)


def equal_rows(keys: Sequence[np.ndarray], ranks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows that equal another one in all keys: (rows, the row of each group that ranks first), for all but those.

    Args:
      keys: (N,) each.
      ranks: (N,) each; lower is preferred, the first decides first. No two rows have all of them equal.
    """
    order = np.argsort(keys[0])
    ordered = keys[0][order]
    same = np.concatenate([[False], ordered[1:] == ordered[:-1]]) if len(order) else np.zeros(0, bool)
    rows = order[same | np.concatenate([same[1:], [False]])] if len(order) else order
    rows = rows[np.lexsort([a[rows] for a in (*keys, *ranks)[::-1]])]
    begins = np.ones(len(rows), bool)
    for key in keys:
        values = key[rows]
        differs = values[1:] != values[:-1]
        begins[1:] = differs if key is keys[0] else begins[1:] | differs
    first = np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))
    return rows[~begins], rows[first[~begins]]


def keepers(better: np.ndarray, worse: np.ndarray, count: int) -> np.ndarray:
    """For each of `count` nodes, numbered by rank: the lowest kept node that it is close to, or -1 if it is kept itself.

    better, worse: (P,) the ends of each pair, better < worse.
    """
    assert (better < worse).all()
    dropped = np.zeros(count, bool)
    left, right = better, worse
    while len(left):  # as often as the longest chain of decisions is long
        waiting = np.zeros(count, bool)
        waiting[right] = True
        dropped[right[~waiting[left]]] = True  # what no undecided node ranks above is kept, and drops its neighbors
        undecided = waiting[left] & ~dropped[left] & ~dropped[right]
        left, right = left[undecided], right[undecided]
    keeper, kept = np.full(count, count, np.int64), ~dropped[better]
    np.minimum.at(keeper, worse[kept], better[kept])
    return np.where(keeper == count, -1, keeper)
