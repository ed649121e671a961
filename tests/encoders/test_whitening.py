"""Whitening of features by its definition, and what cannot be whitened."""

import numpy as np
import pytest

from lumos_jax.encoders import whitening


def test_tokens_come_out_white_whatever_the_batches():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(500, 3, 4)) @ rng.normal(size=(4, 4)) * [1, 10, 3, 0.5] + [5, 0, -2, 1]
    made = whitening.fit([mixed[:123], mixed[123:]])
    white = np.asarray(whitening.apply(made, mixed.astype(np.float32))).reshape(-1, 4)
    variances = np.linalg.eigvalsh(np.cov(mixed.reshape(-1, 4).T))
    # A direction of variance v keeps v / (v + epsilon of their mean).
    wanted = variances / (variances + whitening.EPSILON * variances.mean())
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.linalg.eigvalsh(np.cov(white.T)), wanted, rtol=2e-3)
    np.testing.assert_allclose(made["kernel"], made["kernel"].T, atol=1e-6)  # no direction becomes another


def test_what_cannot_be_whitened_is_refused():
    with pytest.raises(ValueError, match="there are 0"):
        whitening.fit([])
    with pytest.raises(ValueError, match="all tokens are the same"):
        whitening.fit([np.ones((2, 3, 4))])
