"""The encoders that come with the package: small, and better at scenes than a random one of their size."""

import dataclasses

import jax
import numpy as np
import pytest

from lumos_jax import config, data, encoders, evaluation
from lumos_jax.encoders import frozen, whitening
from tests.fields import data_settings

SCENES = config.Encoder(weights="scenes", output="all", normalize="none", image_size=32)
BANK, QUERIES = 1024, 512
FIRST = 2**31  # far from the scenes that it was trained on


@pytest.fixture(scope="module")
def shown():
    """A batch of scenes with captions, and what is true of them."""
    settings = data_settings(source="scenes", sample_type="captioned", image_size=48, scenes__num_scenes=2**32 - 1)
    source = data.make_source(settings)
    records = range(FIRST, FIRST + BANK + QUERIES)
    return data.read_batch(settings, source, records), data.truth_of(source, records)


def test_nearest_neighbors_of_the_shipped_encoder_agree_on_what_is_shown(shown):
    images, truth = shown[0]["image"], shown[1]
    cls, every = {}, {}
    random = dataclasses.replace(SCENES, weights="random:0", size="128x4x4/8")
    for name, wanted in (("shipped", dataclasses.replace(SCENES, normalize="white")), ("random", random)):
        encoder, params = encoders.make_encoder(wanted)
        assert (encoder.dim, encoder.vit.depth, encoder.vit.patch_size) == (128, 4, 8)
        plain = jax.jit(dataclasses.replace(encoder, settings=dataclasses.replace(wanted, normalize="none")).apply)
        tokens = np.concatenate([plain(params, part) for part in np.split(images, 6)])
        cls[name] = evaluation.neighbor_accuracy(tokens[:BANK, 0], tokens[BANK:, 0], truth)
        if name == "shipped":
            tokens = np.asarray(whitening.apply(params["whitening"], tokens))
            np.testing.assert_allclose(encoder.apply(params, images[:2]), tokens[:2], rtol=1e-3, atol=1e-3)
        features = tokens.reshape(len(tokens), -1)
        every[name] = evaluation.neighbor_accuracy(features[:BANK], features[BANK:], truth)
        if name == "shipped":
            flat = tokens.reshape(-1, tokens.shape[-1])
            assert np.abs(flat.mean(0)).max() < 0.1
            assert 0.5 < np.median(flat.var(0)) < 1.1
    assert cls["shipped"]["colour"] > cls["random"]["colour"] + 0.15, cls
    assert cls["shipped"]["count"] > cls["random"]["count"] + 0.03, cls
    # Of all tokens, as the desk prior has them.
    for name, more in (("shape", 0.06), ("colour", 0.1), ("count", 0.02)):
        assert every["shipped"][name] > every["random"][name] + more, every


@pytest.mark.parametrize("weights", ["scenes-moco", "scenes-clip"])
def test_nearest_neighbors_of_the_other_encoders_agree_on_colors_and_numbers(weights, shown):
    encoder, params = encoders.make_encoder(dataclasses.replace(SCENES, weights=weights, output="cls"))
    assert (encoder.dim, encoder.vit.depth, encoder.vit.patch_size) == (128, 4, 8)
    apply = jax.jit(encoder.apply)
    cls = np.concatenate([apply(params, part)[:, 0] for part in np.split(shown[0]["image"], 6)])
    found = evaluation.neighbor_accuracy(cls[:BANK], cls[BANK:], shown[1])
    assert found["colour"] > 0.6, found
    assert found["count"] > 0.42, found


def test_the_shipped_text_encoder_finds_the_captions_of_images(shown):
    images, captions = shown[0]["image"][:256], shown[0]["caption"][:256]
    features = []
    vision = dataclasses.replace(SCENES, weights="scenes-clip", output="pooled")
    encoder, params = encoders.make_encoder(vision)
    features.append(np.asarray(jax.jit(encoder.apply)(params, images))[:, 0])
    wanted = config.Encoder(kind="clip_text", weights="scenes-clip", output="pooled", tokenizer="scenes", max_tokens=64)
    encoder, params = encoders.make_text_encoder(wanted)
    tokens = encoders.tokenize(encoders.make_tokenizer(wanted, encoder), captions.tolist(), 64)
    features.append(np.asarray(jax.jit(encoder.apply)(params, tokens["tokens"], tokens["token_mask"]))[:, 0])
    found = evaluation.retrieval_accuracy(*features, captions)
    assert min(found.values()) > 0.4, found  # chance: 0.004


def test_shipped_weights_are_small():
    sizes = {
        name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for name, folder in frozen.SHIPPED.items()
    }
    assert all(size < 3_000_000 for size in sizes.values()), sizes
