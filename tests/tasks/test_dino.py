"""Self-distillation: its crops, its loss by the definition, what keeps it from collapsing, and a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dino as dino_config
from lumos_jax import config, convert, data, encoders
from lumos_jax.config import io as config_io
from lumos_jax.tasks import augmentation, dino, make_task
from lumos_jax.tasks.dino import Crops
from lumos_jax.train import loop, rngs
from tests.fields import put


def settings(**changes):
    """configs/dino.py:test without masked patches and pixels by default."""
    made = dino_config.test()
    made.task.mask_weight = made.task.pixel_weight = 0.0
    put(made, changes)
    return config_io.resolve(made)


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(0)
    weight = np.array([1, 1, 0, 1], np.float32)
    large, local = (rng.normal(size=(4, 2, side, side, 3)).astype(np.float32) for side in (16, 8))
    return Crops(large, local, rng.random((4, 2, 4)) < 0.4, weight)


def test_a_crop_of_everything_is_the_image_and_small_ones_stay_inside():
    ramp = np.broadcast_to(np.linspace(10, 200, 16, dtype=np.float32)[None, :, None, None], (6, 16, 16, 3))
    key, random_crop = jax.random.key(1), jax.jit(augmentation.random_crop, static_argnums=(2, 3))
    wide = np.asarray(random_crop(key, ramp, 16, (1.0, 1.0)))
    # Ratios other than one cut one side only, so that the columns of a vertical ramp stay constant.
    assert np.abs(wide - wide[:, :, :1]).max() < 1e-3
    small = np.asarray(random_crop(key, ramp, 8, (0.1, 0.3)))
    assert small.min() >= 10 - 1e-3
    assert small.max() <= 200 + 1e-3
    spans = small[:, -1, 0, 0] - small[:, 0, 0, 0]
    assert (spans < 0.75 * 190).all()
    assert np.unique(spans.round(2)).size == 6
    assert jax.eval_shape(lambda: augmentation.random_crop(key, ramp[:3], 8, (0.1, 0.3))).shape == (3, 8, 8, 3)


def test_half_are_mirrored_and_jitter_of_no_strength_changes_nothing():
    image = np.random.default_rng(0).uniform(0, 255, (8, 6, 6, 3)).astype(np.float32)
    out = np.asarray(augmentation.random_flip(jax.random.key(0), image))
    same = np.array([np.allclose(a, b, atol=1e-3) for a, b in zip(out, image, strict=True)])
    mirrored = np.array([np.allclose(a, b[:, ::-1], atol=1e-3) for a, b in zip(out, image, strict=True)])
    assert (same ^ mirrored).all()
    assert same.any()
    assert mirrored.any()
    np.testing.assert_allclose(augmentation.color_jitter(jax.random.key(0), image, 0.0), image, atol=1e-3)
    assert np.abs(augmentation.color_jitter(jax.random.key(0), image, 0.4) - image).max() > 10


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("balance", "mask", "pixel"), [("center", 0.5, 0.0), ("sinkhorn", 0.5, 0.3), ("sinkhorn", 0.0, 0.0)]
)
def test_loss_by_its_definition(example, balance, mask, pixel):
    task, _ = make_task(settings(task__balance=balance, task__mask_weight=mask, task__pixel_weight=pixel))
    example = example if mask else dataclasses.replace(example, masked=None)
    centres = {"centre": jnp.linspace(-0.2, 0.3, 16), "patch_centre": jnp.linspace(0.4, -0.1, 16)}
    init, network_tokens, network_scores = map(jax.jit, (task.network.init, task.network.tokens, task.network.scores))
    params = init(jax.random.key(0))
    params |= {name: centre for name, centre in centres.items() if name in params}
    average = init(jax.random.key(1))
    total = jnp.float32(3)
    sums = jax.jit(lambda p, a, e: task.losses(p, a, e, total, None))(params, average, example)

    def tokens(weights, views, masked=None):
        """(B, views, 1 + N, D)."""
        each = range(views.shape[1])
        masks = [None if masked is None else masked[:, i] for i in each]
        return np.stack([network_tokens(weights, views[:, i], masks[i]) for i in each], 1)

    def scores(weights, views, masked=None):
        """(B, views, 1 + N, K)."""
        found = tokens(weights, views, masked)
        each = [network_scores(weights, found[:, i]) for i in range(found.shape[1])]
        return np.stack(each, 1).astype(np.float64)

    def probabilities(given, center):
        if balance == "center":
            return softmax((given - np.asarray(center)) / task.settings.teacher_temperature)
        plan = np.exp((given - given.max()) / task.settings.teacher_temperature).reshape(-1, 16)
        plan *= np.repeat(example.weight, given.shape[1])[:, None]
        for _ in range(3):
            plan = plan / (plan.sum(0, keepdims=True) * 16)
            plan = plan / np.maximum(plan.sum(1, keepdims=True), 1e-12)
        return plan.reshape(given.shape)

    given = scores(average, example.large)
    answer = probabilities(given[:, :, 0], centres["centre"])
    logits = scores(params, example.large, example.masked)
    seen = np.concatenate([logits[:, :, 0], scores(params, example.local)[:, :, 0]], 1)
    logs = np.log(softmax(seen / dino.STUDENT_TEMPERATURE))
    pairs = [(t, s) for t in range(2) for s in range(4) if t != s]
    rows = np.mean([-(answer[:, t] * logs[:, s]).sum(-1) for t, s in pairs], axis=0)
    if mask:
        patches = probabilities(given[:, :, 1:].reshape(4, 8, 16), centres["patch_centre"]).reshape(4, 2, 4, 16)
        missed = -(patches * np.log(softmax(logits[:, :, 1:] / dino.STUDENT_TEMPERATURE))).sum(-1)
        of_rows = np.array([row[hidden].mean() for row, hidden in zip(missed, example.masked, strict=True)])
        np.testing.assert_allclose(sums["patch_loss"], (of_rows * example.weight).sum() / 3, rtol=1e-4)
        rows = rows + mask * of_rows
    if pixel:  # patches are 8 x 8, row by row
        parts = example.large.reshape(4, 2, 2, 8, 2, 8, 3).transpose(0, 1, 2, 4, 3, 5, 6).reshape(4, 2, 4, 192)
        layer = jax.tree.map(np.asarray, params["pixels"])
        predicted = tokens(params, example.large, example.masked)[:, :, 1:] @ layer["kernel"] + layer["bias"]
        of_rows = ((predicted - parts) ** 2).mean((1, 2, 3))
        np.testing.assert_allclose(sums["pixel_loss"], (of_rows * example.weight).sum() / 3, rtol=1e-4)
        rows = rows + pixel * of_rows
    np.testing.assert_allclose(sums["loss"], (rows * example.weight).sum() / 3, rtol=1e-4)

    moved, metrics = task.post_update(params, sums)
    m = dino.CENTER_MOMENTUM
    of_rows = {"centre": given[:, :, 0].mean(1), "patch_centre": given[:, :, 1:].mean((1, 2))}
    for name in ("centre", "patch_centre")[: 2 if mask else 1]:
        np.testing.assert_allclose(sums[name], of_rows[name][example.weight > 0].mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moved[name], m * params[name] + (1 - m) * sums[name], rtol=1e-6)
    further = {name for name, weight in (("patch_loss", mask), ("pixel_loss", pixel)) if weight}
    assert set(metrics) == {"loss", "teacher_entropy", "prototype_entropy"} | further


def test_masked_patches_do_not_reach_the_student(example):
    task, _ = make_task(settings(task__mask_weight=1.0))
    params, hidden = jax.jit(task.network.init)(jax.random.key(0)), example.masked[:, 0]
    image = example.large[:, 0]
    shown = np.repeat(np.repeat(hidden.reshape(4, 2, 2), 8, 1), 8, 2)[..., None]  # patches are 8 px wide
    spoilt = np.where(shown, 100.0, image)
    tokens = jax.jit(task.network.tokens)
    kept = tokens(params, image, hidden)
    np.testing.assert_array_equal(tokens(params, spoilt, hidden), kept)
    assert np.abs(tokens(params, image) - kept).max() > 0.01


def test_rows_without_weight_and_the_teacher_have_no_gradient(example):
    task, _ = make_task(settings())
    init = jax.jit(task.network.init)
    params, average = init(jax.random.key(0)), init(jax.random.key(1))

    def loss(params, average, example):
        return task.losses(params, average, example, jnp.float32(3), None)["loss"]

    example = dataclasses.replace(example, masked=None)
    spoilt = dataclasses.replace(example, large=example.large + 5 * (1 - example.weight)[:, None, None, None, None])
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    (first, teacher), (second, _) = gradient(params, average, example), gradient(params, average, spoilt)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(teacher))
    assert not np.any(first["centre"])
    assert np.any(first["vit"]["positions"])


def test_views_follow_the_key_and_not_the_batch():
    task, _ = make_task(settings())
    image = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    batch = {"image": image, "weight": np.ones(4, np.float32)}
    assert task.example({}, batch, rngs.streams(0, "train", 1)).masked is None
    task, _ = make_task(settings(task__mask_weight=1.0, task__mask_share=(0.5, 0.5)))
    example_of = jax.jit(lambda batch, step: task.example({}, batch, rngs.streams(0, "train", step)))
    one, two = example_of(batch, 1), example_of(batch, 2)
    assert one.large.shape == (4, 2, 16, 16, 3)
    assert one.local.shape == (4, 2, 8, 8, 3)
    np.testing.assert_array_equal(one.large, example_of(batch, 1).large)
    np.testing.assert_array_equal(one.masked, example_of(batch, 1).masked)
    assert one.masked.shape == (4, 2, 4)
    assert 0.2 < np.mean(one.masked) < 0.8
    assert np.any(one.masked != two.masked)
    assert np.abs(one.large - two.large).max() > 0.1
    assert np.abs(one.large[:, 0] - one.large[:, 1]).max() > 0.1
    plain, _ = make_task(settings(task__mirror=False, task__jitter=0.0, task__global_scale=(1.0, 1.0)))
    ramp = dict(
        batch, image=np.broadcast_to(np.arange(0, 160, 10, dtype=np.uint8)[None, None, :, None], (4, 16, 16, 3))
    )
    kept = np.asarray(jax.jit(lambda batch: plain.example({}, batch, rngs.streams(0, "train", 1)))(ramp).large)
    assert (kept[..., -1, 0] > kept[..., 0, 0]).all()  # left stays left


def test_a_run_trains_an_encoder_that_others_can_name(one_device, tmp_path, capsys):
    made = settings(
        train__steps=6, checkpoint__every=3, task__mask_weight=1.0,
        task__pixel_weight=1.0,
    )  # fmt: skip
    assert loop.train(loop.prepare(made, str(tmp_path / "run"))) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["neighbour_count"] >= 0
    assert "random_neighbour_count" in lines[-1]
    assert any("prototype_entropy" in line and "loss_q1" not in line for line in lines)
    assert (tmp_path / "run" / "samples" / "step_6.png").exists()

    again = dataclasses.replace(made, checkpoint=dataclasses.replace(made.checkpoint, every=3))
    resumed = loop.prepare(again, str(tmp_path / "run"))
    assert resumed.start.step == 6
    resumed.checkpoints.close()

    out = tmp_path / "encoder"
    assert convert.main(["export", f"--workdir={tmp_path / 'run'}", "--format=official", f"--out={out}"]) == 2
    assert "can be exported as encoder" in capsys.readouterr().err
    assert convert.main(["export", f"--workdir={tmp_path / 'run'}", "--format=encoder", f"--out={out}"]) == 0
    wanted = dataclasses.replace(made.encoder, weights=str(out), output="all", size="B")
    wanted = dataclasses.replace(wanted, normalize="white")
    config.validate(dataclasses.replace(made, encoder=wanted))
    encoder, params = encoders.make_encoder(wanted)
    images = data.read_batch(made.data, data.make_source(made.data), range(256))["image"]
    plain = dataclasses.replace(encoder, settings=dataclasses.replace(wanted, normalize="none"))
    white, raw = (np.asarray(each.apply(params, images)) for each in (encoder, plain))
    assert white.shape == (256, 5, 32)
    spreads = [np.linalg.eigvalsh(np.cov(tokens.reshape(-1, 32).T)) for tokens in (white, raw)]
    assert np.abs(white.mean((0, 1))).max() < 1e-3 < np.abs(raw.mean((0, 1))).max()
    assert np.median(spreads[0]) > 0.5 > 10 * np.median(spreads[1]) / spreads[1].max()
    assert 0.9 < spreads[0].max() < 1.01
    del params["whitening"]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(resumed.start.state.ema["vit"]), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))


def test_impossible_crops_are_refused():
    with pytest.raises(ValueError, match=r"task\.local_scale=\(0\.5, 0\.2\)"):
        settings(task__local_scale=(0.5, 0.2))
    named = dataclasses.replace(settings().encoder, weights="x/y", size="B")
    with pytest.raises(ValueError, match="a network that is to be trained is random:<seed>"):
        make_task(dataclasses.replace(settings(), encoder=named))
