"""Text to image: tokens on the host, the null condition's mask, the hand-off from an I2I prior, and what is refused."""

import dataclasses
import functools
import json
import pickle
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import i2i, t2i
from lumos_jax import config, data, tasks
from lumos_jax.checkpoints import Checkpoints
from lumos_jax.config import io as config_io
from lumos_jax.train import rngs, startup
from lumos_jax.train.experiment import Experiment
from lumos_jax.train.sharding import device_arrays
from lumos_jax.weights.rules import flatten
from tests.running import flags_of


def settings_with(make=t2i, **groups):
    settings = config_io.resolve(make.get_config("test"))
    for group, fields in groups.items():
        if dataclasses.is_dataclass(fields):
            settings = dataclasses.replace(settings, **{group: fields})
        else:
            settings = config.replace(settings, {f"{group}.{name}": value for name, value in fields.items()})
    return settings


@functools.cache
def made(output="all"):
    fields = {"kind": "clip_text", "output": "pooled"} if output == "pooled" else {}
    return tasks.make_task(settings_with(encoder=fields))


def host_batch(records=range(8), **fields):
    settings = settings_with(data=fields).data
    return data.read_batch(settings, data.make_source(settings), records, made()[0].host)


@functools.cache
def busy_params(output="all"):
    """A network without the zeros of initialization, so that its condition counts."""
    dit = made(output)[0].network
    leaves, tree = jax.tree.flatten(jax.jit(dit.init)(rngs.key(0, "init")))
    noise = [0.1 * jax.random.normal(rngs.key(1, str(i)), leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [leaf + extra for leaf, extra in zip(leaves, noise, strict=True)])


def test_the_host_tokenizes_in_any_thread_and_process():
    host = made()[0].host
    batch = {"caption": np.array(["a red sphere", "", "a red sphere " * 3000], object)}
    found = pickle.loads(pickle.dumps(host))(batch)
    assert found["token_mask"].sum(1).tolist() == [4, 1, 24]  # words and end of text; that alone; cut to length
    ends = [found["tokens"][row, length - 1] for row, length in enumerate((4, 1, 24))]
    assert len(set(ends)) == 1  # the end of text is kept
    with futures.ThreadPoolExecutor(8) as pool:
        for again in pool.map(host, [batch] * 64):
            assert np.array_equal(again["tokens"], found["tokens"])


def test_captions_and_masks_reach_the_network_and_padding_does_not():
    task, frozen = made()
    host = host_batch()
    batch = device_arrays(host)
    assert set(batch) == {"image", "tokens", "token_mask"}
    condition = jax.jit(task.condition)(frozen, batch)
    assert condition.tokens.shape == (8, 24, 32)
    assert np.array_equal(condition.token_mask, host["token_mask"])
    params, x, t = busy_params(), jax.random.normal(rngs.key(0, "x"), (8, 16, 16, 3)), jnp.linspace(0, 900, 8)
    apply = jax.jit(task.network.apply)
    out = apply(params, x, t, condition)
    spoiled = jnp.where(condition.token_mask[..., None], condition.tokens, 1e3)
    np.testing.assert_allclose(apply(params, x, t, dataclasses.replace(condition, tokens=spoiled)), out, rtol=1e-6)
    assert float(jnp.abs(apply(params, x, t, task.shuffled(condition)) - out).max()) > 1e-2
    null = task.network.null_condition(params, condition)
    assert np.array_equal(null.token_mask, condition.token_mask)  # as in the reference: the prompt's mask
    assert np.array_equal(null.tokens[3], params["null"]["tokens"])


def test_pooled_features_are_one_token_without_mask():
    task, frozen = made("pooled")
    condition = jax.eval_shape(task.condition, frozen, device_arrays(host_batch()))
    assert condition.tokens.shape == (8, 1, 32)
    assert condition.token_mask is None


def test_sample_inputs_are_prompts_and_need_no_images():
    task, frozen = made()
    sampling = task.sampling
    args = flags_of(sampling, "--prompts", "a red sphere", "two blue cones")
    host = task.host(sampling.sample_inputs(args, None))
    assert set(device_arrays(host)) == {"tokens", "token_mask"}
    sources = np.asarray(sampling.source_images(frozen, device_arrays(host)))
    sheet = sampling.sheet(host, sources, np.zeros((2, 3, 16, 16, 3), np.uint8))
    with_sources = sampling.sheet(host, np.zeros((2, 16, 16, 3), np.uint8), np.zeros((2, 3, 16, 16, 3), np.uint8))
    assert with_sources.shape[1] - sheet.shape[1] == 8 * (16 + 2)


def prior(workdir, make=i2i, **groups):
    """A checkpoint of a run whose weights are noise, and those weights (the EMA)."""
    settings = settings_with(make, **groups)
    experiment = Experiment.build(settings, jax.devices()[:1])
    task, state = experiment.task, experiment.init_state()
    ema = jax.tree.map(lambda a: a + 0.5, state.ema)
    checkpoints = Checkpoints(workdir, config.Checkpoint())
    meta = {"settings": config_io.to_dict(settings), "fingerprints": dict(task.identity), "memory": {}}
    checkpoints.save(7, vars(dataclasses.replace(state, ema=ema)), meta)
    checkpoints.close()
    return flatten(jax.tree.map(np.asarray, ema))


def hand_over(settings, workdir):
    experiment = Experiment.build(settings, jax.devices()[:1])
    checkpoints = Checkpoints(workdir, config.Checkpoint())
    start = startup.start(experiment, workdir, checkpoints, dict(experiment.task.identity))
    checkpoints.close()
    return flatten(jax.tree.map(np.asarray, start.state.params)), experiment.task


def test_an_i2i_prior_hands_over_all_but_what_reads_its_condition(tmp_path):
    theirs = prior(tmp_path / "i2i")
    settings = dataclasses.replace(settings_with(), init_from=str(tmp_path / "i2i"))
    (tmp_path / "t2i").mkdir()
    ours, task = hand_over(settings, tmp_path / "t2i")
    anew = {"tokens/fc1/kernel", "tokens/fc1/bias", "null/tokens"}
    assert set(ours) == set(theirs)
    for path, array in ours.items():
        assert (path in anew) != np.array_equal(array, theirs[path]), path
    fresh = flatten(jax.jit(task.network.init)(rngs.key(settings.train.seed, "init")))
    for path in anew:
        np.testing.assert_allclose(ours[path], fresh[path], rtol=1e-6)
    account = json.loads((tmp_path / "t2i" / "handoff.json").read_text())
    assert set(account["reinitialised"]) == anew
    assert len(account["loaded"]) == len(ours) - 3
    assert set(account["dropped"]) == anew  # what stood under these names there


def test_between_runs_of_text_everything_is_copied_unless_the_encoder_is_another():
    """A staged curriculum (256 -> 512 -> 1024 px) is `init_from` again; sizes start anew where a run had none."""
    square, sizes = make_shapes(), make_shapes(data=BUCKETS)
    handoff = made()[0].handoff()
    assert handoff.rules(square, square, True)["reinitialise"] == ()
    other = handoff.rules(square, square, False)
    assert set(other["reinitialise"]) == {"tokens/fc1/kernel", "tokens/fc1/bias", "null/tokens"}
    larger = handoff.rules(sizes, square, True)
    assert set(larger["reinitialise"]) == set(sizes) - set(square) != set()
    assert all(path.startswith("vector/") for path in larger["reinitialise"])
    assert larger["drop"] == larger["widen"] == ()


def make_shapes(**groups):
    task, _ = tasks.make_task(settings_with(**groups))
    return {path: leaf.shape for path, leaf in flatten(jax.eval_shape(task.network.init, rngs.key(0, "init"))).items()}


def test_dropped_captions_are_the_null_condition_and_the_others_stay():
    task, frozen = made()
    keys = rngs.streams(0, "train", 0)
    batch = device_arrays(host_batch()) | {"weight": np.ones(8, np.float32)}
    example = jax.jit(lambda frozen, batch: task.example(frozen, batch, keys))(frozen, batch)
    drop = {name: jnp.arange(8) % 2 == 0 for name in example.drop}
    lost = task.network.drop_condition(busy_params(), example.condition, drop)
    assert np.array_equal(lost.tokens[2], busy_params()["null"]["tokens"])
    assert np.array_equal(lost.tokens[1], example.condition.tokens[1])
    assert np.array_equal(lost.token_mask, batch["token_mask"])


BUCKETS = {"aspect_ratios": (0.5, 2.0)}


def test_sizes_are_the_condition_of_a_run_with_buckets():
    settings = settings_with(data=BUCKETS)
    task, frozen = tasks.make_task(settings)
    sampling = task.sampling
    args = flags_of(sampling, "--prompts", "a red sphere", "a red sphere", "--size=12x20")
    wanted = sampling.sample_inputs(args, None)
    assert sampling.with_flags(args).latent_shape == (12, 20, 3)
    assert sampling.with_flags(flags_of(sampling, "--prompts", "x")) == sampling
    assert wanted["size"].tolist() == [pytest.approx([12, 20, 0.6])] * 2
    host = data.read_batch(settings.data, data.make_source(settings.data), [0, 1], task.host)
    condition = jax.eval_shape(task.condition, frozen, device_arrays(host))
    assert condition.vector.shape == (2, 3)
    for size, message in (("12x12", "the nearest ratio is 16x16"), ("wide", "give HEIGHTxWIDTH")):
        with pytest.raises(ValueError, match=message):
            sampling.with_flags(flags_of(sampling, "--prompts", "x", f"--size={size}"))
    with pytest.raises(ValueError, match=r"--size=16x16 is for runs with config\.data\.aspect_ratios"):
        made()[0].sampling.with_flags(flags_of(sampling, "--prompts", "x", "--size=16x16"))
    with pytest.raises(ValueError, match="do not divide into patches of 8 px"):
        tasks.make_task(settings_with(data=BUCKETS, model={"patch_size": 8}))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"encoder": config.Encoder()}, "config.encoder.kind=vit reads no captions: set it to t5 or clip_text"),
        ({"data": config.Data()}, "config.data.sample_type=image: config.task.name=t2i trains on captioned samples"),
    ],
)
def test_settings_without_text_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        tasks.make_task(dataclasses.replace(settings_with(), **groups))
