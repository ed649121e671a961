"""Parity of the frozen networks with the reference implementations, and full-size name lists by shape alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax import name_rules
from lumos_jax.encoders import autoencoder as kl
from lumos_jax.encoders import image_encoder, latents, names

CLOSE = dict(rtol=0, atol=1e-5)


def channels_last(x):
    return np.moveaxis(x, 1, -1)


@pytest.fixture
def dino(goldens, tmp_path):
    """The official DINO golden as a file of official names."""
    golden = dict(np.load(goldens / "dino_vit.npz"))
    path = tmp_path / "dino.npz"
    np.savez(path, **{k.removeprefix("param/"): v for k, v in golden.items() if k.startswith("param/")})
    return golden, *image_encoder.load_vit(str(path), heads=int(golden["num_heads"]))


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


def test_hugging_face_vit(goldens):
    vit, params = image_encoder.load_vit(str(goldens / "hf_vit_dino"))
    golden = np.load(goldens / "hf_vit_dino" / "expected.npz")
    tokens = jax.jit(vit.apply)(params, channels_last(golden["image"]))
    np.testing.assert_allclose(tokens, golden["last_hidden_state"], **CLOSE)


def test_autoencoder(goldens):
    shape, params = latents.load_kl(str(goldens / "diffusers_autoencoder_kl"))
    golden = np.load(goldens / "diffusers_autoencoder_kl" / "expected.npz")
    mean, log_variance = jax.jit(lambda x: kl.moments(shape, params, x))(channels_last(golden["pixels"]))
    np.testing.assert_allclose(mean, channels_last(golden["latent_mean"]), **CLOSE)
    np.testing.assert_allclose(log_variance, channels_last(golden["latent_logvar"]), **CLOSE)
    decoded = jax.jit(lambda x: kl.decode(shape, params, x))(channels_last(golden["latent_mean"]))
    np.testing.assert_allclose(decoded, channels_last(golden["decoded"]), **CLOSE)


@pytest.mark.parametrize("name", ["dino_vitb16_official", "hf_dino_vitb16"])
def test_full_size_vit_by_shape(goldens, name):
    shapes = json.loads((goldens / "full_size_shapes" / f"{name}.json").read_text())
    vit = image_encoder.Vit(768, 12, 12, 16, 224)
    target = name_rules.flatten(jax.eval_shape(vit.init, jax.random.key(0)))
    target = {path: leaf.shape for path, leaf in target.items()}
    _, account = name_rules.convert(shapes, names.vit_rules(shapes), target, origin=name)
    assert account.parameters == 85_798_656
    assert set(account.loaded) | set(account.dropped) == set(shapes)
    assert set(account.dropped) == {n for n in shapes if n.startswith("pooler")}


@pytest.mark.parametrize("old_names", [False, True])
def test_full_size_autoencoder_by_shape(goldens, old_names):
    shapes = json.loads((goldens / "full_size_shapes" / "diffusers_sd_vae_ft_mse.json").read_text())
    if old_names:
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            shapes = {name.replace(f".{new}.", f".{old}."): shape for name, shape in shapes.items()}
    _, account = latents.convert_kl(shapes, kl.KlShape(), "sd-vae")
    assert account.parameters == 83_653_863
    assert len(account.loaded) == len(shapes)
