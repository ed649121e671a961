"""Runs of the tasks on files, as users start them: killed, done again, on two processes, and what their conditions are worth.

Everything shown is plain, and its color is given by the condition, so that training shows it within seconds.
"""

import json
import math

import av
import jax
import numpy as np
import pytest
from PIL import Image

from configs import i2i
from lumos_jax import config, tasks
from lumos_jax.checkpoints import Checkpoints
from lumos_jax.config import io as config_io
from lumos_jax.scenes import render as scene_render
from lumos_jax.scenes import scene as scenes
from lumos_jax.train import rngs
from tests.running import arrays, assert_same_bits, finish, metrics, start

STEPS, SAVED = 80, 40
COMMON = (
    f"train.steps={STEPS}", f"checkpoint.every={SAVED}", "log.every=2", f"eval.every={STEPS}", "eval.num_scored=0",
    "eval.sheet=(1,1)", "eval.steps=1", "eval.num_examples=32", "data.holdout=32",
    "model.size=32x1x2", "encoder.size=32x1x4/8", "train.batch_size=16", "optimizer.decay=constant", "optimizer.ema_decay=0.9",
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """96 plain images in two shapes, with captions that name the color."""
    root = tmp_path_factory.mktemp("images")
    for i in range(96):
        color = ("red", "green", "blue", "yellow", "white", "black")[i // 2 % 6]
        Image.new("RGB", ((16, 16), (20, 12))[i % 2], color).save(root / f"{i:03}.png")
        (root / f"{i:03}.txt").write_text(f"a {color} box")
    return root


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """64 objects seen from above, white, from the side, gray, and from below, black."""
    root = tmp_path_factory.mktemp("views")
    for i in range(64):
        (root / f"{i:02}").mkdir()
        for number, (polar, shade) in enumerate(((60, 255), (90, 128), (120, 0))):
            Image.new("RGB", (16, 16), (shade,) * 3).save(root / f"{i:02}" / f"{number:03}.png")
            camera = scenes.Camera(0.1 * i, math.radians(polar), 1.5)
            np.save(root / f"{i:02}" / f"{number:03}.npy", scene_render.camera_matrix(camera))
    return root


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """64 videos of six frames, each of a gray of its own that grows a little lighter."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(64):
        with av.open(str(root / f"{i:02}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width = stream.height = 16
            container.start_encoding()
            for number in range(6):
                frame = np.full((16, 16, 3), 3 * i + 5 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
    return root


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """The directory of an I2I run whose weights are noise."""
    workdir = tmp_path_factory.mktemp("prior")
    made = i2i.test()
    made.model.size, made.encoder.size = "32x1x2", "32x1x4/8"
    settings = config_io.resolve(made)
    task, _ = tasks.make_task(settings)
    leaves, tree = jax.tree.flatten(jax.eval_shape(task.network.init, rngs.key(0, "init")))
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [0.05 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
    checkpoints = Checkpoints(workdir, config.Checkpoint())
    meta = {"settings": config_io.to_dict(settings), "fingerprints": dict(task.identity), "memory": {}}
    checkpoints.save(1, {"params": params, "ema": params}, meta)
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def kinds(images, views, videos, prior):
    """Name -> (config, fields) of a run."""
    captions = ("data.source=folder", f"data.path={images}", "data.captions.noise=0.1")
    shapes = ("data.aspect_ratios=(0.5,1.0)",)
    return {
        "buckets": ("configs/t2i.py:test", (*captions, *shapes, f"init_from={prior}")),
        "clips": (
            "configs/i2v.py:test",
            (
                "data.source=videos",
                f"data.path={videos}",
                "data.clips.frame_stride=(1,1)",
                "data.clips.image_step_fraction=0.5",
            ),
        ),
        "views": ("configs/nvs.py:test", ("data.source=objaverse", f"data.path={views}")),
    }


@pytest.fixture(scope="module")
def build(command, kinds):
    """(kind, workdir, fields) -> what Popen needs."""

    def run(kind, workdir, *fields, **how):
        made, own = kinds[kind]
        return command(workdir, *COMMON, *own, *fields, config=made, **how)

    return run


@pytest.fixture(scope="module")
def undisturbed(build, tmp_path_factory):
    """(kind) -> the directory of a run; each kind runs once."""
    done = {}

    def run(kind):
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp(kind)
            finish(start(build(kind, done[kind])))
        return done[kind]

    return run


def checkpoints_of(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


def killed(build, kind, workdir, moment):
    return finish(start(build(kind, workdir, killed=moment)), code=-9)


@pytest.mark.parametrize("kind", ["buckets", "clips"])
def test_killed_and_restarted_equals_undisturbed_bit_for_bit(kind, build, undisturbed, tmp_path):
    if kind == "buckets":  # handed off from a prior, which is interrupted too
        killed(build, kind, tmp_path, "within_the_account")
        assert not (tmp_path / "handoff.json").exists()
        assert not (tmp_path / "metrics.jsonl").exists()
        assert "hand-off from" in killed(build, kind, tmp_path, "before_the_first_checkpoint")
        assert metrics(tmp_path)[-1]["step"] == SAVED
        assert checkpoints_of(tmp_path) == []
    output = killed(build, kind, tmp_path, "after_a_checkpoint")
    assert ("hand-off from" in output) == (kind == "buckets")
    assert checkpoints_of(tmp_path) == [SAVED]
    assert metrics(tmp_path)[-1]["step"] == SAVED + 2
    assert f"continues at step {SAVED}" in finish(start(build(kind, tmp_path)))
    complete = undisturbed(kind)
    (step, ours), (last, theirs) = arrays(tmp_path), arrays(complete)
    assert step == last == STEPS
    assert_same_bits(ours, theirs)
    assert metrics(tmp_path) == metrics(complete)
    if kind == "buckets":
        accounts = [json.loads((path / "handoff.json").read_text()) for path in (tmp_path, complete)]
        assert accounts[0] == accounts[1]
        assert {name.split("/")[0] for name in accounts[0]["reinitialised"]} == {"tokens", "null", "vector"}
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", ["buckets", "clips"])
def test_two_processes_agree_with_one(kind, undisturbed, build, in_two, kinds, tmp_path):
    made, own = kinds[kind]
    output, _ = in_two(tmp_path, *COMMON, *own, "train.steps=4", "eval.every=0", config=made)
    assert "2 process(es)" in output
    ours, complete = metrics(tmp_path), [line for line in metrics(undisturbed(kind)) if "loss" in line]
    assert [line["step"] for line in ours] == [2, 4]
    for a, b in zip(ours, complete[:2], strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)


@pytest.mark.parametrize(("kind", "factor"), [("buckets", 1.1), ("clips", 1.5), ("views", 1.5)])
def test_another_records_condition_raises_the_held_out_loss(kind, factor, undisturbed):
    first, last = [line for line in metrics(undisturbed(kind)) if "held_out_loss" in line]
    assert (first["step"], last["step"]) == (0, STEPS)
    assert abs(first["held_out_shuffled_margin"]) < 1e-3  # an untrained network does not care
    assert last["held_out_shuffled_loss"] > factor * last["held_out_loss"]
