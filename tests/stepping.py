"""Trains for a few steps on some of the fake devices, on the path that production runs: Experiment, iterator, train step."""

import jax
import jax.extend
import numpy as np

from configs import i2i
from lumos_jax import config, data
from lumos_jax.config import io as config_io
from lumos_jax.train.experiment import Experiment


def settings_with(of=i2i, **groups):
    """configs/<of>.py:test with fields of groups replaced."""
    settings = config_io.resolve(of.get_config("test"))
    for group, fields in groups.items():
        settings = config.replace(settings, {f"{group}.{name}": value for name, value in fields.items()})
    config.validate(settings)
    return settings


def matmuls(jaxpr):
    """The equations of matmuls and convolutions, those of inner programs and kernels included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from matmuls(getattr(inner, "jaxpr", inner))


def build(settings, devices):
    return Experiment.build(settings, jax.devices()[:devices])


def train(settings, devices, steps, change=None):
    """Metrics of each step, and the last state as NumPy arrays. change(step, host batch) may replace a batch."""
    return train_on(build(settings, devices), steps, change)


def train_on(experiment, steps, change=None):
    settings, size = experiment.settings, experiment.settings.train.batch_size
    rows = experiment.local_rows(size)
    batches = data.make_train_iterator(
        settings.data,
        data.make_source(settings.data),
        batch_size=size,
        rows=rows,
        start_step=0,
        finish=experiment.task.host,
    )
    state, metrics = experiment.init_state(), []
    for step in range(steps):
        host = next(batches)
        host = change(step, host) if change else host
        state, values = experiment.train_step(state, experiment.frozen, experiment.device_batch(host, size))
        metrics.append(jax.tree.map(np.asarray, values))
    batches.close()
    return metrics, jax.tree.map(np.asarray, state)


def losses(metrics):
    return np.array([step["loss"] for step in metrics])


def assert_close(ours, theirs, atol=2e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)
