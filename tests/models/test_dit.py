"""The transformer's parts, conditions, remat policies and gradients."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax import config
from lumos_jax.models import Condition, layers, make_dit
from lumos_jax.models.dit import Block, DiT
from lumos_jax.planning import flops

TINY = config.Model(size="32x3x2", patch_size=2, dtype="float32")
BATCH, TOKENS, FEATURES = 2, 5, 12


def tiny(tokens=TOKENS, model=TINY, latent_shape=(8, 8, 4), **parts):
    shape = (tokens, FEATURES) if tokens else None
    made = make_dit(model, latent_shape=latent_shape, out_channels=8, token_shape=shape, **parts)
    return dataclasses.replace(made, unroll=1)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def make_params(dit, seed=0):
    """Initial parameters with every zero replaced, so that every part of the network shows in the output."""
    params = jax.jit(dit.init)(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten([p + 0.05 * normal(i, *p.shape) for i, p in enumerate(leaves)])


def inputs(dit, tokens=TOKENS, h=8, w=8):
    condition = Condition(
        tokens=normal(1, BATCH, tokens, FEATURES) if tokens else None,
        vector=normal(2, BATCH, dit.vector_dim) if dit.vector_dim else None,
        latent=normal(3, BATCH, h, w, dit.concat_channels) if dit.concat_channels else None,
    )
    return normal(0, BATCH, h, w, 4), jnp.asarray([3.0, 700.0]), condition


def gradients(dit, params, gather=None, **replace):
    dit = dataclasses.replace(dit, **replace)
    x, t, condition = inputs(dit, dit.token_shape[0])
    target = normal(9, BATCH, 8, 8, 8)

    def loss(params):
        return jnp.square(dit.apply(params, x, t, condition, gather=gather) - target).mean()

    return jax.jit(jax.grad(loss))(params)


@pytest.fixture(scope="module")
def reference():
    """A network, its parameters and their gradients as plain autodiff of the scan gives them."""
    dit = tiny()
    params = make_params(dit)
    return dit, params, gradients(dit, params)


def assert_trees_close(a, b, relative):
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = np.abs(np.asarray(left)).max()
        np.testing.assert_allclose(
            left, right, atol=relative * scale + 1e-11, rtol=0, err_msg=jax.tree_util.keystr(path)
        )


def test_xl_2_has_the_official_number_of_trainable_parameters():
    dit = make_dit(config.Model(), latent_shape=(32, 32, 4), out_channels=8, token_shape=(1, 768))
    shapes = jax.eval_shape(dit.init, jax.random.key(0))
    trained = jax.tree.map(lambda p, trains: p.size if trains else 0, shapes, dit.trainable())
    assert sum(jax.tree.leaves(trained)) == 822_006_176
    buffers = [path for path, trains in jax.tree_util.tree_leaves_with_path(dit.trainable()) if not trains]
    assert [jax.tree_util.keystr(path) for path in buffers] == ["['null']['tokens']"]


def test_logical_axes_name_every_dim_of_every_parameter():
    dit = tiny(vector_dim=6)
    shapes = jax.eval_shape(dit.init, jax.random.key(0))
    axes = dit.logical_axes()
    jax.tree.map(lambda p, names: len(names) == p.ndim or pytest.fail(f"{p.shape} {names}"), shapes, axes)
    assert axes["blocks"]["mlp"]["fc1"]["kernel"] == ("layers", "embed", "mlp")
    assert axes["blocks"]["attn"]["qkv_kernel"] == ("layers", "embed", None, "heads", "head_dim")
    assert axes["null"]["tokens"] == (None, None)


def test_initial_values_follow_the_recipe():
    wide = dataclasses.replace(TINY, size="128x3x2")
    dit = make_dit(wide, latent_shape=(8, 8, 4), out_channels=8, token_shape=(4, 96))
    params = jax.jit(dit.init)(jax.random.key(0))
    blocks = params["blocks"]
    for zero in (blocks["modulation"], blocks["cross"]["out_kernel"], params["final"]["out"]):
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(zero))
    # Xavier-uniform: bounded by sqrt(6 / (in + out)), which the largest of thousands of values comes close to.
    for kernel, fan in ((blocks["attn"]["qkv_kernel"], 4 * 128), (params["patch"]["kernel"], 16 + 128)):
        assert 0.99 < np.abs(kernel).max() / np.sqrt(6 / fan) <= 1.0
    assert not np.allclose(blocks["mlp"]["fc1"]["kernel"][0], blocks["mlp"]["fc1"]["kernel"][1])
    for kernel, std in (
        (params["time"]["fc1"]["kernel"], 0.02), (params["tokens"]["fc2"]["kernel"], 0.02),
        (params["null"]["tokens"], 96**-0.5), (params["final"]["table"], 128**-0.5),
    ):  # fmt: skip
        np.testing.assert_allclose(kernel.std(), std, rtol=0.1)


def test_initial_values_of_a_seed_stay():
    """Same seed, identical run: sums of magnitudes, as every version so far has had them."""
    params = jax.jit(tiny(vector_dim=6).init)(jax.random.key(0))
    sums = {name: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(part)) for name, part in params.items()}
    expected = {
        "blocks": 5051.967938, "final": 8.008235504, "null": 15.64292912, "patch": 92.18763872, "time": 147.8838863,
        "tokens": 22.19695773, "vector": 37.64493893,
    }  # fmt: skip
    assert sums == pytest.approx(expected, rel=1e-6)


def test_scan_gives_what_a_loop_over_blocks_gives():
    def run_blocks(model, *inputs):
        return model.blocks(*inputs)

    dit = tiny()
    params = make_params(dit)
    x, s, y = normal(0, BATCH, 16, 32), normal(1, BATCH, 32), normal(2, BATCH, TOKENS, 32)
    scanned, unrolled = (
        jax.jit(lambda params, d=d: DiT(d).apply({"params": params}, x, s, y, None, 0, method=run_blocks)[0])(params)
        for d in (dit, dataclasses.replace(dit, unroll=3))
    )
    block = jax.jit(lambda layer, x: Block(dit.heads, dit.mlp_hidden).apply({"params": layer}, x, s, y, None, 0)[0])
    for i in range(dit.depth):
        x = block(jax.tree.map(lambda p, i=i: p[i], params["blocks"]), x)
    np.testing.assert_allclose(scanned, x, atol=1e-5)
    np.testing.assert_allclose(unrolled, x, atol=1e-5)


@pytest.mark.parametrize(
    "variant", [{"remat": "dots"}, {"remat": "qkv"}, {"remat": "mlp"}, {"remat": "full", "unroll": 3}]
)
def test_gradients_do_not_depend_on_remat_or_unrolling(reference, variant):
    dit, params, base = reference
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(base))
    silent = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(base) if not np.any(g)]
    assert silent == ["['null']['tokens']"]
    assert_trees_close(base, gradients(dit, params, **variant), 1e-5 if "unroll" in variant else 1e-6)


def test_what_remat_policies_compute_again(reference):
    """By the FLOPs of the traced gradient: "full" does all of a block's forward pass again, "mlp" all but the two products of
    its MLP, "qkv" also all but the projection to queries, keys and values, "dots" two matmuls of attention."""
    dit, params, _ = reference
    none, dots, qkv, mlp, full = (
        flops.count(lambda p, r=r: gradients(dit, p, remat=r), params) for r in ("none", "dots", "qkv", "mlp", "full")
    )
    attention = dit.depth * 2 * 2 * BATCH * 16 * (16 + TOKENS) * 32  # logits and values
    assert none < dots <= none + attention
    assert dots < qkv
    assert mlp == qkv + dit.depth * 2 * BATCH * 16 * 32 * (3 * 32)
    assert full == mlp + dit.depth * 2 * 2 * BATCH * 16 * 32 * 128


def test_gather_sees_one_layer_and_changes_nothing_by_itself(reference):
    dit, params, base = reference
    seen = []

    def gather(layer):
        seen.append(layer["mlp"]["fc1"]["kernel"].shape)
        return layer

    assert_trees_close(base, gradients(dit, params, gather=gather), 1e-6)
    assert set(seen) == {(32, 128)}


def test_masked_tokens_change_nothing():
    dit = tiny()
    params = make_params(dit)
    x, t, condition = inputs(dit)
    mask = jnp.asarray([[True] * 3 + [False] * 2, [True] * 5])
    apply = jax.jit(dit.apply)
    out = apply(params, x, t, dataclasses.replace(condition, token_mask=mask))
    other = condition.tokens.at[0, 3:].set(100.0)
    np.testing.assert_array_equal(out, apply(params, x, t, Condition(tokens=other, token_mask=mask)))
    assert np.abs(out - apply(params, x, t, Condition(tokens=other)))[0].max() > 1e-3
    short = apply(params, x[:1], t[:1], Condition(tokens=condition.tokens[:1, :3]))
    np.testing.assert_allclose(out[:1], short, atol=1e-5)


def test_concatenated_latents_and_vector_reach_the_output():
    dit = tiny(vector_dim=6, concat_channels=3)
    params = make_params(dit)
    x, t, condition = inputs(dit)
    apply = jax.jit(dit.apply)
    out = apply(params, x, t, condition)
    assert out.shape == (BATCH, 8, 8, 8)
    for change in ({"latent": condition.latent + 1}, {"vector": condition.vector + 1}):
        assert np.abs(out - apply(params, x, t, dataclasses.replace(condition, **change))).max() > 1e-3
    # The first channels of the patch projection are the noisy latent's: zero latents leave those weights alone.
    plain = tiny(vector_dim=6)
    kernel = params["patch"]["kernel"].reshape(4, 7, 32)[:, :4].reshape(16, 32)
    small = params | {"patch": params["patch"] | {"kernel": kernel}}
    zero = dataclasses.replace(condition, latent=jnp.zeros_like(condition.latent))
    expected = jax.jit(plain.apply)(small, x, t, dataclasses.replace(condition, latent=None))
    np.testing.assert_allclose(apply(params, x, t, zero), expected, atol=1e-5)


def test_absent_vector_is_zero_and_no_tokens_means_no_cross_attention():
    dit = tiny(tokens=0, vector_dim=6)
    params = make_params(dit)
    assert "cross" not in params["blocks"]
    x, t, condition = inputs(dit, tokens=0)
    no_bias = params | {"vector": params["vector"] | {"bias": jnp.zeros(32)}}
    apply = jax.jit(dit.apply)
    out = apply(no_bias, x, t, Condition())
    np.testing.assert_array_equal(out, apply(no_bias, x, t, Condition(vector=jnp.zeros_like(condition.vector))))


def test_null_condition_has_the_tables_and_no_gradient():
    dit = tiny(vector_dim=6, concat_channels=3)
    params = make_params(dit)
    _, _, condition = inputs(dit)
    condition = dataclasses.replace(condition, token_mask=jnp.ones((BATCH, TOKENS), bool))
    null = dit.null_condition(params, condition)
    assert jax.tree.map(jnp.shape, null) == jax.tree.map(jnp.shape, condition)
    np.testing.assert_array_equal(null.tokens[1], params["null"]["tokens"])
    np.testing.assert_array_equal(null.vector[0], params["null"]["vector"])
    assert not np.any(null.latent)
    pull = jax.grad(lambda p: dit.null_condition(p, condition).tokens.sum())(params)
    assert not np.any(pull["null"]["tokens"])


def test_non_square_grids():
    """Rows and columns are told apart: transposing the image and every x <-> y in the network gives the transposed output."""
    wide, tall = tiny(latent_shape=(8, 16, 4)), tiny(latent_shape=(16, 8, 4))
    params = make_params(wide)
    x, t, condition = inputs(wide, h=8, w=16)
    out = jax.jit(wide.apply)(params, x, t, condition)
    assert out.shape == (BATCH, 8, 16, 8)
    half = jnp.roll(jnp.arange(32), 16)
    np.testing.assert_array_equal(
        layers.positions((4, 8), (4, 8), 1.0, 32).reshape(4, 8, 32)[..., half],
        layers.positions((8, 4), (8, 4), 1.0, 32).reshape(8, 4, 32).swapaxes(0, 1),
    )
    patch, final = params["patch"], params["final"]
    turned = params | {
        "patch": patch | {"kernel": patch["kernel"].reshape(2, 2, 4, 32).swapaxes(0, 1).reshape(16, 32)},
        "final": final | {
            "out": {
                "kernel": final["out"]["kernel"].reshape(32, 2, 2, 8).swapaxes(1, 2).reshape(32, 32),
                "bias": final["out"]["bias"].reshape(2, 2, 8).swapaxes(0, 1).reshape(32),
            }
        },
    }  # fmt: skip
    # Only the positions still tell x from y, so the turned network differs until their halves are exchanged too.
    other = jax.jit(tall.apply)(turned, x.swapaxes(1, 2), t, condition).swapaxes(1, 2)
    assert np.abs(out - other).max() > 1e-3
    plain = layers.positions
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(layers, "positions", lambda *args: plain(*args)[:, half])
        other = jax.jit(tall.apply)(turned, x.swapaxes(1, 2), t, condition).swapaxes(1, 2)
    np.testing.assert_allclose(out, other, atol=1e-5)


def test_positions_are_squeezed_into_the_range_of_the_training_grid():
    small = layers.positions((4, 4), (4, 4), 1.0, 32).reshape(4, 4, 32)
    large = layers.positions((8, 8), (4, 4), 1.0, 32).reshape(8, 8, 32)
    np.testing.assert_allclose(large[::2, ::2], small, atol=1e-6)
    np.testing.assert_allclose(layers.positions((4, 4), (4, 4), 2.0, 32).reshape(4, 4, 32), large[:4, :4], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, t, c: (x, t, Condition()), "condition.tokens has shape None"),
        (lambda x, t, c: (x, t, Condition(tokens=c.tokens[..., :5])), "token_shape=(5, 12)"),
        (lambda x, t, c: (x[:, :7], t, c), "multiples of the patch size 2"),
        (lambda x, t, c: (x, t, dataclasses.replace(c, latent=x)), "concatenates 0 channels"),
        (lambda x, t, c: (x, t, dataclasses.replace(c, vector=t[:, None])), "vector_dim=0"),
    ],
)
def test_shapes_that_do_not_fit_are_named(make, message):
    dit = tiny()
    params = jax.eval_shape(dit.init, jax.random.key(0))
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(dit.apply, params, *make(*inputs(dit)))


def test_latents_that_do_not_divide_into_patches_are_named():
    with pytest.raises(ValueError, match=r"8x8 do not divide into patches of config\.model\.patch_size=3"):
        tiny(model=dataclasses.replace(TINY, patch_size=3))
