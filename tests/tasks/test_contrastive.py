"""The contrastive tasks: their losses by the definition, runs, and encoders that others can name."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import contrastive as contrastive_config
from configs import moco as moco_config
from lumos_jax import config, convert, data, encoders, evaluation
from lumos_jax.config import io as config_io
from lumos_jax.encoders import frozen
from lumos_jax.tasks import encoder_training, make_task
from lumos_jax.tasks.contrastive import Pairs
from lumos_jax.tasks.moco import Views
from lumos_jax.train import loop, rngs
from tests.fields import put

WEIGHT = np.array([1, 1, 0, 1], np.float32)


def settings(configs, **changes):
    made = configs.get_config("test")
    put(made, changes)
    return config_io.resolve(made)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(queries, keys, scale, negatives):
    """Of each query with its own key among those and the `negatives` (B, B)."""
    logits = scale * queries.astype(np.float64) @ keys.T
    chosen = np.exp(logits) * (negatives | np.eye(len(logits), dtype=bool))
    return np.log(chosen.sum(1)) - np.diagonal(logits)


def test_info_nce_and_retrieval_by_hand():
    corners = np.eye(3, dtype=np.float32)
    keys = corners[[0, 2, 1]]  # of the last two queries the other one's
    loss, hits = encoder_training.info_nce(corners, keys, 2.0, jnp.ones(3))
    far, near = np.log(2 + np.exp(2)), np.log(np.exp(2) + 2)
    np.testing.assert_allclose(loss, [near - 2, far, far], rtol=1e-6)
    np.testing.assert_array_equal(hits, [1, 0, 0])
    same = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0]], bool)
    loss, hits = encoder_training.info_nce(corners, keys, 2.0, jnp.array([0.0, 1.0, 1.0]), same)
    np.testing.assert_allclose(loss, [near - 2, 0, 0], atol=1e-6)  # a key of weight 0 is the negative of none
    captions = np.array(["a", "b", "b"])
    found = evaluation.retrieval_accuracy(corners, keys, captions)
    assert found == {"text_retrieval": 1.0, "image_retrieval": 1.0}
    found = evaluation.retrieval_accuracy(corners, keys, np.array(["a", "b", "c"]))
    assert found == {"text_retrieval": 1 / 3, "image_retrieval": 1 / 3}


def test_the_loss_of_pairs_by_its_definition():
    task, _ = make_task(settings(contrastive_config))
    texts = np.array(["a red box", "a blue cone", "a red box", "a red box"], object)
    tokens = encoders.tokenize(task.tokenizer, texts.tolist(), 24)
    image = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    pairs = Pairs(image, tokens["tokens"], tokens["token_mask"], WEIGHT)
    params = jax.jit(task.network.init)(jax.random.key(0))
    sums = jax.jit(lambda p, e: task.losses(p, None, e, jnp.float32(3), None))(params, pairs)
    images = np.asarray(jax.jit(task.network.embed_images)(params, image))
    captions = np.asarray(jax.jit(task.network.embed_texts)(params, pairs.tokens, pairs.mask))
    assert np.abs(captions[0] - captions[1]).max() > 0.01
    negatives = (texts[:, None] != texts[None]) & (WEIGHT > 0)
    rows = [cross_entropy(*pair, 1 / 0.07, negatives) for pair in ((images, captions), (captions, images))]
    np.testing.assert_allclose(sums["loss"], (np.mean(rows, 0) * WEIGHT).sum() / 3, rtol=1e-4)
    np.testing.assert_allclose(sums["temperature"], 0.07, rtol=1e-5)


def test_the_loss_of_views_by_its_definition():
    task, _ = make_task(settings(moco_config))
    rng = np.random.default_rng(0)
    views = Views(rng.normal(size=(4, 2, 16, 16, 3)).astype(np.float32), WEIGHT)
    init = jax.jit(task.network.init)
    params, average = init(jax.random.key(0)), init(jax.random.key(1))
    params["projector"]["layer0"]["bias"] = jnp.linspace(-1, 1, 32)

    def loss(params, average, views):
        sums = task.losses(params, average, views, jnp.float32(3), None)
        return sums["loss"], sums

    differentiate = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (gradient, teacher), sums = differentiate(params, average, views)
    tokens = jax.jit(lambda p, x: task.network.vit.apply(p["vit"], x)[:, 0])

    def mlp(layers, x):
        x = np.asarray(x, np.float64)
        for layer in jax.tree.map(np.asarray, layers).values():
            x = x @ layer["kernel"]
            x = (x - x[WEIGHT > 0].mean(0)) / np.sqrt(x[WEIGHT > 0].var(0) + 1e-5)
            x = np.maximum(x * layer["scale"] + layer["bias"], 0) if "scale" in layer else x
        return x

    projected = [
        [mlp(weights["projector"], tokens(weights, views.image[:, v])) for v in range(2)]
        for weights in (params, average)
    ]
    queries = [unit(mlp(params["predictor"], x)) for x in projected[0]]
    keys = [unit(x) for x in projected[1]]
    negatives = np.broadcast_to(WEIGHT > 0, (4, 4))
    rows = sum(cross_entropy(queries[v], keys[1 - v], 1 / 0.2, negatives) for v in range(2))
    np.testing.assert_allclose(sums["loss"], 0.4 * (rows * WEIGHT).sum() / 3, rtol=1e-4)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves((teacher, gradient["vit"]["patch"])))
    assert np.any(gradient["vit"]["cls"])
    spoilt = dataclasses.replace(views, image=views.image + 5 * (1 - WEIGHT)[:, None, None, None, None])
    (other, _), _ = differentiate(params, average, spoilt)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def trained(made, folder):
    """A run of these settings, as it is resumed at its end, and the directory of what it has trained."""
    assert loop.train(loop.prepare(made, str(folder / "run"))) == 0
    resumed = loop.prepare(made, str(folder / "run"))
    assert resumed.start.step == made.train.steps
    resumed.checkpoints.close()
    out = folder / "encoder"
    assert convert.main(["export", f"--workdir={folder / 'run'}", "--format=encoder", f"--out={out}"]) == 0
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (folder / "run" / "samples" / f"step_{made.train.steps}.png").exists()
    return resumed.start.state.ema, out, lines


SHORT = {"train__steps": 4, "checkpoint__every": 4, "eval__every": 4, "log__every": 2}


def test_a_run_trains_an_image_and_a_text_encoder_that_others_can_name(one_device, tmp_path):
    made = settings(contrastive_config, **SHORT)
    ema, out, lines = trained(made, tmp_path)
    assert 0 <= lines[-1]["text_retrieval"] <= 1
    assert "image_accuracy" in lines[-2]
    task, _ = make_task(made)
    batch = data.read_batch(made.data, data.make_source(made.data), range(16), task.host)
    names = ("image", "tokens", "token_mask")
    found = jax.jit(task.embed)(ema, {name: batch[name] for name in names})
    wanted = dataclasses.replace(made.encoder, weights=str(out), output="pooled", size="B", normalize="none")
    encoder, params = encoders.make_encoder(wanted)
    images = jax.jit(encoder.apply)(params, batch["image"])[:, 0]
    np.testing.assert_allclose(unit(np.asarray(images)), found["image"], rtol=1e-4, atol=1e-6)
    assert encoder.vit.whitened
    text = config.Encoder(kind="clip_text", weights=str(out), output="pooled", max_tokens=24, tokenizer="scenes")
    encoder, params = encoders.make_text_encoder(text)
    encoders.make_tokenizer(text, encoder)  # fits
    texts = jax.jit(encoder.apply)(params, batch["tokens"], batch["token_mask"])[:, 0]
    np.testing.assert_allclose(unit(np.asarray(texts)), found["text"], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"config\.json"):
        frozen.read("t5", str(out))


def test_a_run_of_two_views_trains_an_encoder(one_device, tmp_path):
    made = settings(moco_config, **SHORT)
    ema, out, lines = trained(made, tmp_path)
    assert "neighbour_count" in lines[-1]
    assert "accuracy" in lines[-2]
    task, _ = make_task(made)
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    wanted = dataclasses.replace(made.encoder, weights=str(out), size="B", normalize="none")
    encoder, params = encoders.make_encoder(wanted)
    features = jax.jit(encoder.apply)(params, images)[:, 0]
    np.testing.assert_allclose(features, jax.jit(task.features)(ema, images), rtol=1e-4, atol=1e-5)
    first = jax.jit(task.network.init)(rngs.key(made.train.seed, "init"))["vit"]
    np.testing.assert_allclose(params["patch"]["kernel"], first["patch"]["kernel"], rtol=1e-5)
    assert np.abs(np.asarray(params["cls"]) - first["cls"]).max() > 1e-5


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    tokenizer = encoders.load_tokenizer("scenes", "config.task.tokenizer")
    tokenizer.eos_token = tokenizer.unk_token  # id 2, which stands for the largest
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.task\.tokenizer=.* or id 2"):
        make_task(settings(contrastive_config, task__tokenizer=str(tmp_path)))
