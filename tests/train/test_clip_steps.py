"""Invariant 2 for clips: frames split over the mesh axis `context`, with FSDP and pictures in between, change nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import i2v
from lumos_jax import config, data, tasks
from lumos_jax.config import io as config_io
from lumos_jax.train import sharding, spread
from lumos_jax.train.evaluator import to_mesh
from lumos_jax.train.optimizer import make_optimizer
from lumos_jax.train.state import make_state
from lumos_jax.train.step import make_train_step

STEPS = 3  # a clip, pictures, a clip


@pytest.fixture(scope="module")
def settings():
    settings = config_io.resolve(i2v.get_config("test"))
    changes = {
        "data": {"image_step_fraction": 0.5},
        "model": {"depth": 1},
        "train": {"batch_size": 4},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
    }
    for group, fields in changes.items():
        settings = dataclasses.replace(settings, **{group: dataclasses.replace(getattr(settings, group), **fields)})
    return settings


def run(settings, mesh):
    """Losses and the last state of a few real steps; and how the frames of the first batch lie."""
    task, frozen = tasks.make_task(settings, sharding.Frozen(mesh))
    task = spread.on_mesh(task, mesh)
    optimizer = make_optimizer(settings.optimizer, settings.train.steps, task.dit.trainable())
    _, state = make_state(settings, task.dit, optimizer, mesh)
    step = make_train_step(settings, task, optimizer, mesh)
    size = settings.train.batch_size
    rows = sharding.local_rows(mesh, size)
    source = data.make_source(settings.data)
    batches = data.make_train_iterator(settings.data, source, batch_size=size, rows=rows, start_step=0)
    losses, layout = [], None
    for number in range(STEPS):
        host = next(batches)
        assert ("image" in host) == (number == 1)
        batch = to_mesh(mesh, host, rows, size)
        layout = layout or batch["frames"].sharding.shard_shape(batch["frames"].shape)
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    batches.close()
    return losses, jax.tree.map(np.asarray, state), layout


def test_split_frames_train_alike(settings):
    losses, state, whole = run(settings, sharding.make_mesh(config.Mesh(), jax.devices()[:1]))
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, context=2))
    split_losses, split_state, split = run(settings, mesh)
    assert (whole[:2], split[:2]) == ((4, 4), (1, 2))
    np.testing.assert_allclose(split_losses, losses, rtol=1e-5)
    temporal = state.params["blocks"]["temporal"]
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(temporal)) > 0.005
    for ours, theirs in zip(jax.tree.leaves(split_state.ema), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_frames_that_do_not_split_are_refused(settings):
    mesh = sharding.make_mesh(config.Mesh(context=8))
    with pytest.raises(
        ValueError, match=r"config\.mesh\.context=8 splits the frames of clips evenly, and .* has 4 frames"
    ):
        sharding.check_frames(mesh, settings.data)
    with pytest.raises(ValueError, match=r"config\.data\.sample_type=image has no frames"):
        sharding.check_frames(mesh, config.Data())
    sharding.check_frames(sharding.make_mesh(config.Mesh(context=4)), settings.data)
