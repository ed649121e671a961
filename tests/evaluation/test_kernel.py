"""KID, KVD and CMMD against plain NumPy."""

import numpy as np
import pytest

from lumos_jax.evaluation import intervals, kernel
from lumos_jax.evaluation.references import Reference


def reference_of(features) -> Reference:
    dim = features.shape[1]
    return Reference(np.zeros(dim), np.eye(dim), len(features), "scene_vit", features=features)


def unbiased(x, y):
    """The unbiased estimate with the polynomial kernel."""
    n, m, d = len(x), len(y), x.shape[1]
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return within - 2 * xy.mean()


def biased(x, y):
    """CMMD."""

    def k(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(2) / 200).mean()

    return 1000 * (k(x, x) + k(y, y) - 2 * k(x, y))


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((103, 8)), rng.standard_normal((151, 8)) + 0.3
    return x, y


@pytest.mark.parametrize(("metric", "plain"), [(kernel.kvd, unbiased), (kernel.cmmd, biased)])
def test_agrees_with_plain_numpy(sets, metric, plain, monkeypatch):
    monkeypatch.setattr(kernel, "_ROWS", 40)  # several blocks
    x, y = sets
    estimate = metric(x, reference_of(y))
    assert estimate.value == pytest.approx(plain(x, y), rel=1e-9)
    for number, part in enumerate(intervals.blocks(len(x))):
        assert estimate.basis["left_out"][number] == pytest.approx(plain(np.delete(x, part, axis=0), y), rel=1e-9)


def test_kid_of_one_subset_that_is_everything(sets):
    x, y = sets[0], sets[1][:103]
    estimate = kernel.kid(x, reference_of(y))
    assert estimate.value == pytest.approx(unbiased(x, y), rel=1e-9)
    assert estimate.basis["left_out"][7] == pytest.approx(
        unbiased(np.delete(x, intervals.blocks(103)[7], 0), y), rel=1e-9
    )


def test_kid_is_the_mean_of_random_subsets(monkeypatch):
    monkeypatch.setattr(kernel, "SUBSET_SIZE", 50)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((400, 8)), rng.standard_normal((400, 8)) + 0.5
    whole = kernel.kvd(x, reference_of(y))
    estimate = kernel.kid(x, reference_of(y))
    assert estimate.value == pytest.approx(whole.value, abs=2 * whole.error)
    assert estimate.value != pytest.approx(whole.value, rel=1e-6)
    assert kernel.kid(x, reference_of(y)).value == estimate.value  # the subsets are the same every time
    assert estimate.low < whole.value < estimate.high


def test_unbiased_of_one_distribution_is_about_zero():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((600, 8)), rng.standard_normal((600, 8))
    assert abs(kernel.kvd(x, reference_of(y)).value) < 0.02
    assert abs(kernel.cmmd(x, reference_of(x)).value) < 1e-9


def test_statistics_without_features_are_not_enough():
    with pytest.raises(ValueError, match="kvd needs features"):
        kernel.kvd(np.zeros((50, 8)), Reference(np.zeros(8), np.eye(8), 9, "scene_vit", path="ref.npz"))
