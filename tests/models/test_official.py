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
from lumos_jax.models import Condition, layers, make_dit, official

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS / "lumos_i2i.npz") as arrays:
        arrays = dict(arrays)
    state = {name.removeprefix("param/"): value for name, value in arrays.items() if name.startswith("param/")}
    width, depth, heads, side = (int(arrays[k]) for k in ("hidden_size", "depth", "num_heads", "input_size"))
    model = config.Model(size="custom", width=width, depth=depth, heads=heads, patch_size=2, dtype="float32")
    dit = make_dit(model, latent_shape=(side, side, 4), out_channels=8, token_shape=(1, 24))
    return state, dit, arrays


def forward(dit, params, arrays):
    x = jnp.asarray(arrays["x"]).transpose(0, 2, 3, 1)
    out = jax.jit(dit.apply)(params, x, jnp.asarray(arrays["t"]), Condition(tokens=jnp.asarray(arrays["y"])[:, 0]))
    return np.asarray(out.transpose(0, 3, 1, 2))


def test_output_agrees_with_the_official_network(golden):
    state, dit, arrays = golden
    params, _ = official.from_official(state, dit, origin="golden")
    np.testing.assert_allclose(forward(dit, params, arrays), arrays["out"], atol=1e-5, rtol=0)


def test_positions_agree_with_the_stored_table(golden):
    state, dit, _ = golden
    table = layers.positions((4, 4), dit.position_base, dit.position_scale, dit.width)
    np.testing.assert_allclose(table, state["pos_embed"][0], atol=1e-6)


def test_bfloat16_stays_near_float32(golden):
    state, dit, arrays = golden
    dit = dataclasses.replace(dit, dtype="bfloat16")
    params, _ = official.from_official(state, dit, origin="golden")
    error = np.abs(forward(dit, params, arrays) - arrays["out"])
    # bfloat16 keeps 8 bits: 2^-8 of the output's scale an operation, over a dozen operations.
    assert 1e-5 < error.max() < 0.03 * np.abs(arrays["out"]).max()
    assert error.mean() < 0.01 * np.abs(arrays["out"]).mean()


def test_names_survive_the_round_trip_bit_for_bit(golden):
    state, dit, _ = golden
    params, account = official.from_official(state, dit, origin="golden")
    assert list(account.dropped) == ["pos_embed"]
    back = official.to_official(params, dit)
    assert back.keys() == state.keys()
    for name, value in state.items():
        tolerance = 1e-6 if name == "pos_embed" else 0
        np.testing.assert_allclose(back[name], value, atol=tolerance, rtol=0, err_msg=name)


def test_full_size_names_are_all_covered():
    shapes = json.loads((GOLDENS / "full_size_shapes" / "lumos_i2i_xl_2_256.json").read_text())
    dit = make_dit(config.Model(), latent_shape=(32, 32, 4), out_channels=8, token_shape=(1, 768))
    params, account = official.from_official(shapes, dit, origin="names")
    assert len(account.loaded) + len(account.dropped) == len(shapes)
    assert account.parameters == 822_006_176 + 768
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, jax.eval_shape(dit.init, jax.random.key(0)))


def test_a_missing_and_a_foreign_name_are_errors(golden):
    state, dit, _ = golden
    state = dict(state)
    state["final_layer.lineal.weight"] = state.pop("final_layer.linear.weight")
    with pytest.raises(ValueError, match=r"final_layer\.lineal\.weight(.|\n)*final/out/kernel"):
        official.from_official(state, dit, origin="golden")
    other = make_dit(
        config.Model(size="custom", width=16, depth=1, heads=2),
        latent_shape=(8, 8, 4),
        out_channels=8,
        token_shape=None,
        vector_dim=6,
    )
    with pytest.raises(ValueError, match="vector/kernel"):
        official.to_official({}, other)
