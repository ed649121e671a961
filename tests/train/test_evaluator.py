"""What samples are scored against."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from configs import dino, i2i
from configs.ablations import unconditional
from lumos_jax import data, evaluation
from lumos_jax.config import io as config_io
from lumos_jax.train.evaluator import Scorer, make_evaluator
from lumos_jax.train.experiment import Experiment


def scorer_of(config):
    settings = config_io.resolve(config)
    settings = dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, num_scored=16))
    return Scorer(Experiment.build(settings), data.make_source(settings.data))


def test_the_prior_is_scored_against_the_images_of_its_features():
    scorer = scorer_of(i2i.get_config("test"))
    (host,) = scorer.hosts
    truth = scorer.sampling.truth(host)
    scores = evaluation.reconstruction_scores(truth, host["image"])
    assert (scores["psnr"] == 100).all()
    np.testing.assert_allclose(scores["ssim"], 1, atol=1e-6)
    assert evaluation.reconstruction_scores(np.roll(truth, 1, axis=0), host["image"])["psnr"].mean() < 20
    assert scorer.sampling.truth({"latent": host["image"], "feature": host["image"]}) is None


def test_nothing_is_sampled_where_no_truth_is_known():
    assert scorer_of(unconditional.get_config("test"))(params=None) == {}


@pytest.mark.parametrize("configs", [i2i, dino])
def test_held_out_records_that_are_all_corrupt_are_an_error_that_names_one(configs, tmp_path):
    for i in range(32):
        Image.new("RGB", (16, 16), (8 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    made = configs.get_config("test")
    made.data.source, made.data.path, made.data.holdout = "folder", str(tmp_path), 16
    made.eval.num_examples = made.train.batch_size = 8
    settings = config_io.resolve(made)
    source = data.make_source(settings.data)
    held_out = data.holdout_records(settings.data, source)
    paths = [tmp_path / f"{record:02}.png" for record in held_out]
    for path in paths[1:]:
        path.write_bytes(b"no image")
    assert make_evaluator(Experiment.build(settings), source) is not None  # one is enough
    paths[0].write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the \d+ held-out records of config\.data\.source=folder .*\.png"):
        make_evaluator(Experiment.build(settings), source)
