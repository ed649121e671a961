"""Novel views: the condition, its dropout, the hand-off from a prior that changes nothing at first, a run, orbits."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import i2i, nvs
from lumos_jax import sample, tasks
from lumos_jax.checkpoints import Checkpoints
from lumos_jax.config import io as config_io
from lumos_jax.data import cameras
from lumos_jax.models import Condition
from lumos_jax.scenes import render as scene_render
from lumos_jax.scenes import scene as scenes
from lumos_jax.train import loop, startup
from lumos_jax.train.experiment import Experiment
from lumos_jax.weights.rules import flatten
from tests.fields import put
from tests.running import flags_of, on_one_device


def settings_with(of=nvs, **changes):
    made = of.test()
    made.model.size, made.encoder.size = "32x1x2", "32x1x4/8"  # half as long to compile
    put(made, changes)
    return config_io.resolve(made)


@functools.cache
def made():
    """The task, its frozen parameters, and parameters."""
    task, frozen = tasks.make_task(settings_with())
    return task, frozen, scrambled(task.network)


def scrambled(dit):
    """Random parameters, without the zeros of initialization."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(dit.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [0.2 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (2, 4, 16, 16, 3), np.uint8)
    return {"image": images[0], "input": images[1], "camera": rng.normal(size=(4, 4)).astype(np.float32)}


@pytest.fixture(scope="module")
def condition(batch):
    task, frozen, _ = made()
    return jax.jit(task.condition)(frozen, batch)


def test_condition_is_feature_and_camera_of_the_input_view(batch, condition):
    task, frozen, _ = made()
    feature = jax.jit(task.encoder.apply)(frozen["encoder"], batch["input"])
    assert condition.tokens.shape == (4, 5, 36)  # four patches and [CLS]
    np.testing.assert_allclose(condition.tokens[..., :32], feature, atol=1e-6)
    for token in range(5):
        np.testing.assert_array_equal(condition.tokens[:, token, 32:], batch["camera"])
    np.testing.assert_allclose(condition.latent, batch["input"] / 127.5 - 1, atol=1e-6)
    x0, _ = jax.jit(task.prepare)(frozen, batch, jax.random.key(0))
    np.testing.assert_allclose(x0, batch["image"] / 127.5 - 1, atol=1e-6)


def test_one_number_decides_what_drops():
    task = made()[0]
    drop = {name: np.asarray(rows) for name, rows in task.dropout_masks(jax.random.key(3), 100_000).items()}
    feature, latent = drop["tokens"], drop["latent"]
    for rows in (feature & ~latent, feature & latent, latent & ~feature):
        assert abs(rows.mean() - 0.05) < 0.003
    assert not drop["vector"].any()


def test_what_drops_is_zero_and_the_camera_stays_until_guidance_takes_it(condition):
    task, _, params = made()
    drop = {"tokens": np.array([0, 1, 1, 0], bool), "latent": np.array([0, 0, 1, 1], bool), "vector": np.zeros(4, bool)}
    given = task.network.drop_condition(params, condition, drop)
    kernel, bias = (params["camera"]["project"][name] for name in ("kernel", "bias"))
    tokens = np.asarray(condition.tokens)
    turn = np.asarray(params["camera"]["turn"]).reshape(4, 32, 32)  # a matrix a number of the camera
    turned = np.einsum("blv,blc,vcd->bld", tokens[..., 32:], tokens[..., :32], turn)
    projected, camera = tokens @ kernel + bias + turned, tokens[..., 32:] @ kernel[32:] + bias
    np.testing.assert_allclose(given.tokens, np.where(drop["tokens"][:, None, None], camera, projected), atol=1e-5)
    assert [bool(np.any(row)) for row in given.latent] == [True, True, False, False]
    null = task.network.null_condition(params, task.network.project_camera(params, condition))
    assert null.tokens.shape == (4, 5, 32)
    assert not np.any(null.tokens)
    assert not np.any(null.latent)


