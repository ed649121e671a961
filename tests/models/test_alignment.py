"""Alignment: pooling to another grid, and the projected tokens of a block, against NumPy."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config
from lumos_jax.models import Condition, alignment, layers, make_dit
from lumos_jax.models.dit import Block, DiT

SIDE, FEATURES = 2, 6


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_pooling_is_the_mean_over_the_area_of_a_patch():
    x = normal(0, 2, 64, 3)
    blocks = x.reshape(2, 4, 2, 4, 2, 3).mean((2, 4)).reshape(2, 16, 3)
    np.testing.assert_allclose(alignment.pool(jnp.asarray(x), (8, 8), 4), blocks, atol=1e-6)
    np.testing.assert_array_equal(alignment.coverage(4, 8), np.repeat(np.eye(4), 2, axis=0))
    thirds = [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]
    np.testing.assert_allclose(alignment.coverage(3, 2), thirds, atol=1e-6)
    np.testing.assert_allclose(alignment.coverage(16, 14).sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(alignment.coverage(16, 14).sum(0), 14 / 16, atol=1e-6)


def test_similarity_of_a_block_is_what_numpy_gives():
    block, model = 2, config.Model(size="16x3x2", patch_size=2, dtype="float32", remat="full")
    parts = {"latent_shape": (8, 8, 4), "out_channels": 4, "token_shape": (5, 12)}
    plain = make_dit(model, **parts)
    dit = dataclasses.replace(plain, align_block=block, align_shape=(SIDE, FEATURES))
    shapes = jax.eval_shape(dit.init, jax.random.key(0))
    params = jax.tree.map(lambda p: 0.2 * normal(p.size, *p.shape), shapes)
    x, t, tokens = (jnp.asarray(a) for a in (normal(1, 2, 8, 8, 4), np.float32([3, 700]), normal(2, 2, 5, 12)))
    target = normal(3, 2, 4, FEATURES)

    def aligned(params):
        out, hidden = dit.apply(params, x, t, Condition(tokens), aligned=True)
        return alignment.similarity(hidden, target).sum(), (out, hidden)

    grads, (out, hidden) = jax.jit(jax.grad(aligned, has_aux=True))(params)
    own = {name: part for name, part in params.items() if name != "align"}

    def first_blocks(params):
        bound = DiT(plain).bind({"params": params})
        h = bound.patch(layers.patchify(x, 2)) + layers.positions((4, 4), (4, 4), 1.0, 16)[None]
        s, y = nn.silu(bound.time(layers.sinusoid(t))), bound.tokens(tokens)
        for i in range(block):
            layer = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
            h, _ = Block(2, 64).apply({"params": layer}, h, s, y, None, 0)
        return plain.apply(params, x, t, Condition(tokens)), h

    expected, h = jax.jit(first_blocks)(own)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    h = np.asarray(h).reshape(2, 2, 2, 2, 2, 16).mean((2, 4)).reshape(2, 4, 16)
    for name in ("fc1", "fc2", "fc3"):
        h = h @ params["align"][name]["kernel"] + params["align"][name]["bias"]
        h = h / (1 + np.exp(-h)) if name != "fc3" else h
    np.testing.assert_allclose(hidden, h, atol=1e-5)
    cosine = (h * target).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(target, axis=-1)
    np.testing.assert_allclose(alignment.similarity(hidden, target), cosine.mean(-1), atol=1e-6)
    used = np.abs(grads["blocks"]["mlp"]["fc1"]["kernel"]).max((1, 2)) > 0
    assert used.tolist() == [True, True, False]  # later blocks have no gradient from it
