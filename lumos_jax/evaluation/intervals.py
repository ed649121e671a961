"""Standard errors and 95 % intervals of scores, and paired differences of two runs.

    value     metrics of a set of samples, as Frechet distances: the delete-one-group jackknife over 20 blocks of the list. With
              theta of all n samples, theta_j without the m_j of block j, h_j = n / m_j, of g blocks:

                  corrected = g theta - sum_j (1 - m_j / n) theta_j                                                        (1)
                  error^2   = 1/g sum_j (t_j - corrected)^2 / (h_j - 1),   t_j = h_j theta - (h_j - 1) theta_j              (2)

              (Busing, Meijer and van der Leeden 1999, "Delete-m jackknife for unequal m"). (1) removes the bias of order 1/n. A
              bootstrap would add it once more: its resamples hold duplicates.
    mean      metrics of single samples: the error of a mean of clusters (samples of one prompt or object are not independent).
    category  means of categories, averaged (GenEval): prompts are resampled within each category.

The intervals of the first two are Student's, with as many degrees of freedom as there are blocks or clusters, less one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Literal

import numpy as np

GROUPS = 20  # blocks of the jackknife
LEAST = 2 * GROUPS  # samples that a jackknife needs
LEVEL = 0.95
DRAWS = 2000  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score with its uncertainty.

    Attributes:
      value: as the metric defines it.
      corrected: without the bias of order 1/n; None where the metric has none.
      error: standard error.
      low, high: 95 % interval, around `corrected` where there is one.
      kind: how the interval was made: jackknife, clusters or bootstrap.
      basis: what the difference to another run is made from: `left_out` and `sizes` (G,) of a jackknife; else `values`,
        `clusters` and `categories` (N,).
    """

    value: float
    corrected: float | None
    error: float
    low: float
    high: float
    kind: Literal["jackknife", "clusters", "bootstrap"]
    basis: Mapping[str, np.ndarray] = dataclasses.field(repr=False)


def blocks(count: int) -> list[slice]:
    """Cuts a list of `count` samples into GROUPS blocks of nearly one size.

    Raises:
      ValueError: fewer samples than two a block.
    """
    if count < LEAST:
        raise ValueError(f"{count} samples are too few for an interval: {LEAST} or more are needed")
    ends = np.linspace(0, count, GROUPS + 1).round().astype(int)
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]


def jackknife(value: float, left_out: np.ndarray, count: int, *, biased: bool) -> Estimate:
    """The estimate of equations (1) and (2).

    Args:
      value: of all samples.
      left_out: (GROUPS,) the same without each of `blocks(count)`.
      count: samples.
      biased: whether the metric has a bias of order 1/n, which is then corrected.
    """
    left_out = np.asarray(left_out, np.float64)
    sizes = np.array([part.stop - part.start for part in blocks(count)])
    ratio = count / sizes
    pseudo = ratio * value - (ratio - 1) * left_out
    corrected = float(len(sizes) * value - ((1 - 1 / ratio) * left_out).sum())
    error = float(np.sqrt((((pseudo - corrected) ** 2) / (ratio - 1)).mean()))
    basis = {"left_out": left_out, "sizes": sizes}
    center = corrected if biased else value
    low, high = _interval(center, error, len(sizes))
    return Estimate(float(value), corrected if biased else None, error, low, high, "jackknife", basis)


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> Estimate:
    """The mean of values (N,), whose rows with equal `clusters` (N,) are not independent.

    Raises:
      ValueError: fewer than two clusters.
    """
    values = np.asarray(values, np.float64)
    names, index = np.unique(clusters, return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"{len(values)} samples of {len(names)} prompt or object give no interval: two or more are needed"
        )
    mean = float(values.mean())
    sums = np.bincount(index, values - mean)
    error = float(np.sqrt(len(names) / (len(names) - 1) * (sums**2).sum()) / len(values))
    low, high = _interval(mean, error, len(names))
    return Estimate(mean, None, error, low, high, "clusters", {"values": values, "clusters": np.asarray(clusters)})


def category_mean(values: np.ndarray, clusters: np.ndarray, categories: np.ndarray) -> Estimate:
    """The mean over categories of the mean of each; prompts (`clusters`) are resampled within their category.

    values, clusters, categories: (N,); prompts may have different numbers of samples.
    """
    values, rng = np.asarray(values, np.float64), np.random.default_rng(0)
    means, draws = [], []
    for category in np.unique(categories):
        mine = categories == category
        _, index = np.unique(clusters[mine], return_inverse=True)
        sums, counts = np.bincount(index, values[mine]), np.bincount(index)
        chosen = rng.integers(len(counts), size=(DRAWS, len(counts)))
        means.append(sums.sum() / counts.sum())
        draws.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    overall = np.mean(draws, axis=0)
    low, high = np.quantile(overall, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    basis = {"values": values, "clusters": np.asarray(clusters), "categories": np.asarray(categories)}
    return Estimate(
        float(np.mean(means)), None, float(overall.std(ddof=1)), float(low), float(high), "bootstrap", basis
    )


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b of one metric, paired: what both runs have in common, as easy and hard prompts, cancels.

    Raises:
      ValueError: the two are not of the same samples, prompts or blocks.
    """
    shared = set(a.basis) - {"left_out", "values"}
    if a.kind != b.kind or any(not np.array_equal(a.basis[name], b.basis[name]) for name in shared):
        raise ValueError("scores of different lists, or of different numbers of samples, have no paired difference")
    if a.kind == "jackknife":
        left_out = a.basis["left_out"] - b.basis["left_out"]
        return jackknife(a.value - b.value, left_out, int(a.basis["sizes"].sum()), biased=a.corrected is not None)
    values = a.basis["values"] - b.basis["values"]
    if a.kind == "clusters":
        return clustered_mean(values, a.basis["clusters"])
    return category_mean(values, a.basis["clusters"], a.basis["categories"])


def _interval(center: float, error: float, count: int) -> tuple[float, float]:
    from scipy.special import stdtrit  # SciPy takes a moment to load, which no start of a run need pay

    reach = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * error
    return center - reach, center + reach
