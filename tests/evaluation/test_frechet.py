"""Frechet distances and their intervals."""

import numpy as np
import pytest
from scipy import linalg

from lumos_jax.evaluation import frechet, intervals
from lumos_jax.evaluation.references import Reference


def textbook(a: np.ndarray, b: np.ndarray) -> float:
    """The distance between features (N, D), as pytorch-fid computes it."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    return shift @ shift + np.trace(first) + np.trace(second) - 2 * np.trace(linalg.sqrtm(first @ second)).real


def reference_of(features) -> Reference:
    moments = frechet.Moments.of(features)
    return Reference(moments.mean, moments.covariance, len(features), "scene_vit")


@pytest.fixture(scope="module")
def correlated():
    """(samples, dimensions, shift) -> features."""
    rng = np.random.default_rng(0)

    def make(count, dim, shift=0.0):
        mixing = np.random.default_rng(dim).standard_normal((dim, dim)) / np.sqrt(dim)
        return rng.standard_normal((count, dim)) @ mixing + shift

    return make


@pytest.mark.parametrize(("count", "dim"), [(600, 48), (300, 512)])  # more samples than features, and fewer
def test_agrees_with_the_matrix_square_root(correlated, count, dim):
    samples, others = correlated(count, dim, 0.1), correlated(4 * dim, dim)
    expected, reference = textbook(samples, others), reference_of(others)
    moments = frechet.Moments.of(samples)
    assert frechet.frechet_distance(moments.mean, moments.covariance, reference) == pytest.approx(expected, rel=1e-6)
    estimate = frechet.frechet(samples, reference)
    assert estimate.value == pytest.approx(expected, rel=1e-6)
    # A value that leaves a block out is the distance of the other samples.
    rest = np.delete(samples, intervals.blocks(count)[19], axis=0)
    assert estimate.basis["left_out"][19] == pytest.approx(textbook(rest, others), rel=1e-6)


def test_a_set_has_no_distance_to_itself(correlated):
    for count in (500, 40):
        samples = correlated(count, 64).astype(np.float32)
        assert abs(frechet.frechet(samples, reference_of(samples)).value) < 1e-3


def test_moments_of_shards_add_up(correlated):
    features = correlated(300, 16, 2.0).astype(np.float32)
    total = frechet.Moments.of(features[:120]) + frechet.Moments.of(features[120:])
    np.testing.assert_allclose(total.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(total.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10)


def test_correction_removes_most_of_the_bias():
    dim, rng = 24, np.random.default_rng(1)
    reference = Reference(np.full(dim, 0.2), np.diag(np.linspace(0.5, 2, dim)), 0, "scene_vit")
    truth = frechet.frechet_distance(np.zeros(dim), np.eye(dim), reference)
    found = [frechet.frechet(rng.standard_normal((500, dim)), reference) for _ in range(10)]
    plain = np.mean([one.value for one in found]) - truth
    corrected = np.mean([one.corrected for one in found]) - truth
    assert plain > 0.25
    assert abs(corrected) < plain / 3


def test_too_few_samples(correlated):
    with pytest.raises(ValueError, match="39 samples are too few"):
        frechet.frechet(correlated(39, 8), reference_of(correlated(100, 8)))
