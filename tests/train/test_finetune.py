"""Training a part of the network, or adapters: what is frozen stays bit for bit, what trains is what the formulas say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lumos_jax import config, data
from lumos_jax.checkpoints import Checkpoints
from lumos_jax.config import io as config_io
from lumos_jax.train import finetune, lora, rngs, startup
from lumos_jax.train.state import TrainState
from lumos_jax.weights.rules import flatten
from tests import stepping

STEPS = 4
PART = {"trainable": ("final/*", "blocks/attn/qkv_*")}
ADAPTERS = {"trainable": ("final/*",), "lora_rank": 4}


def settings_with(**groups):
    # A large, constant rate, so that a few steps move what is to move.
    groups["optimizer"] = {"decay": "constant", "warmup_steps": 0, "weight_decay": 0.1} | groups.get("optimizer", {})
    return stepping.settings_with(**groups)


@functools.cache
def made():
    """A whole network that trains: its task and frozen networks."""
    return stepping.build(settings_with(), 1)


@functools.cache
def pretrained():
    """A network without the zeros of initialization, which would stop gradients."""
    network = made().task.network

    @jax.jit
    def init():
        leaves, tree = jax.tree.flatten(network.init(rngs.key(0, "init")))
        noise = [0.1 * jax.random.normal(rngs.key(1, str(i)), leaf.shape) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(tree, [leaf + extra for leaf, extra in zip(leaves, noise, strict=True)])

    return init()


@functools.cache
def host_batches():
    settings = settings_with()
    source, size = data.make_source(settings.data), settings.train.batch_size
    batches = data.make_train_iterator(settings.data, source, batch_size=size, rows=range(size), start_step=0)
    kept = [next(batches) for _ in range(STEPS)]
    batches.close()
    return kept


class Trainer:
    """A network that is tuned as the settings say, from `pretrained`."""

    def __init__(self, settings, devices=1):
        self.experiment = stepping.build(settings, devices)
        self.settings, self.plan = settings, self.experiment.plan
        self.first = self.experiment.init_state(pretrained())
        self.first_params = jax.tree.map(np.asarray, self.first.params)

    def run(self, state, steps):
        losses = []
        for number in steps:
            batch = self.experiment.device_batch(host_batches()[number], 16)
            state, metrics = self.experiment.train_step(state, self.experiment.frozen, batch)
            losses.append(float(metrics["loss"]))
        return state, losses


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(trainer, last state, losses, run's directory): adapters and the final layer, saved on the way and at the end."""
    trainer = Trainer(settings_with(finetune=ADAPTERS))
    workdir = tmp_path_factory.mktemp("tuned")
    checkpoints = Checkpoints(workdir, config.Checkpoint())
    meta = {"settings": config_io.to_dict(trainer.settings), "fingerprints": {}, "memory": {}}
    state, losses = trainer.first, []
    for part in (range(2), range(2, STEPS)):
        state, more = trainer.run(state, part)
        losses += more
        checkpoints.save(part[-1] + 1, vars(state), meta)
    checkpoints.close()
    return trainer, state, losses, workdir


