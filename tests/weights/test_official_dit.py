"""DiT's and RCG's released networks, against a forward pass written from the equations of their papers, in NumPy."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from lumos_jax import convert
from lumos_jax.models import Condition
from lumos_jax.tasks import releases
from lumos_jax.weights import torch_files

WIDTH, DEPTH, HEADS, PATCH, CHANNELS, GRID, CLASSES, FEATURES = 32, 2, 2, 4, 3, 4, 5, 6


def shapes(kind, width=WIDTH, depth=DEPTH, patch=PATCH, channels=CHANNELS, grid=GRID, classes=CLASSES, out=None):
    """Names and shapes as the releases have them."""
    linears = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for i in range(depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    linears["final_layer.linear"] = (patch**2 * (out or channels), width)
    linears["final_layer.adaLN_modulation.1"] = (2 * width, width)
    found = {"pos_embed": (1, grid**2, width), "x_embedder.proj.weight": (width, channels, patch, patch)}
    found |= {"x_embedder.proj.bias": (width,)}
    if kind == "rcg":
        linears["rep_embedder"] = (width, FEATURES)
        found |= {"fake_latent": (1, FEATURES), "y_embedder.embedding_table.weight": (1, width)}
    else:
        found |= {"y_embedder.embedding_table.weight": (classes + 1, width)}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def positions(width=WIDTH, grid=GRID):
    """The first half of the features encodes the column, the second the row; sines, then cosines."""
    frequencies = 10000 ** -(np.arange(width // 4) / (width // 4))
    rows, columns = np.divmod(np.arange(grid**2), grid)
    return np.concatenate([f(p[:, None] * frequencies) for p in (columns, rows) for f in (np.sin, np.cos)], axis=1)


def state_of(kind):
    rng = np.random.default_rng(3)
    state = {name: rng.normal(0, 0.15, shape).astype(np.float32) for name, shape in shapes(kind).items()}
    return state | {"pos_embed": positions()[None].astype(np.float32)}


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def gelu(kind, x):
    if kind == "rcg":
        return x * (1 + special.erf(x / math.sqrt(2))) / 2
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def reference(kind, state, x, t, given):
    """x (B, C, H, W), t (B,), given: the embedded condition (B, D) -> (B, out, H, W), float64."""
    w = {name: np.asarray(value, np.float64) for name, value in state.items()}

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    rows = x.shape[0]
    patches = x.reshape(rows, CHANNELS, GRID, PATCH, GRID, PATCH).transpose(0, 2, 4, 1, 3, 5).reshape(rows, GRID**2, -1)
    h = patches @ w["x_embedder.proj.weight"].reshape(WIDTH, -1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = t[:, None] * np.exp(-math.log(10000) * np.arange(128) / 128)
    wave = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", wave))) + given
    for i in range(DEPTH):
        parts = np.split(linear(f"blocks.{i}.adaLN_modulation.1", silu(c))[:, None], 6, axis=-1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        q, k, v = (
            part.reshape(rows, GRID**2, HEADS, -1).transpose(0, 2, 1, 3)
            for part in np.split(linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + scale_1) + shift_1), 3, axis=-1)
        )
        scores = special.softmax(q @ k.transpose(0, 1, 3, 2) / math.sqrt(WIDTH / HEADS), axis=-1)
        mixed = (scores @ v).transpose(0, 2, 1, 3).reshape(rows, GRID**2, WIDTH)
        h = h + gate_1 * linear(f"blocks.{i}.attn.proj", mixed)
        hidden = gelu(kind, linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + scale_2) + shift_2))
        h = h + gate_2 * linear(f"blocks.{i}.mlp.fc2", hidden)
    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", silu(c))[:, None], 2, axis=-1)
    out = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    out = out.reshape(rows, GRID, GRID, PATCH, PATCH, -1).transpose(0, 5, 1, 3, 2, 4)
    return out.reshape(rows, -1, GRID * PATCH, GRID * PATCH)


@pytest.mark.parametrize("kind", ["dit", "rcg"])
def test_output_agrees_with_the_equations(kind, tmp_path):
    state = state_of(kind)
    # As a training run saves it: the running average is what counts.
    other = {name: value + 1 for name, value in state.items()}
    tree = {"model": other, {"dit": "ema", "rcg": "model_ema"}[kind]: state, "epoch": np.array(3)}
    torch_files.save(tmp_path / "prior.pt", tree)
    prior = releases.load(str(tmp_path / "prior.pt"), "--source", kind=kind, heads=HEADS)
    assert list(prior.report.dropped) == ["pos_embed"] + ["y_embedder.embedding_table.weight"] * (kind == "rcg")
    dit = prior.network.__class__(**vars(prior.network) | {"dtype": "float32"})
    rng = np.random.default_rng(4)
    x = rng.normal(size=(4, CHANNELS, GRID * PATCH, GRID * PATCH)).astype(np.float32)
    t = np.array([0, 3, 20, 71], np.float32)  # float32 knows the angle of step 999 to 6e-5 only
    if kind == "dit":
        assert (prior.settings.data.sample_type, prior.settings.data.num_classes) == ("labeled", CLASSES)
        condition = Condition(vector=jnp.array([[0.0], [2], [4], [1]]))
        table = state["y_embedder.embedding_table.weight"]
        given, null = table[[0, 2, 4, 1]], table[[CLASSES]]
    else:
        feature = rng.normal(size=(4, FEATURES)).astype(np.float32)
        condition = Condition(vector=jnp.asarray(feature))
        given, null = (
            f @ state["rep_embedder.weight"].T + state["rep_embedder.bias"] for f in (feature, state["fake_latent"])
        )
    apply = jax.jit(dit.apply)
    for said, embedded in ((condition, given), (dit.null_condition(prior.params, condition), null)):
        out = apply(prior.params, jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(t), said)
        expected = reference(kind, state, x.astype(np.float64), t, embedded)
        np.testing.assert_allclose(np.asarray(out).transpose(0, 3, 1, 2), expected, atol=1e-5, rtol=0)


def test_full_size_names_of_dit_are_all_covered(capsys, tmp_path):
    """DiT-XL/2 at 256 px as its authors count it: 675,129,632 parameters, 294,912 of them fixed positions."""
    names = shapes("dit", width=1152, depth=28, patch=2, channels=4, grid=16, classes=1000, out=8)
    assert sum(math.prod(shape) for shape in names.values()) == 675_129_632
    prior = releases.read("dit", names, origin="names")
    assert prior.report.parameters == 675_129_632 - 294_912
    assert len(prior.report.loaded) + len(prior.report.dropped) == len(names)
    assert (prior.settings.model.size, prior.settings.data.image_size, prior.network.heads) == ("XL", 256, 16)
    assert jax.tree.map(np.shape, prior.params) == jax.tree.map(
        np.shape, jax.eval_shape(prior.network.init, jax.random.key(0))
    )


def test_kinds_are_told_apart_and_an_encoder_is_asked_for(tmp_path, capsys):
    np.savez(tmp_path / "rcg.npz", **state_of("rcg"))
    command = ["import", f"--source={tmp_path / 'rcg.npz'}", f"--heads={HEADS}", f"--out={tmp_path / 'out'}"]
    assert convert.main([*command, "--kind=dit"]) == 2
    assert "holds a rcg, not a dit: give --kind=rcg" in capsys.readouterr().err
    assert convert.main([*command, "--kind=rcg"]) == 2
    assert "--encoder is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert.main([*command, "--kind=rcg", "--dry-run"]) == 0
    assert "RCG keeps and does not look at" in capsys.readouterr().out
    state = state_of("dit")
    state["final_layer.adaLN_modulation.2.bias"] = state.pop("final_layer.adaLN_modulation.1.bias")
    with pytest.raises(ValueError, match=r"final_layer\.adaLN_modulation\.2\.bias(.|\n)*final/modulation/bias"):
        releases.read("dit", state, origin="it", heads=HEADS)
    prior = releases.read("dit", state_of("dit"), origin="it", heads=HEADS)
    with pytest.raises(ValueError, match="cannot be exported"):
        releases.write(prior.settings, prior.params)
