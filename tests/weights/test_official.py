"""The network agrees with the official PyTorch release, and reads and writes its names."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax import config
from lumos_jax.models import Condition, layers, make_dit
from lumos_jax.weights import official
from lumos_jax.weights.rules import parameter_shapes

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


def network(arrays, **more):
    width, depth, heads, side = (int(arrays[k]) for k in ("hidden_size", "depth", "num_heads", "input_size"))
    model = config.Model(size=f"{width}x{depth}x{heads}", dtype="float32")
    tokens = arrays["y"].shape[2:]
    return make_dit(model, latent_shape=(side, side, 4), out_channels=8, token_shape=tokens, **more)


def load(name):
    with np.load(GOLDENS / name) as arrays:
        arrays = dict(arrays)
    return {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}, arrays


def condition_of(arrays, masked=True):
    mask = jnp.asarray(arrays["mask"])[:, 0, 0].astype(bool) if masked and "mask" in arrays else None
    return Condition(tokens=jnp.asarray(arrays["y"])[:, 0], token_mask=mask)


def output(dit, params, arrays, condition):
    x = jnp.asarray(arrays["x"]).transpose(0, 2, 3, 1)
    return np.asarray(jax.jit(dit.apply)(params, x, jnp.asarray(arrays["t"]), condition).transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def golden():
    state, arrays = load("lumos_i2i.npz")
    return state, network(arrays), arrays


def test_output_agrees_with_the_official_network(golden):
    state, dit, arrays = golden
    params, _ = official.from_official(state, parameter_shapes(dit), origin="golden")
    np.testing.assert_allclose(output(dit, params, arrays, condition_of(arrays)), arrays["out"], atol=1e-5, rtol=0)


def test_positions_agree_with_the_stored_table(golden):
    state, dit, _ = golden
    table = layers.positions((4, 4), dit.position_base, dit.position_scale, dit.width)
    np.testing.assert_allclose(table, state["pos_embed"][0], atol=1e-6)


def test_bfloat16_stays_near_float32(golden):
    state, dit, arrays = golden
    dit = dataclasses.replace(dit, dtype="bfloat16")
    params, _ = official.from_official(state, parameter_shapes(dit), origin="golden")
    error = np.abs(output(dit, params, arrays, condition_of(arrays)) - arrays["out"])
    # bfloat16 keeps 8 bits: 2^-8 of the output's scale an operation, over a dozen operations.
    assert 1e-5 < error.max() < 0.03 * np.abs(arrays["out"]).max()
    assert error.mean() < 0.01 * np.abs(arrays["out"]).mean()


def test_names_survive_the_round_trip_bit_for_bit(golden):
    state, dit, _ = golden
    params, report = official.from_official(state, parameter_shapes(dit), origin="golden")
    assert list(report.dropped) == ["pos_embed"]
    back = official.to_official(params, state["pos_embed"][0], dit.patch_size)
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_full_size_names_are_all_covered():
    shapes = json.loads((GOLDENS / "full_size_shapes" / "lumos_i2i_xl_2_256.json").read_text())
    dit = make_dit(config.Model(), latent_shape=(32, 32, 4), out_channels=8, token_shape=(1, 768))
    params, report = official.from_official(shapes, parameter_shapes(dit), origin="names")
    assert len(report.loaded) + len(report.dropped) == len(shapes)
    assert report.parameters == 822_006_176 + 768
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, jax.eval_shape(dit.init, jax.random.key(0)))


@pytest.mark.parametrize("masked", [True, False])
def test_text_to_image_agrees_with_the_official_network(masked):
    state, arrays = load("lumos_t2i.npz")
    dit = network(arrays)
    params, _ = official.from_official(state, parameter_shapes(dit), origin="golden")
    out = output(dit, params, arrays, condition_of(arrays, masked))
    np.testing.assert_allclose(out, arrays["out_masked" if masked else "out_unmasked"], atol=1e-5, rtol=0)


def test_multi_scale_agrees_with_the_official_network():
    state, arrays = load("lumos_t2i_ms.npz")
    dit = network(arrays, vector_kind="size", position_scale=float(arrays["lewei_scale"]))
    params, _ = official.from_official(state, parameter_shapes(dit), origin="golden")
    size = jnp.concatenate([arrays["img_hw"], arrays["aspect_ratio"]], axis=1)
    condition = dataclasses.replace(condition_of(arrays), vector=size)
    np.testing.assert_allclose(output(dit, params, arrays, condition), arrays["out"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(dit.null_condition(params, condition).vector, size)
    back = official.to_official(params, state["pos_embed"][0], dit.patch_size)
    assert back.keys() == state.keys()
    for name in state.keys() - {"pos_embed"}:
        np.testing.assert_array_equal(back[name], state[name], err_msg=name)


def test_pixart_agrees_and_loses_nothing():
    state, arrays = load("pixart.npz")
    dit = network(arrays)
    params, _ = official.from_pixart(state, parameter_shapes(dit), origin="golden")
    np.testing.assert_allclose(output(dit, params, arrays, condition_of(arrays)), arrays["out"], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"lacks t_block\.1\.weight"):
        official.from_pixart({k: v for k, v in state.items() if k != "t_block.1.weight"}, {}, origin="golden")


@pytest.mark.parametrize(
    ("name", "side", "more"),
    [
        ("lumos_t2i_xl_2_256", 32, {}),
        ("lumos_t2i_ms_xl_2_1024", 128, {"vector_kind": "size"}),
        ("pixart_alpha_xl_2_256", 32, {}),
    ],
)
def test_full_size_networks_are_all_covered(name, side, more):
    shapes = json.loads((GOLDENS / "full_size_shapes" / f"{name}.json").read_text())
    dit = make_dit(config.Model(), latent_shape=(side, side, 4), out_channels=8, token_shape=(120, 4096), **more)
    convert = official.from_pixart if name.startswith("pixart") else official.from_official
    params, report = convert(shapes, parameter_shapes(dit), origin="names")
    assert list(report.dropped) == ["pos_embed"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, jax.eval_shape(dit.init, jax.random.key(0)))


def test_a_missing_and_a_foreign_name_are_errors(golden):
    state, dit, _ = golden
    state = dict(state)
    state["final_layer.lineal.weight"] = state.pop("final_layer.linear.weight")
    with pytest.raises(ValueError, match=r"final_layer\.lineal\.weight(.|\n)*final/out/kernel"):
        official.from_official(state, parameter_shapes(dit), origin="golden")
    with pytest.raises(ValueError, match="vector/kernel"):
        official.to_official({"vector": {"kernel": np.zeros((6, 16))}}, np.zeros((16, 16)), 2)
