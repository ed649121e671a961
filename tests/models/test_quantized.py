"""Products of 8-bit operands: what they round to, whose gradient they have, and what a network makes of them."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax import config
from lumos_jax.models import layers, make_dit
from tests.models.test_dit import TINY, assert_trees_close, gradients, make_params, normal


def test_int8_is_symmetric_with_a_scale_for_each_row_and_column():
    x, kernel = normal(0, 2, 5, 64), normal(1, 64, 24)
    x = x.at[0, 1].multiply(1000.0)  # a loud row, which leaves the others as they are
    ours = np.asarray(jax.jit(lambda x, k: layers.matmul(x, k, jnp.float32, "int8"))(x, kernel))

    def rounded(a, dim):
        scale = np.abs(a).max(axis=dim, keepdims=True) / 127.5
        return np.clip(np.round(np.asarray(a) / scale), -127, 127) * scale

    exact = np.asarray(x) @ np.asarray(kernel)
    away, off = (np.linalg.norm(ours - to, axis=-1) for to in (exact, rounded(x, -1) @ rounded(kernel, 0)))
    assert (off < 0.5 * away).all()  # but for a few numbers in the middle between two
    relative = away / np.linalg.norm(exact, axis=-1)
    assert (relative > 1e-3).all()
    assert (relative < 3e-2).all()


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_the_gradient_is_that_of_the_plain_product(kind):
    x, kernel, weight = normal(0, 3, 5, 8), normal(1, 8, 6), normal(2, 3, 5, 6)

    def gradients_of(rounded):
        return jax.grad(lambda *a: (layers.matmul(*a, jnp.float32, rounded) * weight).sum(), (0, 1))(x, kernel)

    for ours, plain in zip(gradients_of(kind), gradients_of("none"), strict=True):
        np.testing.assert_array_equal(ours, plain)
    product = layers.matmul(x.astype(jnp.bfloat16), kernel, jnp.bfloat16, kind)
    assert product.dtype == jnp.bfloat16
    np.testing.assert_allclose(product.astype(jnp.float32), x @ kernel, atol=0.4)


def test_a_network_with_int8_mlps_has_nearly_the_gradient_of_the_plain_one():
    """Scanned, with weights gathered in the body and products recomputed."""
    model = dataclasses.replace(TINY, depth=2, remat="mlp")
    dit = make_dit(
        dataclasses.replace(model, mlp_products="int8"), latent_shape=(8, 8, 4), out_channels=8, token_shape=(5, 12)
    )
    params = make_params(dit)
    plain, ours = (gradients(dit, params, lambda layer: layer, mlp_products=kind) for kind in ("none", "int8"))
    assert_trees_close(plain, ours, 0.1)
    fc1 = [np.asarray(grads["blocks"]["mlp"]["fc1"]["kernel"]) for grads in (plain, ours)]
    assert np.linalg.norm(fc1[0] - fc1[1]) > 1e-3 * np.linalg.norm(fc1[0])


def test_without_the_library_the_command_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"config\.model\.mlp_products=int8 needs .* pip install 'lumos_jax\[quantized\]'"
    ):
        make_dit(config.Model(mlp_products="int8"), latent_shape=(8, 8, 4), out_channels=8, token_shape=(1, 12))
