"""Precision and recall against plain NumPy."""

import numpy as np
import pytest

from lumos_jax.evaluation import intervals, precision_recall
from lumos_jax.evaluation.references import Reference


def plain(points, manifold):
    """Share of points in the manifold of another set."""

    def distances(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    radius = np.sort(distances(manifold, manifold), axis=1)[:, 3]  # the first is the point itself
    return (distances(points, manifold) <= radius).any(1).mean()


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    samples = np.concatenate([0.4 * rng.standard_normal((70, 5)), 6 + rng.standard_normal((37, 5))])
    return rng.permutation(samples), rng.standard_normal((150, 5))


def test_agree_with_plain_numpy(sets, monkeypatch):
    monkeypatch.setattr(precision_recall, "_ROWS", 40)  # several blocks
    samples, others = sets
    reference = Reference(np.zeros(5), np.eye(5), 150, "scene_vit", features=others)
    precision = precision_recall.precision(samples, reference)
    recall = precision_recall.recall(samples, reference)
    assert precision.value == plain(samples, others)
    assert recall.value == plain(others, samples)
    assert 0.5 < precision.value < 0.8 < 1
    assert 0.1 < recall.value < 0.9
    for number, part in enumerate(intervals.blocks(len(samples))):
        rest = np.delete(samples, part, axis=0)
        assert precision.basis["left_out"][number] == pytest.approx(plain(rest, others), abs=1e-12)
        assert recall.basis["left_out"][number] == pytest.approx(plain(others, rest), abs=1e-12)


def test_a_set_covers_itself(sets):
    reference = Reference(np.zeros(5), np.eye(5), 107, "scene_vit", features=sets[0])
    for metric in (precision_recall.precision, precision_recall.recall):
        assert metric(sets[0], reference).value == 1
