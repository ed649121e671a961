"""The optimiser: which parameters learn at another rate."""

import dataclasses

import jax
import numpy as np
import pytest

from lumos_jax import config
from lumos_jax.name_rules import flatten
from lumos_jax.train.optimizer import make_optimizer

PARAMS = {"camera": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}, "patch": np.full(4, -2.0), "null": np.ones(2)}
PARAMS = jax.tree.map(np.float32, PARAMS)
TRAINABLE = {"camera": {"kernel": True, "bias": True}, "patch": True, "null": False}
BOOSTED = config.Optimizer(learning_rate=1e-3, boosted=("camera/*",), boost=10.0)


def first_update(settings):
    grads = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), PARAMS)
    optimizer = make_optimizer(settings, 100, TRAINABLE)
    return flatten(optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0])


@pytest.mark.parametrize("fields", [{}, {"weight_decay": 0.1, "clip_norm": 1.0}])
def test_boosted_parameters_take_larger_steps(fields):
    fast = first_update(dataclasses.replace(BOOSTED, **fields))
    slow = first_update(dataclasses.replace(BOOSTED, boosted=(), boost=1.0, **fields))
    for path in slow:
        np.testing.assert_allclose(fast[path], (10 if path.startswith("camera/") else 1) * slow[path], rtol=1e-6)
    if not fields:  # Adam's first step has the size of the learning rate
        np.testing.assert_allclose(np.abs(fast["camera/kernel"]), 1e-2, rtol=1e-4)
        np.testing.assert_allclose(np.abs(fast["patch"]), 1e-3, rtol=1e-4)


@pytest.mark.parametrize("pattern", ["cameras/*", "null"])
def test_a_rate_for_what_does_not_train_is_refused(pattern):
    with pytest.raises(
        ValueError, match=rf"config\.optimizer\.boosted: '{pattern[:4]}.*' matches no parameter .* camera/"
    ):
        make_optimizer(dataclasses.replace(BOOSTED, boosted=("camera/*", pattern)), 10, TRAINABLE)
