"""Precision and recall of samples (Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric").

A point lies in a set's manifold if it is no farther from one of the set's points than that one from its third nearest neighbor
in the set. Precision is the share of samples in the manifold of the reference, recall the share of reference images in that of
the samples. Both depend on the sizes of both sets: compare only equal ones (10,000 or 50,000 each are usual).

Distances are computed in blocks of rows, so that memory grows with N, not N^2.

Axes: N samples, M reference images, D features, G blocks of samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lumos_jax.evaluation import intervals
from lumos_jax.evaluation.intervals import Estimate
from lumos_jax.evaluation.references import Reference

K = 3
_ROWS = 500  # of a block


def precision(features: np.ndarray, reference: Reference) -> Estimate:
    """Of samples' features (N, D).

    Raises:
      ValueError: the reference has no features, or there are too few samples.
    """
    others = reference.all_features("precision")
    radius = np.concatenate([np.partition(block, K, axis=1)[:, K] for block in _squares(others, others)])
    inside = np.concatenate([(block <= radius).any(1) for block in _squares(features, others)])
    left_out = [np.delete(inside, part).mean() for part in intervals.blocks(len(inside))]
    return intervals.jackknife(inside.mean(), left_out, len(inside), biased=False)


def recall(features: np.ndarray, reference: Reference) -> Estimate:
    """Of samples' features (N, D). Raises ValueError as `precision`."""
    others, parts = reference.all_features("recall"), intervals.blocks(len(features))
    radii = np.concatenate([_radii(block, parts) for block in _squares(features, features)], axis=0).T.copy()
    for number, part in enumerate(parts):  # a sample that is left out covers nothing
        radii[number + 1, part] = -1
    covered = [np.stack([(block <= radius).any(1) for radius in radii], axis=1) for block in _squares(others, features)]
    shares = np.concatenate(covered).mean(0)
    return intervals.jackknife(shares[0], shares[1:], len(features), biased=False)


def _radii(squares: np.ndarray, parts: list[slice]) -> np.ndarray:
    """Squared distances (n, N) of samples to all samples -> (n, 1 + G): to the K-th nearest one, of all and without each block.

    A sample is its own nearest one, at 0.
    """
    nearest = np.stack([_smallest(squares[:, part], K + 1) for part in parts], axis=1)  # (n, G, K + 1)
    found = [nearest]
    for number in range(len(parts)):
        rest = nearest.copy()
        rest[:, number] = np.inf
        found.append(rest)
    return np.stack([np.partition(each.reshape(len(squares), -1), K, axis=1)[:, K] for each in found], axis=1)


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """The `count` smallest of each row, infinity where there are not as many."""
    if values.shape[1] < count:
        values = np.pad(values, ((0, 0), (0, count - values.shape[1])), constant_values=np.inf)
    return np.partition(values, count - 1, axis=1)[:, :count]


def _squares(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances of blocks of rows of a (N, D) to all of b (M, D): (n, M) float64 each."""
    b = np.asarray(b, np.float64)
    of_b = (b**2).sum(1)[None]
    for start in range(0, len(a), _ROWS):
        rows = np.asarray(a[start : start + _ROWS], np.float64)
        yield np.maximum((rows**2).sum(1)[:, None] + of_b - 2 * rows @ b.T, 0)