def assert_same_bits(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        assert np.array_equal(np.asarray(leaf), np.asarray(b[path])), path


def moments(state, name):
    return flatten(optax.tree_utils.tree_get(state.opt_state, name))


def assert_only_these_trained(trainer, state, names):
    before, after = flatten(trainer.first_params), flatten(state.params)
    for path, leaf in after.items():
        assert np.array_equal(before[path], leaf) == (path not in names), path
    trained_bytes = sum(after[path].nbytes for path in names)
    for tree in (flatten(state.ema), moments(state, "mu"), moments(state, "nu")):
        assert set(tree) == names
    counters = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert total == 2 * trained_bytes + sum(leaf.nbytes for leaf in counters)


def test_only_named_parameters_train_and_the_rest_keeps_its_bits():
    trainer = Trainer(settings_with(finetune=PART))
    state, losses = trainer.run(trainer.first, range(3))
    names = {"final/table", "final/out/kernel", "final/out/bias", "blocks/attn/qkv_kernel", "blocks/attn/qkv_bias"}
    assert_only_these_trained(trainer, state, names)
    whole = trainer.plan.ema_weights(state.params, state.ema)
    assert_same_bits(whole["final"], state.ema["final"])
    assert_same_bits(whole["patch"], state.params["patch"])
    assert set(flatten(whole)) == set(flatten(state.params))
    assert losses[2] < losses[0]


def test_adapters_and_the_named_train_and_the_network_below_keeps_its_bits(tuned):
    trainer, state, losses, _ = tuned
    names = {path for path in flatten(state.params) if path.startswith(("final/", "lora/"))}
    assert len(names) == 3 + 2 * 7  # qkv, out; q, kv, out; fc1, fc2
    assert_only_these_trained(trainer, state, names)
    assert losses[-1] < losses[0]


def test_shapes_of_adapters(tuned):
    shapes = {path: leaf.shape for path, leaf in flatten(tuned[1].params["lora"]).items()}
    assert shapes["blocks/attn/qkv_kernel/a"] == (2, 32, 4)
    assert shapes["blocks/attn/qkv_kernel/b"] == (2, 4, 3, 2, 16)
    assert shapes["blocks/cross/out_kernel/a"] == (2, 2, 16, 4)
    assert shapes["blocks/cross/out_kernel/b"] == (2, 4, 32)
    assert shapes["blocks/mlp/fc2/kernel/a"] == (2, 128, 4)
    first = tuned[0].first_params["lora"]["blocks"]["mlp"]["fc2"]["kernel"]
    assert 0.9 * 128**-0.5 < np.abs(first["a"]).max() <= 128**-0.5
    assert not first["b"].any()


@functools.cache
def example():
    task, frozen = made().task, made().frozen
    batch = {name: host_batches()[0][name] for name in ("image", "weight")}
    return jax.jit(lambda batch: task.example(frozen, batch, rngs.streams(0, "train", 0)))(batch)


@functools.partial(jax.jit, static_argnums=0)
def _output_and_loss(plan, params, example):
    task = made().task
    params, gather = plan.for_apply(params, None) if "lora" in params else (params, None)
    output = task.network.apply(params, example.x0, example.t.astype(jnp.float32), example.condition, gather=gather)
    return output, task.loss_terms(params, example, gather)["loss"]


def output_and_loss(plan, params):
    """The network's output and its loss per example, with the adapters where `params` has any."""
    return jax.tree.map(np.asarray, _output_and_loss(plan, params, example()))


def test_before_the_first_step_adapters_change_no_bit(tuned):
    trainer = tuned[0]
    base = output_and_loss(trainer.plan, pretrained())
    adapted = output_and_loss(trainer.plan, trainer.first_params)
    for ours, theirs in zip(adapted, base, strict=True):
        assert np.array_equal(ours, theirs)


def test_merged_weights_are_the_network_with_adapters(tuned):
    trainer, state, _, _ = tuned
    merged = finetune.merge(state.params)
    assert set(flatten(merged)) == set(flatten(pretrained()))
    with_adapters = output_and_loss(trainer.plan, state.params)
    for ours, theirs in zip(output_and_loss(trainer.plan, merged), with_adapters, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    base = {name: part for name, part in state.params.items() if name != "lora"}
    assert np.abs(output_and_loss(trainer.plan, base)[0] - with_adapters[0]).max() > 1e-3
    pair = jax.tree.map(np.asarray, state.params["lora"]["blocks"]["cross"]["out_kernel"])
    for layer in range(2):
        matrix = pair["a"][layer].reshape(32, 4) @ pair["b"][layer]
        moved = np.asarray(
            merged["blocks"]["cross"]["out_kernel"][layer] - base["blocks"]["cross"]["out_kernel"][layer]
        )
        np.testing.assert_allclose(moved.reshape(32, 32), matrix, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "shape", "inputs"),
    [("blocks/attn/kv_kernel", (1, 6, 2, 2, 3), 6), ("blocks/attn/out_kernel", (1, 2, 3, 6), 6),
     ("blocks/mlp/fc1/kernel", (1, 6, 5), 6)],
)  # fmt: skip
def test_gradients_of_adapters_are_those_of_the_formula(path, shape, inputs):
    """With L = |x W' - y|^2 / 2: dW = x^T (x W' - y), dA = s dW B^T, dB = s A^T dW, on the kernel as a matrix."""
    rng = np.random.default_rng(0)
    pair = lora.init_pair(jax.random.key(0), path, shape, 2)
    pair["b"] = jnp.asarray(rng.normal(size=pair["b"].shape), jnp.float32)
    pair = jax.tree.map(lambda leaf: leaf[0], pair)
    kernel = jnp.asarray(rng.normal(size=shape[1:]), jnp.float32)
    outputs = kernel.size // inputs
    x, y = rng.normal(size=(4, inputs)).astype(np.float32), rng.normal(size=(4, outputs)).astype(np.float32)

    def loss(pair):
        adapted = lora.add({"kernel": kernel}, {"kernel": pair})["kernel"]
        return jnp.sum(jnp.square(x @ adapted.reshape(inputs, outputs) - y)) / 2

    grads = jax.grad(loss)(pair)
    a, b = np.asarray(pair["a"]).reshape(inputs, 2), np.asarray(pair["b"]).reshape(2, outputs)
    dw = x.T @ (x @ (np.asarray(kernel).reshape(inputs, outputs) + a @ b) - y)
    np.testing.assert_allclose(grads["a"].reshape(inputs, 2), dw @ b.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["b"].reshape(2, outputs), a.T @ dw, rtol=1e-5, atol=1e-5)


def test_shards_and_micro_batches_agree_with_one_device(tuned):
    settings = settings_with(finetune=ADAPTERS, mesh={"fsdp": 4}, optimizer={"accumulate": 2})
    trainer = Trainer(settings, devices=8)
    for kernel, half in (("qkv_kernel", "a"), ("out_kernel", "b")):
        for tree in (trainer.first.params, trainer.first.ema, optax.tree_utils.tree_get(trainer.first.opt_state, "mu")):
            leaf = tree["lora"]["blocks"]["attn"][kernel][half]
            assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    state, losses = trainer.run(trainer.first, range(STEPS))
    np.testing.assert_allclose(losses, tuned[2], rtol=1e-5)
    theirs = flatten(tuned[0].plan.ema_weights(tuned[1].params, tuned[1].ema))
    for path, ours in flatten(trainer.plan.ema_weights(state.params, state.ema)).items():
        np.testing.assert_allclose(ours, theirs[path], atol=2e-5, err_msg=path)


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(tuned):
    trainer, end, losses, workdir = tuned
    checkpoints = Checkpoints(workdir)
    middle = TrainState(**checkpoints.restore(2, vars(trainer.experiment.abstract_state)))
    checkpoints.close()
    state, again = trainer.run(middle, range(2, STEPS))
    assert again == losses[2:]
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(end), strict=True):
        assert np.array_equal(ours, theirs)


