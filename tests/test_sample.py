"""`lumos_jax.sample` on runs: what it writes, which program it runs, and what it refuses."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from configs import i2i
from lumos_jax import checkpoints, sample
from lumos_jax.config import io as config_io
from lumos_jax.train import loop, sampler
from lumos_jax.train.sharded_forward import ShardedForward
from tests.fields import put
from tests.running import pixels, untrained


def train(workdir, **changes):
    """A run of two steps."""
    made = i2i.test()
    made.train.steps = made.checkpoint.every = 2
    made.eval.every = 0
    made.optimizer.decay = "constant"
    put(made, changes)
    assert loop.train(loop.prepare(config_io.resolve(made), str(workdir))) == 0
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "i2i")


@pytest.fixture
def images(tmp_path):
    """--images and two files."""
    for name, color in (("a.jpg", (200, 30, 30)), ("b.png", (30, 30, 200))):
        Image.new("RGB", (40, 30), color).save(tmp_path / name)
    return ["--images", str(tmp_path / "a.jpg"), str(tmp_path / "b.png")]


def test_grids_and_paths(run, images, tmp_path):
    def sampled(name, *arguments):
        assert sample.main([f"--workdir={run}", *images, *arguments, f"--out={tmp_path / name}"]) == 0
        return pixels(tmp_path / name)

    grid = sampled("grid.png", "--num=3", "--steps=3")
    assert np.abs(grid - sampled("again.png", "--num=3", "--steps=3", "--batch=4")).max() <= 1  # whatever the batch
    side = grid.shape[0] // 2
    assert grid[side // 2, side // 2].argmax() == 0  # first row: the red source
    assert grid.shape[1] > 3.9 * 128
    assert sampled("path.png", "--interpolate=5").shape[1] > 6.9 * 128


def test_steps_are_reported_and_may_end_the_sampling(run, one_device):
    settings, _ = sampler.load_settings(str(run))
    seen, previews = [], []

    def on_step(progress):
        seen.append((progress.done, progress.total))
        previews.append(progress.preview())
        if progress.done == 6:
            raise InterruptedError

    loaded = sampler.load(str(run), settings, batch_size=2, on_step=on_step)
    host = {"image": np.stack([np.full((16, 16, 3), 60 * i, np.uint8) for i in range(3)])}
    condition, noise = loaded.condition(host), loaded.noise((3, *loaded.sampling.latent_shape))
    with pytest.raises(InterruptedError):
        loaded.generate(condition, noise)
    steps = settings.eval.steps
    assert seen == [(done, 2 * steps) for done in range(1, 7)]
    assert [len(preview) for preview in previews] == [2] * steps + [1] * (6 - steps)  # of the padded batch, one row
    whole = dataclasses.replace(loaded, on_step=None).generate(condition, noise)
    assert np.abs(whole[:2].astype(int) - previews[steps - 1]).mean() < 2  # of 255: x0, not x_t, which is noisy


def test_the_program_is_that_of_training(run):
    """Each device runs the network on its own rows, as in training: so it gets the attention kernels of its hardware."""
    settings, _ = sampler.load_settings(str(run))
    loaded = sampler.load(str(run), settings)
    assert isinstance(loaded.sampling.task.network, ShardedForward)
    assert loaded.experiment.mesh.size == len(jax.devices()) == 8
    host = {"image": np.zeros((8, 16, 16, 3), np.uint8)}

    def generate(condition, noise):
        frozen = loaded.experiment.frozen
        return loaded.sampling.generate(loaded.params, frozen, condition, noise, jax.random.key(0), settings.eval)

    program = jax.make_jaxpr(generate)(loaded.condition(host), loaded.noise((8, *loaded.sampling.latent_shape)))
    assert "shard_map" in str(program)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "/nowhere.png"], "/nowhere.png cannot be read"),
        (["--images", "/nowhere.png", "--interpolate=4"], "exactly two"),
        (["--images", "held-out:32"], "this run holds out 32 records"),
        (["--images", "/nowhere.png", "--sampler=heun"], "does not solve"),
        (["--images", "/nowhere.png", "--checkpoint=5"], "no checkpoint 5"),
        (["--images", "/nowhere.png", "--num=0"], "--num=0 must be at least 1"),
        (
            ["--images", "a.png", "--classes", "3"],
            "--classes is no flag of this run, whose task is i2i: it takes --images,",
        ),
        (["--num=2"], "the following arguments are required: --images"),
        (["--images", "held-out:0", "--out=x.jpg"], "--out=x.jpg: the name must end in .png"),
        (["--images", "held-out:0", "--out=FILE/x.png"], "cannot be written: File exists"),
        (["--images", "held-out:0", "--out=FOLDER.png"], "is a folder; give the name of a file"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_sampled(run, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "FOLDER.png").mkdir()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    checkpoints.quiet_logs()  # as the program does; a test before it may have given absl a handler of its own
    assert sample.main([f"--workdir={run}", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "FOLDER.png"]


def test_directories_without_samples(tmp_path, capsys):
    assert sample.main([f"--workdir={tmp_path}", "--images", "a.png"]) == 2
    assert "no config.json" in capsys.readouterr().err
    assert sample.main(["--images", "a.png"]) == 2
    assert "required: --workdir" in capsys.readouterr().err
    made = config_io.to_dict(config_io.resolve(i2i.test()))
    made["task"]["name"] = "dino"
    (tmp_path / "config.json").write_text(json.dumps(made))
    assert sample.main([f"--workdir={tmp_path}"]) == 2
    assert "trained an encoder (config.task.name=dino), which generates nothing" in capsys.readouterr().err


def test_help_lists_the_flags_of_the_runs_task(run, capsys):
    assert sample.main([f"--workdir={run}", "--help"]) == 0
    text = capsys.readouterr().out
    assert "flags of this run's task, i2i:" in text
    assert "N samples on the path between" in text
    assert "the texts to condition on" not in text


def test_frozen_weights_may_move_but_not_change(images, goldens, tmp_path, capsys):
    weights = tmp_path / "autoencoder"
    shutil.copytree(goldens / "diffusers_autoencoder_kl", weights)
    made = i2i.test()
    made.autoencoder.weights, made.model.patch_size = str(weights), 1
    workdir = untrained(tmp_path / "run", config_io.resolve(made))
    moved = weights.rename(tmp_path / "moved")
    arguments = [f"--workdir={workdir}", *images, "--num=1", "--steps=2", f"--out={tmp_path / 'x.png'}"]
    assert sample.main(arguments) == 2
    assert f"config.autoencoder.weights={str(weights)!r}" in capsys.readouterr().err
    assert sample.main([*arguments, f"--autoencoder-weights={moved}"]) == 0
    assert (tmp_path / "x.png").exists()
    assert sample.main([*arguments, f"--autoencoder-weights={moved}", "--encoder-weights=random:1"]) == 2
    assert "is not the network that this run was trained with: random:0@" in capsys.readouterr().err
