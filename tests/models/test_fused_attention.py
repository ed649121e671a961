"""The kernel, step by step on a CPU, against the plain attention; what is compiled for a TPU is the same kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax.models import attention, fused_attention
from tests.stepping import matmuls


def test_it_attends_as_the_plain_one_forward_and_backward(monkeypatch):
    monkeypatch.setattr(fused_attention, "MAX_QUERIES", 128)
    tokens, heads = 256, 2  # two blocks of queries a head
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (1, tokens, 16))
    kernel, bias = 0.5 * jax.random.normal(keys[1], (16, 3, heads, 8)), jax.random.normal(keys[2], (3, heads, 8))
    out_kernel, out_bias = jax.random.normal(keys[3], (heads * 8, 16)), jnp.arange(16.0)
    weights = jax.random.normal(keys[4], x.shape)

    def plain(x, kernel, bias, out_kernel, out_bias):
        q, k, v = attention._split_heads(x, kernel, bias)
        return attention.dense(attention.attend(q, k, v).reshape(*x.shape[:2], -1), out_kernel, out_bias)

    def fused(x, kernel, bias, out_kernel, out_bias):
        qkv = fused_attention.project(x, kernel.reshape(16, -1), bias.reshape(-1)).reshape(1, 3, heads, 8, tokens)
        return fused_attention.merge(fused_attention.attend(qkv, True), out_kernel, out_bias)

    inputs = (x, kernel, bias, out_kernel, out_bias)
    results = []
    for layer in (plain, fused):
        out, pull = jax.vjp(layer, *inputs)
        results.append((out, *pull(weights)))
    for wanted, got in zip(*results, strict=True):
        assert np.abs(wanted).max() > 0.1 or wanted.ndim == 3
        np.testing.assert_allclose(got, wanted, atol=1e-5 * float(np.abs(wanted).max()) + 1e-5)


def test_cross_attention_sees_what_the_plain_one_does():
    rows, tokens, length, heads = 3, 3 * 128, 12, 2  # three blocks of queries
    keys = jax.random.split(jax.random.key(1), 5)
    q, weights = (jax.random.normal(key, (rows, tokens, heads, 8)) for key in keys[:2])
    y = jax.random.normal(keys[2], (rows, length, 16))
    kernel, bias = 0.5 * jax.random.normal(keys[3], (16, 2, heads, 8)), jax.random.normal(keys[4], (2, heads, 8))
    mask = jnp.arange(length)[None] < jnp.array([[12], [5], [0]])  # all, some, none

    def plain(q, y, kernel, bias):
        return attention.attend(q, *attention._split_heads(y, kernel, bias), mask)

    def fused(q, y, kernel, bias):
        heads_BHKN = attention.attend_fused(q.transpose(0, 2, 3, 1), y, mask, kernel, bias, True)
        return heads_BHKN.transpose(0, 3, 1, 2)

    inputs = (q, y, kernel, bias)
    np.testing.assert_allclose(fused(*inputs), plain(*inputs), atol=1e-5)
    # A row that sees nothing depends on its values alone; nothing trains on such rows.
    weights = weights * mask.any(axis=1)[:, None, None, None]
    for wanted, got in zip(*(jax.vjp(layer, *inputs)[1](weights) for layer in (plain, fused)), strict=True):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(got, wanted, atol=1e-5 * float(np.abs(wanted).max()))


def test_which_heads_it_takes():
    half, full = jnp.dtype("bfloat16"), jnp.dtype("float32")
    for head in ((256, 72, half), (4096, 72, half), (512, 72, full)):
        assert fused_attention.fits(*head)
    # Lanes and sublanes that stay empty, logits that are too many, and arrays that exceed vector memory.
    for head in ((64, 72, half), (256, 12, half), (8192, 64, half), (1024, 72, full), (4096, 128, half)):
        assert not fused_attention.fits(*head)
    for head in ((4096, 72, 120, half), (4096, 72, 512, half), (384, 72, 197, full)):
        assert fused_attention.fits_masked(*head)
    # The last ones exceed vector memory.
    for head in ((64, 72, 120, half), (31 * 128, 72, 120, half), (4096, 72, 700, half), (4096, 72, 512, full)):
        assert not fused_attention.fits_masked(*head)
    assert [fused_attention._heads(16, n) for n in (256, 1024, 4096)] == [4, 2, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_in_full_precision_ask_it_only_of_float32(dtype):
    """As Mosaic, the compiler of TPU kernels, refuses it of bfloat16."""
    qkv = jnp.zeros((1, 3, 2, 8, 128), dtype)
    with jax.default_matmul_precision("highest"):
        gradient = jax.make_jaxpr(jax.grad(lambda x: fused_attention.attend(x, True).astype(jnp.float32).sum()))(qkv)
    used = {precision for matmul in matmuls(gradient.jaxpr) for precision in matmul.params["precision"]}
    assert used == {jax.lax.Precision.HIGHEST if dtype == "float32" else jax.lax.Precision.DEFAULT}
