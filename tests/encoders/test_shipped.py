"""The encoder that comes with the package: small, self-supervised, and far better at scenes than a random one of its size."""

import dataclasses
import pathlib

import numpy as np

from lumos_jax import config, data, encoders, evaluation
from lumos_jax.encoders import vit_files

SCENES = config.Encoder(weights="scenes", output="cls", normalize="none", resize=32, image_size=32, dtype="float32")
BANK, QUERIES = 1024, 512
FIRST = 2**31  # far from the scenes that it was trained on


def test_nearest_neighbours_of_the_shipped_encoder_agree_on_colour_and_count():
    assert sum(path.stat().st_size for path in pathlib.Path(vit_files.SHIPPED).iterdir()) < 3_000_000
    settings = config.Data(source="scenes", image_size=48, records=2**32 - 1)
    source = data.make_source(settings)
    records = range(FIRST, FIRST + BANK + QUERIES)
    images = data.read_batch(settings, source, records)["image"]
    truth = data.truth_of(settings, source, records)
    scores = {}
    random = dataclasses.replace(SCENES, weights="random:0", size="custom", width=128, depth=4, heads=4, patch_size=8)
    for name, wanted in (("shipped", SCENES), ("random", random)):
        encoder, params = encoders.make_encoder(wanted)
        assert (encoder.dim, encoder.vit.depth, encoder.vit.patch_size) == (128, 4, 8)
        features = np.concatenate([encoder.apply(params, part)[:, 0] for part in np.split(images, 6)])
        scores[name] = evaluation.neighbour_accuracy(features[:BANK], features[BANK:], truth, BANK)
    shipped, chance = scores["shipped"], scores["random"]
    assert shipped["colour"] > chance["colour"] + 0.15, scores
    assert shipped["count"] > chance["count"] + 0.12, scores
