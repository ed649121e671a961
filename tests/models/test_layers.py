"""Hand-written gradients against plain autodiff, and the folded cross-attention against the general one."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax.models import layers
from lumos_jax.models.attention import CrossAttention, attend


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def check_gradients(ours, plain, *args):
    """Values and gradients of two functions agree to 1e-5 of their scale."""
    weight = normal(99, *jax.eval_shape(plain, *args).shape)
    numbers = range(len(args))
    left = jax.jit(jax.value_and_grad(lambda *a: (ours(*a) * weight).sum(), numbers))(*args)
    right = jax.jit(jax.value_and_grad(lambda *a: (plain(*a) * weight).sum(), numbers))(*args)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-7, rtol=0)


@pytest.mark.parametrize("features", [4, 24])
def test_matmul(features):
    x, kernel = normal(0, 3, 5, 8), normal(1, 8, features)
    check_gradients(lambda x, k: layers.matmul(x, k, jnp.float32), jnp.matmul, x, kernel)


def test_matmul_gradient_of_the_kernel_is_float32_for_bfloat16_inputs():
    x, kernel = normal(0, 512, 8), normal(1, 8, 4)
    grad = jax.grad(lambda k: layers.matmul(x.astype(jnp.bfloat16), k, jnp.float32).sum())(kernel)
    exact = x.astype(jnp.bfloat16).astype(jnp.float32).T @ jnp.ones((512, 4))
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(grad, exact, rtol=1e-5, atol=1e-4)


def test_gradients_of_what_is_broadcast_are_summed_in_float32_for_bfloat16_inputs():
    grad = (normal(0, 16, 256, 8) + 0.1).astype(jnp.bfloat16)

    def pulled(y):
        return jax.jit(lambda y: jax.vjp(layers.broadcast_add, grad, y)[1](grad)[1])(jnp.zeros(y, jnp.bfloat16))

    for shape, dims in (((1, 1, 8), (0, 1)), ((16, 1, 8), (1,)), (grad.shape, ())):
        exact = np.asarray(grad, np.float64).sum(dims, keepdims=True)
        # Half a unit in the last place of bfloat16. Summed in bfloat16, the first is off by 2 %.
        np.testing.assert_allclose(np.asarray(pulled(shape), np.float64), exact, rtol=2**-8, atol=1e-3)


def test_gelu():
    check_gradients(layers.gelu, lambda x: nn.gelu(x, approximate=True), normal(0, 4, 9) * 3)


def plain_attention(q, k, v, mask=None):
    logits = jnp.einsum("bnhk,blhk->bhnl", q, k) / jnp.sqrt(q.shape[-1])
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    return jnp.einsum("bhnl,blhk->bnhk", jax.nn.softmax(logits), v)


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked):
    q, k, v = 3 * normal(0, 2, 7, 3, 4), normal(1, 2, 5, 3, 4), normal(2, 2, 5, 3, 4)
    mask = jnp.asarray([[True, True, False, True, False], [True] * 5]) if masked else None
    check_gradients(lambda q, k, v: attend(q, k, v, mask), lambda q, k, v: plain_attention(q, k, v, mask), q, k, v)


def test_attention_is_finite_for_large_logits_and_for_rows_without_tokens():
    q, k, v = 1e3 * normal(0, 2, 7, 3, 4), normal(1, 2, 5, 3, 4), normal(2, 2, 5, 3, 4)
    out, grads = jax.value_and_grad(lambda q: attend(q, k, v, jnp.zeros((2, 5), bool)).sum())(q)
    np.testing.assert_allclose(out, v.mean(axis=1).sum() * 7, rtol=1e-4)
    assert np.isfinite(grads).all()
    assert np.isfinite(jax.grad(lambda q: attend(q, k, v, None).sum())(q)).all()


def test_modulated_norm():
    def plain(x, shift, scale):
        normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + layers.EPSILON)
        return normed * (1 + scale[:, None]) + shift[:, None]

    x = normal(0, 2, 5, 16) + 3.0
    check_gradients(layers.modulated_norm, plain, x, normal(1, 2, 16), normal(2, 2, 16))


@pytest.mark.parametrize("masked", [False, True])
def test_single_token_cross_attention_folds_exactly(masked):
    """The general path takes over from two tokens on, of which the second is masked, or both are and equal the first."""
    x, y = normal(0, 2, 6, 16), normal(1, 2, 1, 16)
    module = CrossAttention(heads=2)
    params = nn.meta.unbox(module.init(jax.random.key(0), x, y))
    params = jax.tree.map(lambda p: p + 0.1 * normal(p.size, *p.shape), params)
    one = jnp.asarray([[True], [False]]) if masked else None
    two = jnp.asarray([[True, False], [not masked, False]])
    second = jnp.concatenate([100.0 * y[:1], y[1:] if masked else 100.0 * y[1:]])

    def folded(params):
        return jnp.broadcast_to(module.apply(params, x, y, one), x.shape)

    def general(params):
        return module.apply(params, x, jnp.concatenate([y, second], axis=1), two)

    assert module.apply(params, x, y, one).shape == (2, 1, 16)
    np.testing.assert_allclose(folded(params), general(params), atol=1e-6)
    weight = normal(5, 2, 6, 16)
    left, right = (jax.jit(jax.grad(lambda p, f=f: (f(p) * weight).sum()))(params) for f in (folded, general))
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_patches_round_trip_and_their_order():
    x = normal(0, 2, 4, 6, 3)
    patches = layers.patchify(x, 2)
    np.testing.assert_array_equal(patches[1, 4], x[1, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(layers.unpatchify(patches, 2, (2, 3)), x)
