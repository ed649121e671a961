"""What samples are held against."""

import dataclasses
import types

import numpy as np

from configs import i2i
from configs.ablations import unconditional
from lumos_jax import data, tasks
from lumos_jax.config import io as config_io
from lumos_jax.train import sharding
from lumos_jax.train.scoring import Scorer, likeness


def run_of(config):
    settings = config_io.resolve(config)
    settings = dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, scored=16))
    task, frozen = tasks.make_task(settings)
    source = data.make_source(settings.data)
    mesh = sharding.make_mesh(settings.mesh)
    return types.SimpleNamespace(settings=settings, source=source, task=task, frozen=frozen, mesh=mesh)


def test_the_prior_is_held_against_the_pictures_of_its_features():
    run = run_of(i2i.get_config("test"))
    (host,) = Scorer(run, None).hosts
    truth = run.task.truth(host)
    scores = likeness(truth, host["image"])
    assert (scores["psnr"] == 100).all()
    np.testing.assert_allclose(scores["ssim"], 1, atol=1e-6)
    assert likeness(np.roll(truth, 1, axis=0), host["image"])["psnr"].mean() < 20
    assert run.task.truth({"latent": host["image"], "feature": host["image"]}) is None


def test_nothing_is_drawn_where_no_truth_is_known():
    scorer = Scorer(run_of(unconditional.get_config("test")), None)
    assert scorer(params=None) == {}
