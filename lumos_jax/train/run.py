"""What a run holds before its first step: experiment, data source, directory, checkpoints and first state."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from lumos_jax import config, data, fileio
from lumos_jax.checkpoints import Checkpoints
from lumos_jax.config import io as config_io
from lumos_jax.train import cached_features, sharding, startup
from lumos_jax.train.evaluator import Evaluator, make_evaluator
from lumos_jax.train.experiment import Experiment, use_compilation_cache
from lumos_jax.train.suite import Suite, make_suite


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that exists before the first step."""

    experiment: Experiment
    workdir: pathlib.Path
    source: data.Source
    checkpoints: Checkpoints
    start: startup.Start
    fingerprints: Mapping[str, str]  # of the data and the frozen networks; a resumed run must have the same
    restore_seconds: float  # how long the checkpoint took to read
    evaluator: Evaluator | None  # of the held-out records; None if config.eval.every is 0
    suite: Suite | None  # of config.eval.suite; None if it is empty

    @property
    def settings(self) -> config.Settings:
        return self.experiment.settings

    def meta(self, memory: Mapping[str, Any]) -> dict[str, Any]:
        """What is saved beside a state; `memory` is the loop's."""
        settings = config_io.to_dict(self.settings)
        return {"settings": settings, "fingerprints": dict(self.fingerprints), "memory": dict(memory)}


def prepare(settings: config.Settings, workdir: str) -> Run:
    """Opens the data, loads the frozen networks and makes or restores the state. The step is not compiled yet.

    Raises ValueError for a user's mistake, and CheckpointError if there are checkpoints, and none can be restored.
    """
    path = fileio.local_directory("--workdir", workdir)
    use_compilation_cache()
    source = data.make_source(settings.data)
    data.make_loader(settings.data, source, training=True)  # refuses now what has no such records
    experiment = Experiment.build(settings)
    if settings.data.source == "cached":
        cached_features.check(settings, experiment.task)
        experiment = experiment.without_encoders()
    fingerprints = {"data": source.fingerprint(), **experiment.task.identity}

    try:
        path.mkdir(parents=True, exist_ok=True)
        _lock(path)
        checkpoints = Checkpoints(path, settings.checkpoint)
    except OSError as error:
        raise fileio.failure(error, f"--workdir={workdir} cannot be used: {error}") from error

    began = time.time()
    start = startup.start(experiment, path, checkpoints, fingerprints)
    restore_seconds = time.time() - began if start.step else 0.0
    evaluator = make_evaluator(experiment, source)
    run = Run(
        experiment, path, source, checkpoints, start, fingerprints, restore_seconds, evaluator, make_suite(experiment)
    )
    if jax.process_index() == 0:
        config_io.save(settings, path / "config.json")
        _introduce(run)
    return run


def _lock(path: pathlib.Path) -> None:
    """Process 0 locks the run's directory. Raises ValueError in every process where another run holds it."""
    problem = None
    if jax.process_index() == 0:
        try:
            fileio.lock(path / "lock")
        except ValueError as error:
            problem = error
    if not sharding.all_agree(problem is None):
        raise problem or ValueError(f"{path} is in use by another run")


def _introduce(run: Run) -> None:
    """Prints what is about to be trained, on what and from where."""
    settings, mesh, task, plan = run.settings, run.experiment.mesh, run.experiment.task, run.experiment.plan
    params = run.start.state.params
    sizes = jax.tree.map(lambda leaf, on: leaf.size * on, plan.split(params)[0], plan.trainable(task.network))
    count = sum(jax.tree.leaves(sizes))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(params)) - count
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    print(f"run         {run.workdir}: {run.start.origin}", flush=True)
    print(f"devices     {mesh.size} x {mesh.devices.flat[0].device_kind} ({axes}), {jax.process_count()} process(es)")
    print(f"model       {count:,} trainable parameters, {frozen:,} frozen")
    for heading, text in task.describe().items():
        print(f"{heading:<12}{text}")
    print(
        f"data        {settings.data.source}, {len(run.source):,} records, {settings.data.holdout} held out", flush=True
    )
