"""Files that are wrong, preprocessing, tiles, and what a random encoder's tokens tell."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from lumos_jax import config, encoders
from lumos_jax.encoders import IMAGENET_STATISTICS, frozen, preprocess
from lumos_jax.encoders.kl import KLAutoencoder
from lumos_jax.weights import files


def load_vit(weights, heads=0):
    return frozen.load("image-encoder", weights, heads=heads)[:2]


@pytest.fixture
def vit_folder(goldens, tmp_path):
    """A Hugging Face folder that may be spoiled."""
    return shutil.copytree(goldens / "hf_vit_dino", tmp_path / "vit")


def spoil(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    return str(folder)


def test_a_missing_name_is_listed_with_what_is_near(vit_folder):
    def rename(state):
        state["embeddings.cls_tokem"] = state.pop("embeddings.cls_token")

    with pytest.raises(ValueError, match="do not fit") as error:
        load_vit(spoil(vit_folder, rename))
    assert "embeddings.cls_tokem" in str(error.value)
    assert "cls (32,): nothing fills it; expected embeddings.cls_token (near: embeddings.cls_tokem" in str(error.value)


def test_wrong_shapes_and_missing_layers_are_listed(vit_folder):
    def cut(state):
        state["layernorm.weight"] = state["layernorm.weight"][:8]
        for name in [n for n in state if ".layer.1.attention.attention.key" in n]:
            del state[name]

    with pytest.raises(ValueError, match=r"norm/scale: \(8,\) there, \(32,\) here") as error:
        load_vit(spoil(vit_folder, cut))
    assert "layer 1 lacks encoder.layer.{i}.attention.attention.key.weight" in str(error.value)


def test_truncated_safetensors(vit_folder):
    path = vit_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_vit(str(vit_folder))


def test_sharded_folders_load_and_missing_shards_are_named(vit_folder):
    path = vit_folder / "model.safetensors"
    state = load_file(path)
    names = sorted(state)
    whole = load_vit(str(vit_folder))
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for part, held in parts.items():
        save_file({name: state[name] for name in held}, vit_folder / part)
    path.unlink()
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (vit_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = load_vit(str(vit_folder))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole[1], sharded[1]))
    (vit_folder / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-2\.safetensors"):
        load_vit(str(vit_folder))


def test_other_architectures_are_refused(vit_folder, goldens):
    (vit_folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type='bert'"):
        load_vit(str(vit_folder))
    other = shutil.copytree(goldens / "diffusers_autoencoder_kl", vit_folder.parent / "kl")
    (other / "config.json").write_text(json.dumps({"_class_name": "VQModel", "down_block_types": []}))
    with pytest.raises(ValueError, match="AutoencoderKL"):
        frozen.load("autoencoder", str(other))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("/nowhere/model.safetensors", "no such file or directory"),
        ("./nothing", "no such file or directory"),
        ("weights/dino.pth", "no such file or directory"),
        ("facebook/dino-vitb16", "--local-dir DIR"),
    ],
)
def test_absent_weights_say_what_to_do(weights, message, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        files.locate(weights, "config.encoder.weights")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(48, 48), (40, 64), (90, 50)])
def test_preprocess_agrees_with_pillow(shape, interpolation):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    prepared = jax.jit(lambda x: preprocess(x, 24, interpolation, IMAGENET_STATISTICS))(image[None])
    ours = np.asarray(prepared)[0]
    short = min(shape)
    height, width = (int(side * 24 / short) for side in shape)
    resized = np.asarray(
        Image.fromarray(image).resize((width, height), Image.Resampling[interpolation.upper()]), np.float32
    )
    top, left = round((height - 24) / 2), round((width - 24) / 2)
    theirs = resized[top : top + 24, left : left + 24]
    mean, std = 255 * np.array(IMAGENET_STATISTICS)
    gray = ours * std + mean
    assert np.abs(gray - theirs).max() < 1.01


SMALL = config.Encoder(
    weights="random:3", size="96x2x4/8", image_size=32
)  # fmt: skip


@pytest.mark.parametrize(("output", "tokens"), [("cls", 1), ("patch", 16), ("all", 17)])
def test_token_choice_and_normalization(output, tokens):
    encoder, params = encoders.make_encoder(dataclasses.replace(SMALL, output=output))
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    feature = np.asarray(encoder.apply(params, image))
    assert feature.shape == (2, tokens, 96) == (2, encoder.tokens, encoder.dim)
    np.testing.assert_allclose(np.linalg.norm(feature, axis=-1), 1.0, rtol=1e-5)


def test_random_weights_are_their_seed_and_identified():
    first, a = encoders.make_encoder(SMALL)
    again, b = encoders.make_encoder(SMALL)
    other, c = encoders.make_encoder(dataclasses.replace(SMALL, weights="random:4"))
    assert first == again
    assert hash(first) == hash(again)
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    assert not np.array_equal(a["patch"]["kernel"], c["patch"]["kernel"])
    assert first.identity != other.identity


def test_features_are_computed_in_the_dtype_that_is_asked_for():
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    exact, rounded = (
        np.asarray(encoder.apply(params, image))
        for encoder, params in (encoders.make_encoder(SMALL, dtype=dtype) for dtype in ("float32", "bfloat16"))
    )
    assert 1e-5 < np.abs(exact - rounded).max() < 0.03  # bfloat16 keeps 8 bits


def test_random_tokens_still_say_what_is_where():
    """A linear map from a patch's token gives its mean color and its place back: what the desk run conditions on."""
    encoder, params = encoders.make_encoder(dataclasses.replace(SMALL, output="patch"))
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (400, 4, 4, 3), np.uint8)
    tokens = np.asarray(encoder.apply(params, coarse.repeat(8, 1).repeat(8, 2))).reshape(-1, 96)
    place = np.tile(np.stack(np.meshgrid(range(4), range(4), indexing="ij"), -1).reshape(-1, 2), (400, 1)) / 3
    wanted = np.concatenate([coarse.reshape(-1, 3) / 255, place], axis=1)
    design = np.concatenate([tokens, np.ones((len(tokens), 1))], axis=1)
    half = len(design) // 2
    weights = np.linalg.lstsq(design[:half], wanted[:half], rcond=None)[0]
    error = wanted[half:] - design[half:] @ weights
    explained = 1 - (error**2).mean(0) / wanted[half:].var(0)
    assert explained.min() > 0.9, explained


