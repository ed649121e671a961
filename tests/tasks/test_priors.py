"""The priors without cross-attention: what they condition on, how they are evaluated and sampled, and their hand-offs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import i2i
from configs.ablations import class_conditional, rcg, unconditional
from lumos_jax import encoders, sample
from lumos_jax.config import io as config_io
from lumos_jax.models import Condition
from lumos_jax.tasks import make_task, releases
from lumos_jax.train import loop
from tests.fields import put
from tests.running import flags_of
from tests.weights import test_official_dit as released


def settings(study, **changes):
    made = study.test()
    made.train.batch_size = made.eval.num_examples = 16
    made.model.size = "16x1x2"
    made.train.steps = made.checkpoint.every = made.eval.every = 2
    made.eval.steps, made.eval.sheet = 2, (1, 2)
    made.optimizer.decay = "constant"
    put(made, changes)
    return config_io.resolve(made)


def test_a_run_without_a_condition_has_one_loss_and_samples_without_guidance(one_device, tmp_path, capsys):
    run = loop.prepare(settings(unconditional), str(tmp_path))
    assert "vector" not in run.start.state.params
    assert loop.train(run) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held_out = [{name for name in line if name.startswith("held_out")} for line in lines]
    assert [names for names in held_out if names] == [{"held_out_loss"}] * 2
    assert sample.main([f"--workdir={tmp_path}", "--num=3", f"--out={tmp_path / 'x.png'}"]) == 0
    assert (tmp_path / "x.png").stat().st_size > 100
    assert sample.main([f"--workdir={tmp_path}", "--guidance=2"]) == 2
    assert "there is no condition to guide by" in capsys.readouterr().err
    assert sample.main([f"--workdir={tmp_path}", "--classes", "1"]) == 2
    assert "whose task is unconditional: it takes none of its own" in capsys.readouterr().err


def test_settings_without_a_meaning_are_refused():
    for study, changes, message in (
        (unconditional, {"eval__guidance": 2.0}, r"eval\.guidance=2\.0"),
        (unconditional, {"task__condition_dropout": 0.1}, r"task\.condition_dropout=0\.1"),
        (class_conditional, {"data__sample_type": "image", "data__num_classes": 0}, "set it to labeled"),
        (rcg, {"encoder__output": "all"}, "5 tokens an image"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task(settings(study, **changes))
    with pytest.raises(ValueError, match=r"data\.num_classes=0"):
        settings(class_conditional, data__num_classes=0)


def test_classes_reach_the_embedding_and_another_class_is_another_condition():
    task, frozen = make_task(settings(class_conditional))
    label = jnp.arange(4, dtype=jnp.int32)
    condition = task.condition(frozen, {"label": label})
    np.testing.assert_array_equal(condition.vector[:, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(task.shuffled(condition).vector[:, 0], [3, 0, 1, 2])
    assert jax.eval_shape(task.network.init, jax.random.key(0))["vector"]["table"].shape == (41, 16)
    dropped = task.network.drop_condition({}, condition, {n: label > 1 for n in ("tokens", "vector", "latent")})
    np.testing.assert_array_equal(dropped.vector[:, 0], [0, 1, 40, 40])
    sampling = task.sampling
    inputs = sampling.sample_inputs(flags_of(sampling, "--classes", "3", "7"), None)
    np.testing.assert_array_equal(inputs["label"], [3, 7])
    with pytest.raises(ValueError, match="0 to 39"):
        sampling.sample_inputs(flags_of(sampling, "--classes=-1"), None)


def test_rcg_adds_one_standardized_feature():
    given = settings(rcg)
    task, frozen = make_task(given)
    image = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    vector = np.asarray(task.condition(frozen, {"image": image}).vector)
    plain, params = encoders.make_encoder(dataclasses.replace(given.encoder, normalize="none"))
    raw = np.asarray(plain.apply(params, image)[:, 0], np.float64)
    expected = (raw - raw.mean(-1, keepdims=True)) / raw.std(-1, ddof=1, keepdims=True)
    np.testing.assert_allclose(vector, expected, atol=1e-5)
    kept = task.encode(frozen, {"image": image})
    np.testing.assert_array_equal(task.condition(frozen, kept).vector, vector)
    assert jax.tree.leaves(task.network.trainable()["null"]) == [True]


@pytest.mark.parametrize("kind", ["dit", "rcg"])
def test_a_prior_that_gains_cross_attention_is_at_first_itself_without_a_condition(kind, tmp_path):
    state = released.state_of(kind)
    np.savez(tmp_path / "prior.npz", **state)
    made = i2i.test()
    made.init_from = str(tmp_path / "prior.npz")
    with pytest.raises(ValueError, match=r"final layer is adaln.*model\.final=adaln"):
        loop.prepare(config_io.resolve(made), str(tmp_path / "a"))
    made.model.final = "adaln"
    if kind == "rcg":
        with pytest.raises(ValueError, match="trained with gelu: set it"):
            loop.prepare(config_io.resolve(made), str(tmp_path / "b"))
        made.model.activation = "gelu"
    run = loop.prepare(config_io.resolve(made), str(tmp_path / "run"))
    run.checkpoints.close()
    account = json.loads((tmp_path / "run" / "handoff.json").read_text())
    assert account["adapted"] == ["time/fc2/bias"]
    assert {name.split("/")[0] for name in account["dropped"]} == {"vector"} | ({"null"} if kind == "rcg" else set())
    assert all(name.startswith(("blocks/cross/", "tokens/", "null/tokens")) for name in account["reinitialised"])

    prior = releases.read(kind, state, origin="it", heads=released.HEADS)
    before = dataclasses.replace(prior.network, dtype="float32")
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(2, 16, 16, 3)).astype(np.float32), jnp.array([5.0, 700.0])
    vector = jnp.zeros((2, 1 if kind == "dit" else released.FEATURES))
    null = before.null_condition(prior.params, Condition(vector=vector))
    tokens = rng.normal(size=(2, *run.experiment.task.network.token_shape)).astype(np.float32)
    out = jax.jit(run.experiment.task.network.apply)(
        run.start.state.params, x, t, Condition(tokens=jnp.asarray(tokens))
    )
    np.testing.assert_allclose(out, jax.jit(before.apply)(prior.params, x, t, null), atol=1e-5)