def test_shuffling_exchanges_cameras_alone(condition):
    other = made()[0].shuffled(condition)
    np.testing.assert_array_equal(other.tokens[..., 32:], jnp.roll(condition.tokens[..., 32:], 1, axis=0))
    np.testing.assert_array_equal(other.tokens[..., :32], condition.tokens[..., :32])
    np.testing.assert_array_equal(other.latent, condition.latent)
    np.testing.assert_allclose(other.vector[1], jnp.degrees(condition.tokens[0, 0, 32:]), rtol=1e-6)


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """An I2I run's directory, and its network and EMA weights."""
    workdir = tmp_path_factory.mktemp("prior")
    settings = settings_with(i2i)
    task, _ = tasks.make_task(settings)
    params = scrambled(task.network)
    weights = jax.tree.map(jnp.asarray, {"params": jax.tree.map(np.zeros_like, params), "ema": params})
    checkpoints = Checkpoints(workdir, settings.checkpoint)
    meta = {"settings": config_io.to_dict(settings), "fingerprints": dict(task.identity), "memory": {}}
    checkpoints.save(1, weights, meta)
    checkpoints.close()
    return workdir, task, params


def test_the_hand_off_accounts_for_all_and_changes_nothing(prior, condition, tmp_path):
    workdir, before, theirs = prior
    settings = dataclasses.replace(settings_with(), init_from=str(workdir))
    task = made()[0]
    experiment = Experiment.build(settings, jax.devices()[:1])
    checkpoints = Checkpoints(tmp_path, settings.checkpoint)
    start = startup.start(experiment, tmp_path, checkpoints, dict(task.identity))
    checkpoints.close()
    account = json.loads((tmp_path / "handoff.json").read_text())
    assert {name.split("/")[0] for name in account["reinitialised"]} == {"camera", "vector"}
    assert account["dropped"] == ["null/tokens"]
    assert account["adapted"] == ["patch/kernel"]
    assert set(account["loaded"]) == set(flatten(theirs)) - {"null/tokens"}
    ours = start.state.params
    np.testing.assert_array_equal(ours["tokens"]["fc1"]["kernel"], theirs["tokens"]["fc1"]["kernel"])

    x, t = jax.random.normal(jax.random.key(0), (4, 16, 16, 3)), jnp.array([3.0, 200.0, 500.0, 900.0])
    new = jax.jit(task.network.apply)(ours, x, t, task.network.project_camera(ours, condition))
    old = jax.jit(before.network.apply)(theirs, x, t, Condition(tokens=condition.tokens[..., :32]))
    assert np.abs(old).max() > 0.1
    np.testing.assert_allclose(new, old, atol=1e-5)


def test_a_prior_of_another_encoder_starts_its_first_layer_anew(prior):
    rules = (
        made()[0]
        .handoff()
        .rules(
            {path: leaf.shape for path, leaf in flatten(made()[2]).items()},
            {path: leaf.shape for path, leaf in flatten(prior[2]).items()},
            same_condition=False,
        )
    )
    anew = {path.rpartition("/")[0] for path in rules["reinitialise"]}
    assert anew == {"camera", "camera/project", "vector/fc1", "vector/fc2", "tokens/fc1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__sample_type": "image"}, "nvs trains on views"),
        ({"data__crop": "random"}, "do not go with config.data.sample_type=views"),
        ({"data__source": "cached", "data__path": "x"}, "holds no pairs of views"),
        ({"task__condition_dropout": 0.2}, "drop at rates of their own"),
        ({"optimizer__lr_multipliers": (("camera/*", 0.0),)}, "factors are above 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tasks.make_task(settings_with(**changes))


def test_nothing_of_views_can_be_cached(batch):
    with pytest.raises(ValueError, match="nothing to cache"):
        made()[0].encode({}, batch)


@pytest.fixture(scope="module")
def run(prior, tmp_path_factory):
    """A run of eight steps from the prior, and how to run its settings again elsewhere."""
    settings = settings_with(train__steps=8, eval__every=8)
    settings = dataclasses.replace(settings, init_from=str(prior[0]))

    def go(workdir):
        with on_one_device():
            assert loop.train(loop.prepare(settings, str(workdir))) == 0

    workdir = tmp_path_factory.mktemp("nvs") / "run"
    go(workdir)
    return workdir, go


def end_of(workdir):
    checkpoints = Checkpoints(workdir)
    names = ("params", "ema", "opt_state")
    state = {name: checkpoints.restore_subtree(8, name, checkpoints.shapes(8, name)) for name in names}
    checkpoints.close()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clocks = {"images_per_second", "step_seconds", "data_wait_fraction", "device_wait_fraction", "host_fraction"}
    return state, [{k: v for k, v in line.items() if k not in clocks and not k.startswith("goodput")} for line in lines]


def test_a_run_is_scored_by_the_true_views(run):
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "score_psnr" in line]
    assert [line["step"] for line in scores] == [0, 8]
    assert 3 < scores[-1]["score_psnr"] < 15  # a network that has learned nothing yet
    assert -1 < scores[-1]["score_ssim"] < 0.5
    assert (run[0] / "samples" / "step_8.png").exists()


