"""config.eval.suite: the scores of a run are those that `lumos_jax.evaluate` gives its checkpoint."""

import dataclasses
import json

import numpy as np
import pytest

from configs import dino, i2i, t2i
from lumos_jax import evaluate, evaluation
from lumos_jax.config import io as config_io
from lumos_jax.evaluation import features, references, shards
from lumos_jax.evaluation.frechet import Moments, frechet_distance
from lumos_jax.train import loop
from lumos_jax.train.experiment import Experiment
from lumos_jax.train.suite import make_suite, parse


def configured(configs, suite):
    made = configs.get_config("test")
    made.eval.suite, made.eval.suite_every, made.eval.every = suite, 1, 0
    made.train.steps, made.train.seed, made.optimizer.decay = 2, 5, "constant"
    return config_io.resolve(made)


def test_a_run_is_scored_as_its_checkpoint(tmp_path):
    settings = configured(i2i, ("fd_scene_vit@40", "psnr@8"))
    assert loop.train(loop.prepare(settings, str(tmp_path / "run"))) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line for line in lines if "suite_psnr@8" in line}
    assert sorted(scored) == [1, 2]
    assert scored[2]["suite_psnr@8_error"] > 0
    assert scored[1]["suite_psnr@8"] != scored[2]["suite_psnr@8"]

    arguments = [
        f"--workdir={tmp_path / 'run'}",
        "--set=scenes",
        "--num=80",
        "--seed=5",
        "--batch=2",
        f"--out={tmp_path / 'samples'}",
    ]
    assert evaluate.main(["sample", *arguments]) == 0
    samples = shards.Samples(tmp_path / "samples")
    (_, _, pixels), truth = next(iter(samples)), samples.references(0)
    psnr = evaluation.reconstruction_scores(pixels[:8], truth[:8])["psnr"].mean()
    np.testing.assert_allclose(scored[2]["suite_psnr@8"], psnr, rtol=1e-6)
    network = features.open_network("scene_vit")
    sampled, others = (Moments.of(network(images)) for images in (pixels[:40], truth[40:]))
    reference = references.Reference(others.mean, others.covariance, 40, "scene_vit")
    distance = frechet_distance(sampled.mean, sampled.covariance, reference)
    np.testing.assert_allclose(scored[2]["suite_fd_scene_vit@40"], distance, rtol=1e-5)


def test_numbers_of_samples_are_part_of_the_name():
    assert {name: count for name, (_, count) in parse(("psnr@64", "fd_vgg16@2k")).items()} == {
        "psnr@64": 64,
        "fd_vgg16@2k": 2000,
    }


@pytest.mark.parametrize(
    ("configs", "suite", "message"),
    [
        (i2i, ("psnr",), "write METRIC@SAMPLES"),
        (i2i, ("psnrs@8",), "'psnrs' is unknown"),
        (i2i, ("fd_scene_vit@8",), "it needs 40 samples or more"),
        (i2i, ("scenes@8",), "which needs prompts"),
        (dino, ("psnr@8",), "task dino generates none"),
        (t2i, ("psnr@8",), "which these samples do not have"),
    ],
)
def test_metrics_that_a_run_cannot_have_are_refused_at_the_start(configs, suite, message):
    experiment = Experiment.build(configured(configs, suite))
    with pytest.raises(ValueError, match=message):
        make_suite(experiment)


def test_weights_that_no_package_carries_come_from_the_users_files(goldens):
    experiment = Experiment.build(configured(i2i, ("cmmd@40",)))

    def suite_with(**fields):
        settings = dataclasses.replace(
            experiment.settings, eval=dataclasses.replace(experiment.settings.eval, **fields)
        )
        return make_suite(dataclasses.replace(experiment, settings=settings))

    path = str(goldens / "hf_clip_vision")
    assert suite_with(network_weights=(f"clip={path}",)).networks["clip"].dim == 20
    for fields, message in (
        ({}, r"\(in training config\.eval\.network_weights\) of the hub.s openai/clip-vit-large-patch14-336"),
        ({"network_weights": (path,)}, r"config\.eval\.network_weights '.*hf_clip_vision' must be NETWORK=VALUE"),
        ({"network_protocol": ("clip=tf1",)}, "no protocol 'tf1': choose cmmd"),
    ):
        with pytest.raises(ValueError, match=message):
            suite_with(**fields)


def test_settings_belong_together():
    made = i2i.get_config("test")
    made.eval.suite = ("psnr@8",)
    with pytest.raises(ValueError, match=r"config\.eval\.suite=.* and suite_every=0 belong together"):
        config_io.resolve(made)
