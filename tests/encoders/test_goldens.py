"""Parity of the frozen networks with the reference implementations, and full-size name lists by shape alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax.encoders import frozen

CLOSE = dict(rtol=0, atol=1e-5)


def load_vit(weights, heads=0):
    return frozen.load("image-encoder", weights, heads=heads)[:2]


def channels_last(x):
    return np.moveaxis(x, 1, -1)


@pytest.fixture
def dino(goldens, tmp_path):
    """The official DINO golden as a file of official names."""
    golden = dict(np.load(goldens / "dino_vit.npz"))
    path = tmp_path / "dino.npz"
    np.savez(path, **{k.removeprefix("param/"): v for k, v in golden.items() if k.startswith("param/")})
    return golden, *load_vit(str(path), heads=int(golden["num_heads"]))


def test_official_dino(dino):
    golden, vit, params = dino
    tokens = jax.jit(vit.apply)(params, channels_last(golden["image"]))
    np.testing.assert_allclose(tokens, golden["tokens"], **CLOSE)
    np.testing.assert_allclose(tokens[:, 0], golden["cls"], **CLOSE)


def test_official_dino_interpolates_positions(dino):
    golden, vit, params = dino
    tokens = jax.jit(vit.apply)(params, channels_last(golden["image_larger"]))
    np.testing.assert_allclose(tokens[:, 0], golden["cls_larger"], **CLOSE)


def test_bfloat16_stays_within_two_percent(dino):
    golden, vit, params = dino
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    tokens = jax.jit(vit.apply)(params, jnp.asarray(channels_last(golden["image"]), jnp.bfloat16))
    error = np.abs(np.asarray(tokens, np.float32) - golden["tokens"]).max()
    assert error < 0.02 * np.abs(golden["tokens"]).max()


@pytest.mark.parametrize("name", ["hf_vit_dino", "hf_dinov2", "hf_clip_vision"])
def test_hugging_face_folders(goldens, name):
    vit, params = load_vit(str(goldens / name))
    golden = np.load(goldens / name / "expected.npz")
    tokens = jax.jit(vit.apply)(params, channels_last(golden["image"]))
    np.testing.assert_allclose(tokens, golden["last_hidden_state"], **CLOSE)
    if "image_embeds" in golden:
        np.testing.assert_allclose(jax.jit(vit.project)(params, tokens), golden["image_embeds"], **CLOSE)


def test_autoencoder(goldens):
    network, params, _ = frozen.load("autoencoder", str(goldens / "diffusers_autoencoder_kl"))
    golden = np.load(goldens / "diffusers_autoencoder_kl" / "expected.npz")
    mean, log_variance = jax.jit(lambda x: network.moments(params, x))(channels_last(golden["pixels"]))
    np.testing.assert_allclose(mean, channels_last(golden["latent_mean"]), **CLOSE)
    np.testing.assert_allclose(log_variance, channels_last(golden["latent_logvar"]), **CLOSE)
    decoded = jax.jit(lambda x: network.decode(params, x))(channels_last(golden["latent_mean"]))
    np.testing.assert_allclose(decoded, channels_last(golden["decoded"]), **CLOSE)


@pytest.mark.parametrize(
    ("name", "parameters", "dropped"),
    [
        ("dino_vitb16_official", 85_798_656, set()),
        ("hf_dino_vitb16", 85_798_656, {"pooler.dense.weight", "pooler.dense.bias"}),
        ("hf_dinov2_base", 86_579_712, {"embeddings.mask_token"}),
        ("hf_clip_vit_large_patch14_vision", 303_966_208, set()),
    ],
)
def test_full_size_vit_by_shape(goldens, name, parameters, dropped):
    shapes = goldens / "full_size_shapes" / f"{name}.json"
    report = frozen.read("image-encoder", str(shapes), shapes_only=True).report
    assert report.parameters == parameters
    assert set(report.loaded) | set(report.dropped) == set(json.loads(shapes.read_text()))
    assert set(report.dropped) == dropped


def test_full_size_autoencoder_by_shape_under_its_old_names(goldens, tmp_path):
    shapes = json.loads((goldens / "full_size_shapes" / "diffusers_sd_vae_ft_mse.json").read_text())
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        shapes = {name.replace(f".{new}.", f".{old}."): shape for name, shape in shapes.items()}
    (tmp_path / "old.json").write_text(json.dumps(shapes))
    report = frozen.read("autoencoder", str(tmp_path / "old.json"), shapes_only=True).report
    assert report.parameters == 83_653_863
    assert len(report.loaded) == len(shapes)
