"""Frechet distances between features of samples and of a reference set: FID, FD-DINOv2, FVD and the like.

    d = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 sum_i sqrt(max(0, e_i)),   e the eigenvalues of R^T S_1 R,   R R^T = S_2      (1)

(Heusel et al. 2017, with covariances of n - 1). Equal to the usual tr (S_1 S_2)^(1/2), without the square root of a matrix that
is not symmetric, whose imaginary or exploding values are why implementations add 1e-6 to the diagonal.

R, of the reference, is found once. The jackknife needs (1) without each of 20 blocks of samples: features are projected once,
Y = X R, and the second moment of a block is taken from that of all; where samples are fewer than dimensions, the eigenvalues
are those of the Gram matrix of samples.

Axes: N samples, D features.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lumos_jax.evaluation import intervals
from lumos_jax.evaluation.intervals import Estimate
from lumos_jax.evaluation.references import Reference


@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums in float64. Those of shards are added in the shards' order, so that the total is the same bit for bit however
    many processes made them.

    Attributes:
      count: n.
      total: sum of x, (D,).
      outer: sum of x x^T, (D, D).
    """

    count: int
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Of features (N, D)."""
        x = np.asarray(features, np.float64)
        return cls(len(x), x.sum(0), x.T @ x)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """With n - 1."""
        return (self.outer - np.outer(self.total, self.mean)) / (self.count - 1)


def frechet_distance(mean: np.ndarray, covariance: np.ndarray, reference: Reference) -> float:
    """Equation (1) from the moments (D,), (D, D) of samples."""
    root = reference.root
    return _distance(mean - reference.mean, np.trace(covariance), root.T @ covariance @ root, reference)


def frechet(features: np.ndarray, reference: Reference) -> Estimate:
    """Equation (1) from the features (N, D) of samples, with a jackknife interval.

    Raises:
      ValueError: too few samples.
    """
    parts = intervals.blocks(len(features))
    x = np.asarray(features, np.float64) - reference.mean
    y = x @ reference.root
    squares, narrow = (x**2).sum(1), len(y) < y.shape[1]
    outer = None if narrow else y.T @ y

    def without(part: slice) -> float:
        keep = np.ones(len(x), bool)
        keep[part] = False
        count = int(keep.sum())
        mean = x.sum(0) / count - x[part].sum(0) / count
        if narrow:
            centered = y[keep] - y[keep].mean(0)
            second = centered @ centered.T
        else:
            total = mean @ reference.root
            second = outer - y[part].T @ y[part] - count * np.outer(total, total)
        trace = (squares[keep].sum() - count * mean @ mean) / (count - 1)
        return _distance(mean, trace, second / (count - 1), reference)

    value, left_out = without(slice(0, 0)), [without(part) for part in parts]
    return intervals.jackknife(value, left_out, len(x), biased=True)


def _distance(shift: np.ndarray, trace: float, product: np.ndarray, reference: Reference) -> float:
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(product), 0))
    return float(shift @ shift + trace + np.trace(reference.covariance) - 2 * roots.sum())
