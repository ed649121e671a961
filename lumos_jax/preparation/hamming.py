"""All pairs of 64-bit perceptual hashes within a Hamming distance.

Pairs are found by bands. Of 64 bits in k + e blocks, two hashes at distance <= k agree in at least e blocks. Each choice of e
blocks is a table: hashes are sorted by the bits of those blocks, and only those that agree in all of them are compared. k = 2
and e = 1 makes 3 tables of 21 bits, k = 4 and e = 2 makes 15 of 21. Every table set finds every pair; the cheapest for the
number of hashes is taken. Blocks are interleaved, as neighboring bits of a pHash are the most alike from image to image.

There are more hashes than a process holds. For each table, every file of hashes is rearranged and sorted; then each range of
its values is gathered from all files and compared. A range never splits what agrees in a table, and holds about ROWS hashes, so
that a process needs some 12 bytes x ROWS for hashes beside what it compares. Files and ranges do not change the pairs.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lumos_jax.preparation import engines

ROWS = 8_000_000  # hashes of a range
_SAMPLE = 4096  # of each part, for ranges of equal size where values are not uniform
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


def _by_tables(hashes: np.ndarray, distance: int, positions: Sequence[int], large: int) -> list[np.ndarray]:
    """Pairs (n, 2) of hashes in memory, by tables of their bits at `positions`."""
    plan = tables(distance, len(hashes), positions)
    words = (np.sort(rearranged(hashes, table)) for table in plan)
    return [pairs_of_table(sorted_words, plan, i, distance, large) for i, sorted_words in enumerate(words)]


def pairs_of_table(
    words: np.ndarray, plan: Sequence[Table], number: int, distance: int, large: int | None = None
) -> np.ndarray:
    """The pairs (P, 2) of hashes that agree in table `number` of the plan and in none before it.

    words: (N,) hashes as `rearranged` for that table, different and ascending: all that agree in it, of some or of all values.
    """
    found = [
        np.zeros((0, 2), np.uint64),
        *_close(words, plan[number].bits, distance, _LARGE if large is None else large),
    ]
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


def near_pairs(parts: Sequence[str], distance: int, scratch: str, run: engines.Run, rows: int = ROWS) -> np.ndarray:
    """All pairs (P, 2) uint64 within a distance of 1 or more, the smaller first, in no order.

    Args:
      parts: .npy files of (n,) uint64, all hashes different.
      scratch: a local directory that is empty, and is left empty; 8 bytes a hash.
      run: runs the steps, in this process or in others.
      rows: hashes of a range.
    """
    count = sum(len(np.load(part, mmap_mode="r")) for part in parts)
    plan, found = tables(distance, count), [np.zeros((0, 2), np.uint64)]
    for number, table in enumerate(plan):
        names = [os.path.join(scratch, f"table-{i:05d}.npy") for i in range(len(parts))]
        samples = list(run(_sort_part, [(*both, table) for both in zip(parts, names, strict=True)]))
        edges = _edges(np.sort(np.concatenate(samples)), -(-count // rows), table.bits)
        jobs = [(names, low, high, plan, number, distance) for low, high in zip(edges, [*edges[1:], None], strict=True)]
        found += run(_compare_range, jobs)
        for name in names:
            pathlib.Path(name).unlink()
    return np.concatenate(found)


def _sort_part(part: str, name: str, table: Table) -> np.ndarray:
    """Writes the sorted words of a part and returns a sample of them."""
    words = rearranged(np.load(part), table)
    words.sort()
    np.save(name, words)
    return words[:: max(1, len(words) // _SAMPLE)]


def _edges(sample: np.ndarray, ranges: int, bits: int) -> list[int]:
    """The least value of each range, at most `ranges` of them; all differ in their first `bits` bits."""
    chosen = sample[np.arange(1, ranges) * len(sample) // ranges] >> np.uint64(64 - bits) << np.uint64(64 - bits)
    return [0, *(int(edge) for edge in np.unique(chosen) if edge)]


def _compare_range(
    names: Sequence[str], low: int, high: int | None, plan: Sequence[Table], number: int, distance: int
) -> np.ndarray:
    slices = []
    for name in names:
        words = np.load(name, mmap_mode="r")
        first = np.searchsorted(words, np.uint64(low))
        last = len(words) if high is None else np.searchsorted(words, np.uint64(high))
        slices.append(words[first:last])
    words = np.concatenate(slices)
    words.sort()
    return pairs_of_table(words, plan, number, distance)
