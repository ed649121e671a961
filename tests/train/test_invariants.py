"""Invariant 2 at the level of steps: meshes, FSDP and gradient accumulation change nothing but where things are computed.

All of it runs on the path of production: `Experiment.build` with the sharded forward pass.
"""

import jax
import numpy as np
import optax
import pytest

from configs import nvs, t2i
from lumos_jax import config
from lumos_jax.train import rngs, sharding
from lumos_jax.train.optimizer import make_schedule
from tests.stepping import assert_close, build, losses, settings_with, train

STEPS = 4
WEIGHT_DECAY = {"weight_decay": 0.1}


@pytest.fixture(scope="module")
def alone():
    """Metrics and last state of the run on one device that the others must agree with."""
    return train(settings_with(optimizer=WEIGHT_DECAY), 1, STEPS)


@pytest.mark.parametrize(
    ("devices", "mesh", "accumulate"),
    [
        (4, {"fsdp": 2}, 1),
        (8, {"fsdp": -1}, 2),
        (8, {}, 1),
        (1, {}, 4),
    ],
)
def test_meshes_and_accumulation_agree(alone, devices, mesh, accumulate):
    settings = settings_with(mesh=mesh, optimizer=WEIGHT_DECAY | {"accumulate": accumulate})
    metrics, state = train(settings, devices, STEPS)
    np.testing.assert_allclose(losses(metrics), losses(alone[0]), rtol=1e-5)
    for name in ("quartile_loss", "quartile_weight"):
        np.testing.assert_allclose(metrics[0][name], alone[0][0][name], rtol=1e-4)
    assert_close(state.params, alone[1].params)
    assert_close(state.ema, alone[1].ema)


@pytest.mark.parametrize(
    ("of", "optimizer"),
    [(nvs, {"accumulate": 2}), (nvs, {"name": "muon", "learning_rate": 3e-3})],
    ids=["nvs, accumulation", "nvs, muon"],
)
def test_eight_devices_agree_with_one(of, optimizer):
    """Two rows a device, or one a micro-batch; parameters split over four."""
    groups = {"model": {"size": "32x1x2"}, "optimizer": optimizer}
    alone, alone_state = train(settings_with(of, **groups), 1, 3)
    metrics, state = train(settings_with(of, mesh={"fsdp": 4}, **groups), 8, 3)
    muon = "name" in optimizer  # its Newton-Schulz iterations amplify rounding
    np.testing.assert_allclose(losses(metrics), losses(alone), rtol=1e-4 if muon else 1e-5)
    assert_close(state.ema, alone_state.ema, atol=2e-4 if muon else 2e-5)


def test_meshes_agree_on_captions_in_buckets():
    """Two steps in two buckets, so two programs a mesh."""
    groups = {
        "data": {"aspect_ratios": (0.6, 1.2), "seed": 1},
        "model": {"size": "32x1x2"},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
    }
    alone, _ = train(settings_with(t2i, **groups), 1, 2)
    split, _ = train(settings_with(t2i, mesh={"fsdp": 2}, **groups), 4, 2)
    np.testing.assert_allclose(losses(split), losses(alone), rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fsdp_splits_parameters_optimizer_state_and_ema(optimizer):
    experiment = build(settings_with(mesh={"fsdp": 8}, optimizer={"name": optimizer}), 8)
    abstract, state = experiment.abstract_state, experiment.init_state()
    moments = [moment for _, moment in optax.tree_utils.tree_get_all_with_path(state.opt_state, "mu")]
    kernels = [tree["blocks"]["mlp"]["fc1"]["kernel"] for tree in (state.params, state.ema, *moments)]
    kernels = [kernel for kernel in kernels if not isinstance(kernel, optax.MaskedNode)]
    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    assert jax.tree.map(lambda a: a.sharding, abstract) == jax.tree.map(lambda a: a.sharding, state)


def test_rows_without_weight_do_not_count(alone):
    """A batch whose second half is undecodable trains as if those rows were not there, whatever they hold."""

    def fill_with(value):
        def change(step, host):
            if step:
                return host
            weight, image = host["weight"].copy(), host["image"].copy()
            weight[8:], image[8:] = 0.0, value
            return host | {"weight": weight, "image": image}

        return change

    black, white = (train(settings_with(optimizer=WEIGHT_DECAY), 1, 2, fill_with(value)) for value in (0, 255))
    assert losses(black[0])[0] == losses(white[0])[0] != losses(alone[0])[0]
    for a, b in zip(jax.tree.leaves(black[1].params), jax.tree.leaves(white[1].params), strict=True):
        assert np.array_equal(a, b)


def test_a_step_that_is_not_finite_changes_nothing():
    settings = settings_with(optimizer={"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": 0.0})
    metrics, state = train(settings, 1, 4)
    assert not all(step["finite"] for step in metrics), "the learning rate was meant to break it"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert int(state.step) == 4


def test_null_tables_never_train(alone):
    fresh, state = build(settings_with(optimizer=WEIGHT_DECAY), 1).init_state(), alone[1]
    for path in ("params", "ema"):
        assert np.array_equal(getattr(state, path)["null"]["tokens"], fresh.params["null"]["tokens"])
        assert not np.array_equal(getattr(state, path)["patch"]["kernel"], fresh.params["patch"]["kernel"])


def test_keys_depend_on_seed_name_and_step_only():
    def draw(*args):
        return float(jax.random.normal(rngs.key(*args)))

    assert draw(0, "noise", 3) == draw(0, "noise", 3)
    assert len({draw(0, "noise", 3), draw(1, "noise", 3), draw(0, "dropout", 3), draw(0, "noise", 4)}) == 4


def test_learning_rate_schedule():
    cosine = make_schedule(config.Optimizer(learning_rate=1.0, warmup_steps=10, decay="cosine"), 110)
    np.testing.assert_allclose(
        [cosine(0), cosine(5), cosine(10), cosine(60), cosine(110)], [0, 0.5, 1, 0.5, 0], atol=1e-6
    )
    constant = make_schedule(config.Optimizer(learning_rate=1.0, warmup_steps=4), 100)
    np.testing.assert_allclose([constant(2), constant(99)], [0.5, 1.0])


@pytest.mark.parametrize(
    ("mesh", "message"),
    [({"fsdp": 5}, "does not fit 8 device"), ({"fsdp": -1, "context": 3}, "does not fit 8 device")],
)
def test_meshes_that_do_not_fit_are_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(config.Mesh(**mesh))


def test_batches_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match=r"config\.train\.batch_size=12 does not split over"):
        build(settings_with(train={"batch_size": 12}), 8)
