"""Parity of the frozen networks with the reference implementations, and full-size name lists by shape alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax.encoders import autoencoder as kl
from lumos_jax.encoders import latents
from lumos_jax.weights.vit_files import convert_vit, load_vit

CLOSE = dict(rtol=0, atol=1e-5)


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
    shape, params = latents.load_kl(str(goldens / "diffusers_autoencoder_kl"))
    golden = np.load(goldens / "diffusers_autoencoder_kl" / "expected.npz")
    mean, log_variance = jax.jit(lambda x: kl.moments(shape, params, x))(channels_last(golden["pixels"]))
    np.testing.assert_allclose(mean, channels_last(golden["latent_mean"]), **CLOSE)
    np.testing.assert_allclose(log_variance, channels_last(golden["latent_logvar"]), **CLOSE)
    decoded = jax.jit(lambda x: kl.decode(shape, params, x))(channels_last(golden["latent_mean"]))
    np.testing.assert_allclose(decoded, channels_last(golden["decoded"]), **CLOSE)


@pytest.mark.parametrize(
    ("name", "told", "parameters", "dropped"),
    [
        ("dino_vitb16_official", None, 85_798_656, set()),
        ("hf_dino_vitb16", {"model_type": "vit"}, 85_798_656, {"pooler.dense.weight", "pooler.dense.bias"}),
        (
            "hf_dinov2_base",
            {"model_type": "dinov2", "hidden_size": 768, "patch_size": 14, "image_size": 518},
            86_579_712,
            {"embeddings.mask_token"},
        ),
        (
            "hf_clip_vit_large_patch14_vision",
            {
                "model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14,
                "intermediate_size": 4096, "num_attention_heads": 16,
            },
            303_966_208,
            set(),
        ),
    ],
)  # fmt: skip
def test_full_size_vit_by_shape(goldens, name, told, parameters, dropped):
    shapes = json.loads((goldens / "full_size_shapes" / f"{name}.json").read_text())
    _, _, account = convert_vit(shapes, told, 0, name)
    assert account.parameters == parameters
    assert set(account.loaded) | set(account.dropped) == set(shapes)
    assert set(account.dropped) == dropped


@pytest.mark.parametrize("old_names", [False, True])
def test_full_size_autoencoder_by_shape(goldens, old_names):
    shapes = json.loads((goldens / "full_size_shapes" / "diffusers_sd_vae_ft_mse.json").read_text())
    if old_names:
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            shapes = {name.replace(f".{new}.", f".{old}."): shape for name, shape in shapes.items()}
    _, account = latents.convert_kl(shapes, kl.KlShape(), "sd-vae")
    assert account.parameters == 83_653_863
    assert len(account.loaded) == len(shapes)