def test_a_run_goes_on_bit_for_bit(run, tmp_path):
    workdir, go = run
    shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    go(tmp_path / "again")
    (ours, said), (theirs, expected) = end_of(tmp_path / "again"), end_of(workdir)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.array_equal(a, b)
    assert said == expected


def test_sample_writes_an_orbit(run, tmp_path, capsys):
    workdir, _ = run
    Image.new("RGB", (20, 16), (200, 30, 30)).save(tmp_path / "a.png")
    arguments = [
        f"--workdir={workdir}",
        "--images",
        str(tmp_path / "a.png"),
        "held-out:1",
        "--azimuths",
        "0",
        "-90",
        "360",
    ]
    assert sample.main([*arguments, "--elevation=10", "--num=2", "--steps=2", f"--out={tmp_path / 'o.png'}"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"o.{ending}") for ending in ("png", "gif", "mp4")]
    with Image.open(tmp_path / "o.png") as image:
        grid = np.asarray(image)
    side = 128 + 2 * 8
    assert grid.shape == (4 * side + 16, 4 * side + 16, 3)  # two samples of two images: input and three azimuths
    assert tuple(grid[side // 2, side // 2]) == (200, 30, 30)
    once_round = grid[:, 16 + side :][:, : 3 * side].astype(int)
    once_round = [once_round[:, first : first + 128] for first in (0, 2 * side)]
    assert np.abs(once_round[0] - once_round[1]).max() <= 2  # the views of an image start from the same noise
    assert np.abs(once_round[0][:side] - once_round[0][side : 2 * side]).max() > 2  # its samples from other noise
    with Image.open(tmp_path / "o.gif") as gif:
        assert (gif.n_frames, gif.size) == (3, (2 * side + 16, 2 * side + 16))
    assert sample.main([*arguments, "--elevation=100"]) == 2
    assert sample.main([f"--workdir={workdir}", "--images", "held-out:32"]) == 2
    assert sample.main([*arguments, "--interpolate=3"]) == 2
    *errors, last = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "elevation from -90 to 90" in errors[0]
    assert "holds out 32 records" in errors[1]
    assert last == (
        "error: --interpolate=3 is no flag of this run, whose task is nvs: it takes --images, --azimuths, --elevation; --help "
        "lists all"
    )


def test_an_orbit_is_a_camera_a_row():
    sampling = made()[0].sampling
    args = flags_of(sampling, "--images", "a", "b", "--azimuths", "0", "90", "--elevation=30")
    batch = sampling.sample_inputs(args, lambda path: np.full((2, 2, 3), ord(path)))
    assert [row[0, 0, 0] for row in batch["input"]] == [97, 97, 98, 98]
    np.testing.assert_allclose(batch["camera"], 2 * [[-math.pi / 6, 0, 1, 0], [-math.pi / 6, 1, 0, 0]], atol=1e-6)
    # The same numbers as training has for a camera a quarter turn further and thirty degrees higher.
    here, there = (scenes.Camera(0.3 + turn, 1.2 - up, 2.0) for turn, up in ((0, 0), (math.pi / 2, math.pi / 6)))
    trained = cameras.relative_camera(scene_render.camera_matrix(there), scene_render.camera_matrix(here))
    np.testing.assert_allclose(batch["camera"][1], trained, atol=1e-6)
    batch = sampling.sample_inputs(flags_of(sampling, "--images", "a"), lambda path: np.zeros((2, 2, 3)))
    assert len(batch["camera"]) == 12