def start(settings, workdir):
    checkpoints = Checkpoints(workdir, settings.checkpoint)
    begun = startup.start(stepping.build(settings, 1), workdir, checkpoints, {})
    checkpoints.close()
    return begun


def test_adapters_are_handed_on_merged_and_start_fresh(tuned, tmp_path):
    trainer, state, _, workdir = tuned
    handed = trainer.plan.ema_weights(state.params, state.ema)
    whole = start(dataclasses.replace(settings_with(), init_from=str(workdir)), tmp_path / "whole")
    assert_same_bits(whole.state.params, handed)
    again = settings_with(finetune={"lora_rank": 2, "lora_targets": ("blocks/mlp/*/kernel",)})
    again = start(dataclasses.replace(again, init_from=str(workdir)), tmp_path / "again")
    lora_names = [path for path in flatten(again.state.params) if path.startswith("lora/")]
    assert len(lora_names) == 4
    assert all(name in again.origin for name in lora_names)
    assert "reinitialised     4 arrays" in again.origin
    params = dict(again.state.params)
    fresh = params.pop("lora")
    assert_same_bits(params, handed)
    assert not fresh["blocks"]["mlp"]["fc1"]["kernel"]["b"].any()
    assert_same_bits(again.state.ema, {"lora": fresh})


def test_another_plan_on_resume_is_refused(tuned):
    with pytest.raises(
        ValueError, match=r"finetune\.lora_rank: 4 then, 2 now\n.*or start another run with .*init_from"
    ):
        start(settings_with(finetune=ADAPTERS | {"lora_rank": 2}), tuned[3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable": ("final/*", "blocks/attn/qvk_kernel")}, "'blocks/attn/qvk_kernel' matches .*blocks/attn/qkv_kernel"),
        ({"trainable": ("null/*",)}, "'null/.' matches no parameter"),
        ({"lora_rank": 2, "lora_targets": ("blocks/mlp/fc3/kernel",)}, "nearest: blocks/mlp/fc"),
        ({"lora_rank": 2, "lora_targets": ("final/out/kernel",)}, "matches no parameter"),
        ({"lora_rank": 33}, "lora_rank=33 is more than 32, the full rank of blocks/"),
        ({"lora_rank": 2, "trainable": ("blocks/attn/*",)}, "both name blocks/attn/out_kernel, blocks/attn/qkv_kernel"),
        ({"lora_rank": -1}, "at least 0"),
        ({"lora_targets": ("blocks/attn/*",)}, "needs config.finetune.lora_rank"),
        ({"lora_rank": 2, "lora_targets": ()}, "lora_targets is empty"),
    ],
)  # fmt: skip
def test_plans_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        finetune.make_plan(settings_with(finetune=fields).finetune, made().task.network)


def test_what_trains_cannot_change_within_a_run():
    with pytest.raises(ValueError, match="may change with init_from only"):
        settings_with(checkpoint={"allow_change": ("finetune.lora_rank",)})
