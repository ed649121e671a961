"""Near pairs among more hashes than a process holds: tables are sorted part by part into files, then compared by ranges.

For each table (duplicates.py) every part of the hashes is rearranged and sorted; then each range of its values is gathered from
all parts and compared. A range never splits what agrees in a table, and holds about ROWS hashes, so that a process needs some
12 bytes x ROWS for hashes beside what it compares. Which parts and ranges there are changes nothing about the pairs.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from lumos_jax.preparation import duplicates, local

ROWS = 8_000_000  # hashes of a range
_SAMPLE = 4096  # of each part, for ranges of equal size where values are not uniform


def find(parts: Sequence[str], distance: int, scratch: str, run: local.Run, rows: int = ROWS) -> np.ndarray:
    """All pairs (P, 2) uint64 within a distance of 1 or more, the smaller first, in no order.

    Args:
      parts: .npy files of (n,) uint64, all hashes different.
      scratch: a local directory that is empty, and is left empty; 8 bytes a hash.
      run: runs the steps, in this process or in others.
      rows: hashes of a range.
    """
    count = sum(len(np.load(part, mmap_mode="r")) for part in parts)
    plan, found = duplicates.tables(distance, count), [np.zeros((0, 2), np.uint64)]
    for number, table in enumerate(plan):
        names = [os.path.join(scratch, f"table-{i:05d}.npy") for i in range(len(parts))]
        samples = list(run(_sort_part, [(*both, table) for both in zip(parts, names, strict=True)]))
        edges = _edges(np.sort(np.concatenate(samples)), -(-count // rows), table.bits)
        jobs = [(names, low, high, plan, number, distance) for low, high in zip(edges, [*edges[1:], None], strict=True)]
        found += run(_compare_range, jobs)
        for name in names:
            pathlib.Path(name).unlink()
    return np.concatenate(found)


def _sort_part(part: str, name: str, table: duplicates.Table) -> np.ndarray:
    """Writes the sorted words of a part and returns a sample of them."""
    words = duplicates.rearranged(np.load(part), table)
    words.sort()
    np.save(name, words)
    return words[:: max(1, len(words) // _SAMPLE)]


def _edges(sample: np.ndarray, ranges: int, bits: int) -> list[int]:
    """The least value of each range, at most `ranges` of them; all differ in their first `bits` bits."""
    chosen = sample[np.arange(1, ranges) * len(sample) // ranges] >> np.uint64(64 - bits) << np.uint64(64 - bits)
    return [0, *(int(edge) for edge in np.unique(chosen) if edge)]


def _compare_range(
    names: Sequence[str], low: int, high: int | None, plan: Sequence[duplicates.Table], number: int, distance: int
) -> np.ndarray:
    slices = []
    for name in names:
        words = np.load(name, mmap_mode="r")
        first = np.searchsorted(words, np.uint64(low))
        last = len(words) if high is None else np.searchsorted(words, np.uint64(high))
        slices.append(words[first:last])
    words = np.concatenate(slices)
    words.sort()
    return duplicates.pairs_of_table(words, plan, number, distance)
