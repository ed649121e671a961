"""Maximum mean discrepancies between features of samples and of a reference set: KID, KVD and CMMD.

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)                                                                  (1)

    kid, kvd   k(x, y) = (x . y / D + 1)^3; the means within a set leave out pairs of a sample with itself (unbiased). KID is
               the mean over 100 random subsets of 1,000 (Binkowski et al. 2018); KVD takes all clips at once (Unterthiner et
               al. 2018), the features being logits.
    cmmd       k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma 10, of CLIP features of unit length; such pairs are kept (biased);
               times 1,000 (Jayasumana et al. 2024)

Intervals are those of the jackknife over samples; the customary +- of KID is the spread of its subsets, which says something
else. Kernels are summed in blocks, so that no N x N matrix is held, in float64.

Axes: N samples, M reference images, D features, G blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lumos_jax.evaluation import intervals
from lumos_jax.evaluation.intervals import Estimate
from lumos_jax.evaluation.references import Reference

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
_ROWS = 2000  # of a block of the reference

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, D), (M, D) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, D), (M, D) -> (N, M)."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
    return np.exp(-np.maximum(squares, 0) / (2 * SIGMA**2))


def kid(features: np.ndarray, reference: Reference) -> Estimate:
    """KID of features (N, D), or the mean over smaller subsets where either set has fewer than 1,000.

    Raises:
      ValueError: the reference has no features, or there are too few samples.
    """
    others, rng = reference.all_features("kid"), np.random.default_rng(0)
    parts = intervals.blocks(len(features))
    block = np.repeat(np.arange(len(parts)), [part.stop - part.start for part in parts])
    size = min(SUBSET_SIZE, len(features), len(others))
    total = 0
    for _ in range(SUBSETS):
        chosen = np.sort(rng.choice(len(features), size, replace=False))
        x = np.asarray(features[chosen], np.float64)
        y = np.asarray(others[rng.choice(len(others), size, replace=False)], np.float64)
        xs = [x[block[chosen] == number] for number in range(len(parts))]
        total += np.array(_discrepancies(polynomial, xs, [y], biased=False))
    value, *left_out = total / SUBSETS
    return intervals.jackknife(value, left_out, len(features), biased=False)


def kvd(features: np.ndarray, reference: Reference) -> Estimate:
    """KVD of logits (N, D) of clips. Raises ValueError as `kid`."""
    return _whole(polynomial, features, reference.all_features("kvd"), biased=False)


def cmmd(features: np.ndarray, reference: Reference) -> Estimate:
    """CMMD of CLIP features (N, D) of unit length. Raises ValueError as `kid`."""
    return _whole(gaussian, features, reference.all_features("cmmd"), biased=True, scale=SCALE)


def _whole(kernel: Kernel, features: np.ndarray, others: np.ndarray, *, biased: bool, scale: float = 1.0) -> Estimate:
    xs = [np.asarray(features[part], np.float64) for part in intervals.blocks(len(features))]
    ys = [np.asarray(others[i : i + _ROWS], np.float64) for i in range(0, len(others), _ROWS)]
    value, *left_out = scale * np.array(_discrepancies(kernel, xs, ys, biased=biased))
    return intervals.jackknife(value, left_out, len(features), biased=biased)


def _discrepancies(kernel: Kernel, xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], *, biased: bool) -> list[float]:
    """(1) of all x, then without each of the blocks `xs`; `ys` are blocks of y."""
    within_x, own_x = _sums(kernel, xs, biased)
    within_y = _sums(kernel, ys, biased)[0].sum()
    across = np.array([sum(kernel(x, y).sum() for y in ys) for x in xs])
    sizes, others = np.array([len(x) for x in xs]), sum(map(len, ys))

    def pairs(count: int) -> int:
        return count * count if biased else count * (count - 1)

    found = []
    for left in (None, *range(len(xs))):
        gone, rows = (0, 0) if left is None else (sizes[left], within_x[left].sum())
        inner = within_x.sum() - 2 * rows + (0 if left is None else own_x[left])
        outer = across.sum() - (0 if left is None else across[left])
        count = sizes.sum() - gone
        found.append(inner / pairs(count) + within_y / pairs(others) - 2 * outer / (count * others))
    return found


def _sums(kernel: Kernel, blocks: Sequence[np.ndarray], biased: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the kernel between each two blocks (G, G), and their diagonal; unbiased: without pairs of one sample."""
    sums = np.zeros((len(blocks), len(blocks)))
    for i, x in enumerate(blocks):
        for j, y in enumerate(blocks[: i + 1]):
            values = kernel(x, y)
            if i == j and not biased:
                np.fill_diagonal(values, 0)
            sums[i, j] = sums[j, i] = values.sum()
    return sums, np.diag(sums)