def test_encoder_sizes_that_do_not_divide(vit_folder):
    wrong = config.Encoder(weights=str(vit_folder), image_size=30)
    with pytest.raises(ValueError, match="not divisible by the patch size 8"):
        encoders.make_encoder(wrong)


def test_tiled_decode_is_close_to_the_whole():
    network = KLAutoencoder(channels=(8, 16), layers=1, groups=4)
    params = network.init(jax.random.key(0))
    smooth = jax.image.resize(jax.random.normal(jax.random.key(1), (1, 3, 4, 4)), (1, 20, 27, 4), "cubic")
    decode = jax.jit(lambda x, tile: network.decode(params, x, tile), static_argnums=1)
    whole, tiled = np.asarray(decode(smooth, 128)), np.asarray(decode(smooth, 16))
    assert tiled.shape == whole.shape == (1, 40, 54, 3)
    # Group norms see one tile instead of the picture, which shifts the levels of a random network but not what is drawn.
    assert np.corrcoef(tiled.ravel(), whole.ravel())[0, 1] > 0.85
    assert not np.array_equal(tiled, whole)
    assert np.array_equal(np.asarray(decode(smooth, 32)), whole)


def test_posterior_mode_sample_and_scale(goldens):
    small = config.Autoencoder(weights=str(goldens / "diffusers_autoencoder_kl"), scaling_factor=0.5)
    autoencoder, params = encoders.make_autoencoder(small)
    assert autoencoder.latent_shape(32) == (16, 16, 4)
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    mean, log_variance = autoencoder.network.moments(params, jnp.asarray(image, jnp.float32) / 127.5 - 1)
    np.testing.assert_allclose(autoencoder.mode(params, image), mean, rtol=1e-5, atol=1e-6)  # unscaled
    moments = autoencoder.moments(params, image)
    np.testing.assert_allclose(autoencoder.mean(moments), mean * 0.5, rtol=1e-5, atol=1e-6)
    first = autoencoder.encode(params, image, jax.random.key(0))
    np.testing.assert_array_equal(first, autoencoder.sample(moments, jax.random.key(0)))
    samples = np.stack([autoencoder.sample(moments, jax.random.key(i)) for i in range(40)]) / 0.5
    np.testing.assert_allclose(samples.std(0).mean(), np.exp(0.5 * log_variance).mean(), rtol=0.1)
    with pytest.raises(ValueError, match="not divisible"):
        autoencoder.latent_shape(33)


def test_identity_keeps_pixels():
    autoencoder, params = encoders.make_autoencoder(config.Autoencoder(weights="identity"))
    image = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3) * 5
    latent = autoencoder.encode(params, image, jax.random.key(0))
    assert latent.min() >= -1
    assert latent.max() <= 1
    np.testing.assert_allclose((autoencoder.decode(params, latent) + 1) * 127.5, image, atol=1e-3)


def test_tokens_are_normalised_as_the_config_says():
    settings = config.Encoder(
        weights="random:0", size="32x1x2/8", image_size=16,
        output="all",
    )  # fmt: skip
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)

    def tokens(normalize):
        encoder, params = encoders.make_encoder(dataclasses.replace(settings, normalize=normalize))
        return np.asarray(encoder.apply(params, image), np.float64)

    raw = tokens("none")
    np.testing.assert_allclose(tokens("unit"), raw / np.linalg.norm(raw, axis=-1, keepdims=True), rtol=1e-4)
    wanted = (raw - raw.mean(-1, keepdims=True)) / raw.std(-1, ddof=1, keepdims=True)
    np.testing.assert_allclose(tokens("standard"), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"normalize=white needs weights that say how .* random:0, output all, does not"
    ):
        tokens("white")
    assert np.abs(raw.std(-1) - 1).max() < 0.5  # the last norm, without a deviation of its own
