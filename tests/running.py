"""How tests run programs of ours as users do, and look at what they left."""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import shutil
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from PIL import Image

from lumos_jax import config
from lumos_jax.checkpoints import Checkpoints
from lumos_jax.config import io as config_io
from lumos_jax.train import sharding
from lumos_jax.train.experiment import Experiment
from tests import forks

ROOT = pathlib.Path(__file__).parent.parent
TIMINGS = {"images_per_second", "step_seconds", "data_wait_fraction", "device_wait_fraction", "host_fraction"}


def start(command):
    """The process of a command, as Popen takes it: a forks.Fork for a program of ours."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return forks.start(**command) or subprocess.Popen(**command, **pipes)


def finish(process, code=0, timeout=600):
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()  # it would go on beside the other tests
        raise
    assert process.returncode == code, output
    return output


def wait_for(done, process, timeout=200):
    """Until `done()`; fails if the process ends first."""
    until = time.monotonic() + timeout
    while not done():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def on_one_device():
    """Runs in this process use one device of the eight: they compile and save in less time."""
    make = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda mesh, devices=None: make(mesh, jax.devices()[:1]))
        yield


def metrics(workdir):
    """The lines of metrics.jsonl, without what clocks say."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMINGS and not name.startswith("goodput")}
        for line in lines
    ]


def untrained(workdir, settings, seed=0):
    """Writes a run at step 1, whose weights are noise."""
    experiment = Experiment.build(settings, jax.devices()[:1])
    state = experiment.init_state()
    ema = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(seed), a.shape), state.ema)
    checkpoints = Checkpoints(workdir, config.Checkpoint())
    meta = {"settings": config_io.to_dict(settings), "fingerprints": dict(experiment.task.identity), "memory": {}}
    checkpoints.save(1, vars(dataclasses.replace(state, ema=ema)), meta)
    checkpoints.close()
    config_io.save(settings, workdir / "config.json")
    return workdir


def rewound(workdir, to, step):
    """Copies a run as it was once it had saved that step."""
    shutil.copytree(workdir, to, dirs_exist_ok=True)
    for path in (to / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def arrays(workdir):
    """(step, arrays) of the newest checkpoint."""
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest()
    state = {
        name: checkpoints.restore_subtree(step, name, checkpoints.shapes(step, name))
        for name in ("params", "ema", "opt_state")
    }
    checkpoints.close()
    return step, state


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y))


def flags_of(sampling, *arguments):
    """The flags that a task adds to `sample`, parsed."""
    parser = argparse.ArgumentParser()
    sampling.add_flags(parser)
    return parser.parse_args(arguments)
