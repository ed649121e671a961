"""Invariant 2 at the level of steps: meshes, FSDP and gradient accumulation change nothing but where things are computed."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from configs import i2i, nvs, t2i
from lumos_jax import config, data, tasks
from lumos_jax.config import io as config_io
from lumos_jax.train import rngs, sharding
from lumos_jax.train.optimizer import make_optimizer, make_schedule
from lumos_jax.train.sharding import of_the_task
from lumos_jax.train.state import make_state
from lumos_jax.train.step import make_train_step

STEPS = 4


def settings_with(of=i2i, **groups):
    settings = config_io.resolve(of.get_config("test"))
    for group, fields in groups.items():
        settings = dataclasses.replace(settings, **{group: dataclasses.replace(getattr(settings, group), **fields)})
    return settings


def run(settings, devices, steps=STEPS, spoil=None):
    """Losses and the last state of a few real steps on the first `devices` fake devices."""
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:devices])
    task, frozen = tasks.make_task(settings)
    optimizer = make_optimizer(settings.optimizer, settings.train.steps, task.dit.trainable())
    _, state = make_state(settings, task.dit, optimizer, mesh)
    step = make_train_step(settings, task, optimizer, mesh)
    frozen = jax.device_put(frozen, sharding.replicated(mesh))
    source = data.make_source(settings.data)
    size = settings.train.batch_size
    rows = sharding.local_rows(mesh, size)
    batches = data.make_train_iterator(
        settings.data, source, batch_size=size, rows=rows, start_step=0, finish=task.host
    )
    losses = []
    for number in range(steps):
        host = next(batches)
        batch = of_the_task(host) | {"weight": host["weight"]}
        if spoil and number == spoil[0]:
            batch = spoil[1](batch)
        state, metrics = step(state, frozen, sharding.global_batch(mesh, batch, rows, size))
        losses.append({name: np.asarray(value) for name, value in metrics.items()})
    batches.close()
    return losses, jax.tree.map(np.asarray, state)


@pytest.fixture(scope="module")
def alone():
    return run(settings_with(), 1)


def curve(losses):
    return np.array([step["loss"] for step in losses])


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [(2, {"data": 2}), (4, {"data": 2, "fsdp": 2}), (8, {"data": 1, "fsdp": 8}), (8, {"data": 8})],
)
def test_meshes_agree(alone, devices, mesh):
    losses, state = run(settings_with(mesh=mesh), devices)
    np.testing.assert_allclose(curve(losses), curve(alone[0]), rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state.ema), jax.tree.leaves(alone[1].ema), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("of", [nvs], ids=lambda of: of.__name__)
def test_meshes_agree_for_every_task(of):
    alone = run(settings_with(of), 1)
    losses, state = run(settings_with(of, mesh={"data": 2, "fsdp": 2}), 4)
    np.testing.assert_allclose(curve(losses), curve(alone[0]), rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state.ema), jax.tree.leaves(alone[1].ema), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.fixture
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_meshes_agree_on_captions_in_buckets(quick_to_compile):
    """Two steps in two buckets, so two programs a mesh."""
    groups = {
        "data": {"buckets": True, "bucket_step": 4, "bucket_ratios": (0.6, 1.2), "seed": 1},
        "model": {"depth": 1},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
    }
    alone, _ = run(settings_with(t2i, **groups), 1, steps=2)
    split, _ = run(settings_with(t2i, mesh={"data": 2, "fsdp": 2}, **groups), 4, steps=2)
    np.testing.assert_allclose(curve(split), curve(alone), rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fsdp_really_splits_parameters_optimiser_and_ema(optimizer):
    settings = settings_with(mesh={"data": 1, "fsdp": 8}, optimizer={"name": optimizer})
    mesh = sharding.make_mesh(settings.mesh)
    task, _ = tasks.make_task(settings)
    optimizer = make_optimizer(settings.optimizer, 10, task.dit.trainable())
    abstract, state = make_state(settings, task.dit, optimizer, mesh)
    moments = [moment for _, moment in optax.tree_utils.tree_get_all_with_path(state.opt_state, "mu")]
    kernels = [tree["blocks"]["mlp"]["fc1"]["kernel"] for tree in (state.params, state.ema, *moments)]
    kernels = [kernel for kernel in kernels if not isinstance(kernel, optax.MaskedNode)]
    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    assert jax.tree.map(lambda a: a.sharding, abstract) == jax.tree.map(lambda a: a.sharding, state)


def test_muon_agrees_on_meshes():
    muon = {"name": "muon", "learning_rate": 3e-3}
    alone, _ = run(settings_with(optimizer=muon), 1, steps=3)
    split, _ = run(settings_with(optimizer=muon, mesh={"data": 1, "fsdp": 2}), 2, steps=3)
    np.testing.assert_allclose(curve(split), curve(alone), rtol=1e-4)


def test_accumulation_equals_the_large_batch(alone):
    losses, state = run(settings_with(optimizer={"accumulate": 4}), 1)
    np.testing.assert_allclose(curve(losses), curve(alone[0]), rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone[1].params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    for name in ("quartile_loss", "quartile_weight"):
        np.testing.assert_allclose(losses[0][name], alone[0][0][name], rtol=1e-4)


def test_rows_without_weight_do_not_count(alone):
    """A batch whose second half is undecodable trains as if those rows were not there, whatever they hold."""

    def spoil(fill):
        def change(batch):
            weight, image = batch["weight"].copy(), batch["image"].copy()
            weight[8:], image[8:] = 0.0, fill
            return {"weight": weight, "image": image}

        return change

    black, white = (run(settings_with(), 1, 2, (0, spoil(fill))) for fill in (0, 255))
    assert curve(black[0])[0] == curve(white[0])[0] != curve(alone[0])[0]
    for a, b in zip(jax.tree.leaves(black[1].params), jax.tree.leaves(white[1].params), strict=True):
        assert np.array_equal(a, b)


def test_a_step_that_is_not_finite_changes_nothing(alone):
    settings = settings_with(optimizer={"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": 0.0})
    losses, state = run(settings, 1, 4)
    finite = [bool(step["finite"]) for step in losses]
    assert not all(finite), "the learning rate was meant to break it"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert int(state.step) == 4


def test_null_tables_never_train(alone):
    settings = settings_with(optimizer={"weight_decay": 0.1})
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1])
    task, _ = tasks.make_task(settings)
    optimizer = make_optimizer(settings.optimizer, 10, task.dit.trainable())
    _, fresh = make_state(settings, task.dit, optimizer, mesh)
    fresh = jax.tree.map(np.asarray, fresh)
    _, state = run(settings, 1)
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
    [({"data": 3}, "does not fit 8 device"), ({"data": -1, "fsdp": 5}, "does not fit 8 device")],
)
def test_meshes_that_do_not_fit_are_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(config.Mesh(**mesh))


def test_batches_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="does not split over"):
        sharding.check_batch(sharding.make_mesh(config.Mesh()), 12, "train.batch_size")
