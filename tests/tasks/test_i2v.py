"""Image to video: the hand-off from an image prior, the conditions as SVD has them, guidance over frames, drawing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import i2i, i2v
from lumos_jax import tasks
from lumos_jax.checkpoints import transfer
from lumos_jax.config import io as config_io
from lumos_jax.models import Condition, Network
from lumos_jax.weights.rules import flatten, unflatten
from tests.running import flags_of

FRAMES, SIDE = 4, 16


def settings_of(configs):
    return config_io.resolve(configs.get_config("test"))


@pytest.fixture(scope="module")
def made():
    return tasks.make_task(settings_of(i2v))


@pytest.fixture(scope="module")
def fresh(made):
    return jax.jit(made[0].network.init)(jax.random.key(2))


@pytest.fixture(scope="module")
def prepare(made):
    task, frozen = made
    return jax.jit(lambda batch, key: task.prepare(frozen, batch, key))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "frames": rng.integers(0, 256, (3, FRAMES, SIDE, SIDE, 3), dtype=np.uint8),
        "fps": np.array([6, 8, 12], np.float32),
        "motion": np.array([0.0, 0.5, 1e9], np.float32),
    }


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def test_a_prior_handed_off_makes_every_frame_as_before(made, fresh):
    task, prior = made[0], tasks.make_task(settings_of(i2i))[0]
    theirs = {
        path: array + 0.05 * normal(i, *array.shape)
        for i, (path, array) in enumerate(flatten(jax.jit(prior.network.init)(jax.random.key(1))).items())
    }
    fresh = flatten(fresh)
    shapes = [{path: a.shape for path, a in side.items()} for side in (fresh, theirs)]
    rules = task.handoff().rules(*shapes, True)
    assert set(rules["reinitialise"]) == {path for path in fresh if path.startswith(("blocks/temporal/", "vector/"))}
    assert rules["drop"] == ()
    assert rules["widen"] == ("patch/kernel",)
    params, _ = transfer(
        unflatten(theirs),
        unflatten(fresh),
        origin="prior",
        reinitialise=rules["reinitialise"],
        adapt={"patch/kernel": lambda kernel: task.network.widen_input("patch/kernel", kernel)},
    )
    x, t = normal(0, 2, FRAMES, SIDE, SIDE, 3), jnp.asarray([3.0, 700.0])
    tokens = normal(1, 2, *task.network.token_shape)
    numbers = jnp.asarray([[8.0, 20.0, 50.0], [24.0, 200.0, 7.0]])
    given = Condition(tokens=tokens, vector=numbers, latent=normal(2, *x.shape))
    out = jax.jit(task.network.apply)(params, x, t, given)
    one = jax.jit(prior.network.apply)
    for frame in range(FRAMES):
        alone = one(unflatten(theirs), x[:, frame], t, Condition(tokens=tokens))
        assert float(jnp.abs(alone).mean()) > 0.01
        np.testing.assert_allclose(out[:, frame], alone, atol=2e-6)


def test_the_first_frame_is_noised_by_a_known_level(made, prepare, batch):
    task, frozen = made
    x0, condition = prepare(batch, jax.random.key(0))
    np.testing.assert_allclose(x0, batch["frames"] / 127.5 - 1, atol=1e-5)
    fps, motion, level = np.asarray(condition.vector).T
    assert fps.tolist() == [6, 8, 12]
    assert motion.tolist() == [0, 16, 255]
    latent = np.asarray(condition.latent)
    assert latent.shape == x0.shape
    assert all(np.array_equal(latent[:, 0], latent[:, i]) for i in range(FRAMES))
    noise = latent[:, 0] - np.asarray(x0)[:, 0]
    np.testing.assert_allclose(1000 * noise.std((1, 2, 3)), level, rtol=0.1)
    other = prepare(batch, jax.random.key(1))[1]
    assert not np.isin(np.asarray(other.vector)[:, 2], level).any()
    # The feature is that of the clean frame.
    np.testing.assert_array_equal(other.tokens, condition.tokens)
    np.testing.assert_allclose(
        condition.tokens, task.encoder.apply(frozen["encoder"], batch["frames"][:, 0]), atol=1e-5
    )


def test_levels_follow_their_distribution(prepare, batch):
    levels = [prepare(batch, jax.random.key(i))[1].vector[:, 2] for i in range(80)]
    level = np.log(np.concatenate(levels) / 1000)
    assert abs(level.mean() + 3) < 0.1
    assert abs(level.std() - 0.5) < 0.08


def test_drawing_adds_the_same_little_noise_every_time(made, batch):
    task, frozen = made
    first, second = (task.sampling.condition(frozen, batch) for _ in range(2))
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))
    noise = np.asarray(first.latent)[:, 0] - (batch["frames"][:, 0] / 127.5 - 1)
    np.testing.assert_allclose(noise.std(), 0.02, rtol=0.1)


def test_tokens_and_latents_drop_independently_and_numbers_never(made):
    task = dataclasses.replace(made[0], condition_dropout=0.25)
    drop = {name: np.asarray(rows) for name, rows in task.dropout_masks(jax.random.key(0), 8000).items()}
    assert abs(drop["tokens"].mean() - 0.25) < 0.02
    assert abs(drop["latent"].mean() - 0.25) < 0.02
    assert abs((drop["tokens"] & drop["latent"]).mean() - 0.0625) < 0.012
    assert not drop["vector"].any()


def test_shuffled_exchanges_first_frames_alone(made, batch):
    task, frozen = made
    condition = task.sampling.condition(frozen, batch)
    other = task.shuffled(condition)
    np.testing.assert_array_equal(other.tokens, np.roll(condition.tokens, 1, axis=0))
    np.testing.assert_array_equal(other.latent, np.roll(condition.latent, 1, axis=0))
    np.testing.assert_array_equal(other.vector, condition.vector)


def sampling_with(task, *flags):
    return task.sampling.with_flags(flags_of(task.sampling, "--images", "a", *flags))


def test_guidance_rises_over_frames(made):
    scales = made[0].sampling.guidance(2.5)
    assert scales.shape == (1, FRAMES, 1, 1, 1)
    np.testing.assert_allclose(scales.ravel(), [1.0, 1.5, 2.0, 2.5])
    longer = sampling_with(made[0], "--frames=7").guidance(2.5)
    np.testing.assert_allclose(longer.ravel(), np.linspace(1, 2.5, 7))


def test_a_guidance_scale_of_one_needs_no_second_pass(made, fresh, batch, monkeypatch):
    (task, frozen), rows = made, []
    monkeypatch.setattr(Network, "apply", lambda self, params, x, *_, **__: rows.append(len(x)) or x)
    sampling, condition = task.sampling, task.sampling.condition(frozen, batch)
    noise = normal(0, 3, *sampling.latent_shape)
    for scale in (1.0, 2.5):
        settings = dataclasses.replace(settings_of(i2v).eval, guidance=scale)
        sampling.generate(fresh, frozen, condition, noise, jax.random.key(0), settings)
    assert set(rows[: len(rows) // 2]) == {3}
    assert set(rows[len(rows) // 2 :]) == {6}


def test_images_are_the_image_objective(made, fresh, batch):
    task, frozen = made
    images = batch["frames"][:, 0]
    x0, condition = task.prepare(frozen, {"image": images}, jax.random.key(0))
    assert x0.shape == (3, SIDE, SIDE, 3)
    assert condition.vector is None
    assert not condition.latent.any()
    noisy = {
        **fresh,
        "blocks": {**fresh["blocks"], "temporal": jax.tree.map(lambda a: a + 1, fresh["blocks"]["temporal"])},
    }
    t = jnp.asarray([1.0, 500.0, 900.0])
    # Attention over frames takes no part: other weights in it change nothing.
    apply = jax.jit(task.network.apply)
    np.testing.assert_array_equal(apply(fresh, x0, t, condition), apply(noisy, x0, t, condition))


def test_sample_inputs_and_files(made, tmp_path):
    task = made[0]
    image = np.full((SIDE, SIDE, 3), 7, np.uint8)
    args = flags_of(task.sampling, "--images", "a", "b", "--fps=5", "--motion=40")
    host = task.sampling.sample_inputs(args, lambda path: image)
    assert host["frames"].shape == (2, 1, SIDE, SIDE, 3)
    assert host["fps"].tolist() == [5, 5]
    assert np.floor(host["motion"] / task.video.motion_step).tolist() == [40, 40]
    samples = np.random.default_rng(0).integers(0, 256, (2, 3, FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    files = task.sampling.save(host, host["frames"], samples, str(tmp_path / "clip_1.5.mp4"))
    assert [path.rsplit("/", 1)[-1] for path in files] == ["clip_1.5.gif", "clip_1.5.mp4"]
    with Image.open(files[0]) as gif:
        assert gif.n_frames == FRAMES
        side = 128 + 16
        assert gif.size == (4 * side + 16, 2 * side + 16)
        assert gif.convert("RGB").getpixel((20, 20)) == (7, 7, 7)
    for flag, message in (("--motion=256", "--motion=256"), ("--fps=0.0", "--fps=0.0")):
        with pytest.raises(ValueError, match=message):
            task.sampling.sample_inputs(flags_of(task.sampling, "--images", "a", flag), lambda path: image)
    with pytest.raises(ValueError, match="--frames=0 must be at least 1"):
        sampling_with(task, "--frames=0")


def test_sheets_have_the_true_clip_above_its_samples(made, batch):
    samples = np.zeros((3, 1, FRAMES, SIDE, SIDE, 3), np.uint8)
    sheet = made[0].sampling.sheet(batch, batch["frames"], samples)
    side = 128 + 16
    assert sheet.shape == (6 * side + 16, FRAMES * side + 16, 3)
    np.testing.assert_array_equal(sheet[16:144:8, 16 + side : 144 + side : 8], batch["frames"][0, 1])
    assert not sheet[16 + side : 144 + side, 16:144].any()


def test_records_must_be_clips():
    settings = settings_of(i2v)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, sample_type="image"))
    with pytest.raises(ValueError, match=r"config\.data\.sample_type=image: .*i2v trains on clip"):
        tasks.make_task(settings)
