"""Which rows of a group of duplicates are dropped, and for which one.

A row is dropped if, and only if, a row that is kept lies within the distance and ranks above it. So a chain of images, each
close to the next, does not collapse into one: what is dropped is close to what was kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
