"""The encoder that comes with the package: small, self-supervised, and better at scenes than a random one of its size."""

import dataclasses
import pathlib

import jax
import numpy as np

from lumos_jax import config, data, encoders, evaluation
from lumos_jax.encoders import frozen, whitening
from tests.fields import data_settings

SCENES = config.Encoder(weights="scenes", output="all", normalize="none", image_size=32)
BANK, QUERIES = 1024, 512
FIRST = 2**31  # far from the scenes that it was trained on


def test_nearest_neighbors_of_the_shipped_encoder_agree_on_what_is_shown():
    assert sum(path.stat().st_size for path in pathlib.Path(frozen.SHIPPED).iterdir()) < 3_000_000
    settings = data_settings(source="scenes", image_size=48, scenes__num_scenes=2**32 - 1)
    source = data.make_source(settings)
    records = range(FIRST, FIRST + BANK + QUERIES)
    images = data.read_batch(settings, source, records)["image"]
    truth = data.truth_of(source, records)
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
