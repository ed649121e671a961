"""The optimizer: which parameters learn at another rate."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from lumos_jax import config
from lumos_jax.train.optimizer import make_optimizer
from lumos_jax.weights.rules import flatten

PARAMS = {"camera": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}, "patch": np.full(4, -2.0), "null": np.ones(2)}
PARAMS = jax.tree.map(np.float32, PARAMS)
TRAINABLE = {"camera": {"kernel": True, "bias": True}, "patch": True, "null": False}
FASTER = config.Optimizer(learning_rate=1e-3, lr_multipliers=(("camera/*", 10.0),))

# As the blocks hold them: q, k and v of 2 layers with 2 heads of 3 dims, their output, an MLP, and what Muon leaves to Adam.
BLOCKS = {
    "attn": {"qkv_kernel": (2, 6, 3, 2, 3), "qkv_bias": (2, 3, 2, 3), "out_kernel": (2, 2, 3, 6)},
    "mlp": {"fc1": {"kernel": (2, 6, 12), "bias": (2, 12)}},
    "modulation": {"kernel": (2, 6, 36)},
}


def first_update(settings):
    grads = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), PARAMS)
    optimizer = make_optimizer(settings, 100, TRAINABLE)
    return flatten(optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0])


@pytest.mark.parametrize("fields", [{}, {"weight_decay": 0.1, "clip_norm": 1.0}])
def test_multiplied_learning_rates_take_larger_steps(fields):
    fast = first_update(dataclasses.replace(FASTER, **fields))
    slow = first_update(dataclasses.replace(FASTER, lr_multipliers=(), **fields))
    for path in slow:
        np.testing.assert_allclose(fast[path], (10 if path.startswith("camera/") else 1) * slow[path], rtol=1e-6)
    if not fields:  # Adam's first step has the size of the learning rate
        np.testing.assert_allclose(np.abs(fast["camera/kernel"]), 1e-2, rtol=1e-4)
        np.testing.assert_allclose(np.abs(fast["patch"]), 1e-3, rtol=1e-4)


@pytest.mark.parametrize("pattern", ["cameras/*", "null"])
def test_a_rate_for_what_does_not_train_is_refused(pattern):
    with pytest.raises(
        ValueError, match=rf"config\.optimizer\.lr_multipliers: '{pattern[:4]}.*' matches no parameter .* camera/"
    ):
        make_optimizer(dataclasses.replace(FASTER, lr_multipliers=(("camera/*", 2.0), (pattern, 2.0))), 10, TRAINABLE)


def test_muon_makes_the_matrices_of_the_blocks_orthogonal_and_leaves_the_rest_to_adam():
    def drawn(path, shape):
        return np.random.default_rng(len(str(path))).standard_normal(shape, np.float32)

    is_shape = {"is_leaf": lambda leaf: isinstance(leaf, tuple)}
    grads = {
        "blocks": jax.tree_util.tree_map_with_path(drawn, BLOCKS, **is_shape),
        "final": {"out": {"kernel": drawn("", (6, 4))}},
        "vit": {"blocks": {"fc1": {"kernel": drawn("vit", (2, 6, 4))}}},
    }
    params = jax.tree.map(np.zeros_like, grads)

    settings = config.Optimizer(name="muon", learning_rate=1e-2)
    optimizer = make_optimizer(settings, 10, jax.tree.map(lambda _: True, params))
    muon = flatten(jax.tree.map(np.asarray, jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]))
    adam = optax.nadam(1e-2, b2=config.Optimizer.b2)
    adam = flatten(adam.update(grads, adam.init(params), params)[0])
    matrices = {
        "blocks/attn/qkv_kernel": lambda a: a.transpose(0, 2, 1, 3, 4).reshape(6, 6, 6),
        "blocks/attn/out_kernel": lambda a: a.reshape(2, 6, 6),
        "blocks/mlp/fc1/kernel": lambda a: a,
        "vit/blocks/fc1/kernel": lambda a: a,
    }
    given = flatten(grads)
    for path, ours in muon.items():
        if path not in matrices:
            np.testing.assert_allclose(ours, adam[path], rtol=1e-5)
            continue
        matrix, gradient = matrices[path](ours), matrices[path](given[path])
        rows, columns = matrix.shape[-2:]
        # Orthogonal rows of 0.2 sqrt(max(rows, columns)) times the rate; the iteration ends near 1, not at it.
        values = np.linalg.svd(matrix, compute_uv=False) / (1e-2 * 0.2 * max(rows, columns) ** 0.5)
        np.testing.assert_allclose(values, 0.9, atol=0.45, err_msg=path)
        assert (matrix * gradient).sum() < 0  # downhill
