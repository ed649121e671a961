"""Standard errors, intervals and paired differences."""

import numpy as np
import pytest

from lumos_jax.evaluation import intervals


def jackknife_of(statistic, x, biased=False):
    left_out = [statistic(np.delete(x, part)) for part in intervals.blocks(len(x))]
    return intervals.jackknife(statistic(x), left_out, len(x), biased=biased)


def test_jackknife_of_a_mean_is_the_textbook_error():
    x = np.random.default_rng(0).standard_normal(2003)  # blocks of 100 and 101
    estimate = jackknife_of(np.mean, x, biased=True)
    groups = np.array([x[part].mean() for part in intervals.blocks(len(x))])
    assert estimate.error == pytest.approx(groups.std(ddof=1) / np.sqrt(20), rel=0.02)
    assert estimate.corrected == pytest.approx(x.mean(), abs=1e-12)
    assert estimate.high - estimate.low == pytest.approx(2 * 2.093 * estimate.error, rel=1e-3)


def test_jackknife_removes_the_bias_of_a_variance():
    x = np.random.default_rng(1).standard_normal(40)
    estimate = jackknife_of(np.var, x, biased=True)
    assert estimate.value == pytest.approx(x.var())
    assert estimate.corrected == pytest.approx(x.var(ddof=1), rel=0.01)
    assert (estimate.low + estimate.high) / 2 == pytest.approx(estimate.corrected)


def test_equal_samples_of_one_object_count_once():
    rng = np.random.default_rng(2)
    objects = rng.standard_normal(30)
    values, clusters = np.repeat(objects, 16), np.repeat([f"object {i}" for i in range(30)], 16)
    estimate = intervals.clustered_mean(values, clusters)
    assert estimate.value == pytest.approx(objects.mean())
    assert estimate.error == pytest.approx(objects.std(ddof=1) / np.sqrt(30))
    alone = intervals.clustered_mean(values, np.arange(len(values)))
    assert alone.error == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))


def test_categories_weigh_alike_and_prompts_are_resampled():
    rng = np.random.default_rng(3)
    categories = np.repeat(["colors", "position"], [400, 100])
    clusters = np.repeat(np.arange(125), 4)  # four samples a prompt, equal
    values = np.repeat(rng.random(125) < np.repeat([0.9, 0.2], [100, 25]), 4).astype(float)
    estimate = intervals.category_mean(values, clusters, categories)
    first, second = values[:400:4], values[400::4]
    assert estimate.value == pytest.approx((first.mean() + second.mean()) / 2)
    expected = np.sqrt(first.var() / 100 + second.var() / 25) / 2
    assert estimate.error == pytest.approx(expected, rel=0.1)
    assert estimate.low < estimate.value < estimate.high


def test_paired_difference_cancels_what_runs_share():
    rng = np.random.default_rng(4)
    hard, clusters = 10 * rng.standard_normal(200), np.arange(200)
    runs = [intervals.clustered_mean(hard + gain + rng.standard_normal(200), clusters) for gain in (0.0, 0.5)]
    found = intervals.difference(runs[1], runs[0])
    assert found.value == pytest.approx(runs[1].value - runs[0].value)
    assert found.low < 0.5 < found.high
    assert found.error < runs[0].error / 4
    x = rng.standard_normal(200)
    a, b = jackknife_of(np.var, x, True), jackknife_of(np.var, 1.1 * x, True)
    assert intervals.difference(b, a).value == pytest.approx(0.21 * x.var())
    with pytest.raises(ValueError, match="different lists"):
        intervals.difference(a, jackknife_of(np.var, x[:100], True))
    with pytest.raises(ValueError, match="different lists"):
        intervals.difference(runs[0], intervals.clustered_mean(hard, clusters[::-1]))


def test_too_few():
    with pytest.raises(ValueError, match="two or more"):
        intervals.clustered_mean(np.ones(5), np.zeros(5))
    with pytest.raises(ValueError, match="10 samples are too few"):
        intervals.blocks(10)
