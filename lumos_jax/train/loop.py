"""The training loop, top to bottom: set up, start or resume, step, report, evaluate, save, stop.

Step n is dispatched before the metrics of step n - 1 are read, so the device never waits for the host. Everything that a
resumed run needs is in the state, the step number and a little memory saved beside them; the data position is the step.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lumos_jax import config, data, fileio, tasks
from lumos_jax.checkpoints import CheckpointError, Checkpoints
from lumos_jax.config import io as config_io
from lumos_jax.preparation import cache
from lumos_jax.tasks import pictures
from lumos_jax.train import finetune, goodput, metrics, sharding, startup
from lumos_jax.train.evaluator import make_evaluator, to_mesh
from lumos_jax.train.experiment import Experiment, check_batches, use_compilation_cache
from lumos_jax.train.optimizer import make_schedule
from lumos_jax.train.saving import Saver
from lumos_jax.train.stop import StopRequest
from lumos_jax.train.watchdog import Watchdog

FAILED = 1
STOPPED = {"SIGINT": 130, "SIGTERM": 143}  # as a shell reports them


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that is built before the first step."""

    experiment: Experiment
    workdir: pathlib.Path
    source: data.Source
    checkpoints: Checkpoints
    start: startup.Start
    restore_seconds: float
    fingerprints: Mapping[str, str]

    @property
    def settings(self) -> config.Settings:
        return self.experiment.settings

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.experiment.mesh

    @property
    def task(self) -> tasks.Task:
        return self.experiment.task

    @property
    def frozen(self) -> Any:
        return self.experiment.frozen

    @property
    def plan(self) -> finetune.Plan:
        return self.experiment.plan


def prepare(settings: config.Settings, workdir: str) -> Run:
    """Opens the data, loads the frozen networks and makes or restores the state. Nothing of the step is compiled yet.

    Raises:
      ValueError: a user's mistake; the message says what, where and what to do.
      CheckpointError: there are checkpoints, and none can be restored.
    """
    use_compilation_cache(settings)
    check_batches(settings, sharding.make_mesh(settings.mesh))  # before data are opened and weights are read
    source = data.make_source(settings.data)
    data.make_loader(settings.data, source, training=True)  # refuses now what has no such records
    experiment = Experiment.build(settings)
    if settings.data.source == "cached":
        cache.check(settings, experiment.task)
        experiment = experiment.without_encoders()
    fingerprints = {"data": source.fingerprint(), **experiment.task.identity}
    path = fileio.local_directory("--workdir", workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        _lock(path)
        checkpoints = Checkpoints(path, settings.checkpoint)
    except OSError as error:
        raise ValueError(f"--workdir={workdir} cannot be used: {error}") from error
    before = time.time()
    begin = startup.start(experiment, path, checkpoints, fingerprints)
    restore = time.time() - before if begin.step else 0.0
    run = Run(experiment, path, source, checkpoints, begin, restore, fingerprints)
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
    settings, mesh, network = run.settings, run.mesh, run.task.network
    trained, rest = run.plan.split(run.start.state.params)
    on = run.plan.trainable(network)
    count = sum(jax.tree.leaves(jax.tree.map(lambda leaf, counts: leaf.size * counts, trained, on)))
    frozen = sum(leaf.size for leaf in jax.tree.leaves((trained, rest))) - count
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    print(f"run         {run.workdir}: {run.start.origin}", flush=True)
    print(f"devices     {mesh.size} x {mesh.devices.flat[0].device_kind} ({axes}), {jax.process_count()} process(es)")
    print(f"model       {count:,} trainable parameters, {frozen:,} frozen")
    for heading, text in run.task.describe().items():
        print(f"{heading:<12}{text}")
    print(
        f"data        {settings.data.source}, {len(run.source):,} records, {settings.data.holdout} held out", flush=True
    )


def train(run: Run) -> int:
    """Trains to the end, or until asked to stop, or until it cannot go on. Returns the process's exit code."""
    settings, memory = run.settings, run.start.memory
    steps, size = settings.train.steps, settings.train.batch_size
    first = jax.process_index() == 0
    report = metrics.Reporter(
        run.workdir, total=steps, start=run.start.step, tensorboard=settings.log.tensorboard, active=first
    )
    rows = sharding.local_rows(run.mesh, size)
    batches = data.make_train_iterator(
        settings.data, run.source, batch_size=size, rows=rows, start_step=run.start.step, finish=run.task.host
    )
    ledger = goodput.Ledger(run.workdir, run.start.step, active=first)
    window, watch = metrics.Window(memory.get("window")), metrics.Stopwatch(ledger)
    guard = Watchdog(settings.train.watchdog_minutes)
    corrupt = data.CorruptMeter(settings.data.max_corrupt_rate, memory.get("corrupt"))
    learning_rate = make_schedule(settings.optimizer, steps)
    step_fn = run.experiment.train_step
    state, step = run.start.state, run.start.step
    bad_in_a_row = memory.get("bad_in_a_row", 0)
    pending = None  # (step, metrics) that the device may still be working on

    def settle() -> None:
        """Reads the metrics of the step before, which waits for the device."""
        nonlocal pending, bad_in_a_row
        if pending is None:
            return
        number, values = pending
        pending = None
        with watch.part("device"):
            values = {name: np.asarray(value) for name, value in values.items()}
        report.step(number)
        if window.add(values):
            bad_in_a_row = 0
            return
        bad_in_a_row += 1
        report.say(
            f"step {number}: loss {float(values['loss'])}, gradient norm {float(values['grad_norm'])}: not finite, step "
            f"skipped ({bad_in_a_row} in a row; {settings.train.nonfinite_limit} stop the run)"
        )
        if bad_in_a_row >= settings.train.nonfinite_limit:
            raise FloatingPointError(
                f"{bad_in_a_row} steps in a row up to step {number} had no finite loss and gradient; the checkpoints "
                "are from before. Lower config.optimizer.learning_rate, set config.optimizer.clip_norm, or look at the data"
            )

    def capture() -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        settle()
        if bad_in_a_row:
            return None
        report.sync()
        kept = {"window": window.state(), "corrupt": corrupt.state(), "bad_in_a_row": bad_in_a_row}
        meta = {"settings": config_io.to_dict(settings), "fingerprints": dict(run.fingerprints), "memory": kept}
        return step, vars(state), meta

    saver = Saver(run.checkpoints, capture, lambda text: report.say(f"step {step}: {text}"))
    saver.saved = step or None

    def save(whole: bool = False) -> None:
        """Starts to write a checkpoint of this step, if there is none; `whole` waits until all are on disk."""
        with watch.part("save"):
            if saver.saved != step:
                saver.save()
                if saver.saved == step:
                    ledger.saved(step)
            if whole:
                saver.wait()

    evaluator = make_evaluator(run)

    def evaluate(with_sheet: bool) -> None:
        if evaluator is None:
            return
        settle()
        with watch.part("evaluation"):
            values, told = evaluator.measure(state)
            report.write(step, values)
            report.say(f"step {step}: {told}")
            if with_sheet:
                picture = evaluator.sheet(state)
                report.pictures(step, picture)
                if first:
                    pictures.save_png(picture, run.workdir / "samples" / f"step_{step}.png")

    profiling = False
    code, failure = 0, None
    try:
        with StopRequest() as stop, guard:
            sharding.barrier("the first step")
            ledger.lose("restore", run.restore_seconds)
            ledger.lose("startup", time.time() - ledger.started - run.restore_seconds)
            if step == 0:
                evaluate(with_sheet=False)
            watch.reset()
            while step < steps:
                if step == settings.train.profile_at:
                    jax.profiler.start_trace(str(run.workdir / "profile"))
                    profiling = True
                with watch.part("data"):
                    host = next(batches)
                for line in corrupt.add(host):
                    report.say(line)
                compiled, before = goodput.compilations(), time.time()
                state, values = step_fn(state, run.frozen, to_mesh(run.mesh, host, rows, size))
                if goodput.compilations() > compiled:
                    jax.block_until_ready(values)
                    ledger.lose("compile", time.time() - before)
                settle()
                guard.alive()
                step += 1
                watch.steps += 1
                pending = (step, values)
                saver.check()
                if profiling and step == settings.train.profile_at + settings.train.profile_steps:
                    settle()
                    jax.profiler.stop_trace()
                    profiling = False
                    report.say(f"profiler trace of {settings.train.profile_steps} steps in {run.workdir / 'profile'}")
                if step % settings.log.every == 0 or step == steps:
                    settle()
                    values = window.close() | watch.close(size) | corrupt.counts() | ledger.metrics()
                    values["learning_rate"] = float(learning_rate(step - 1))
                    report.write(step, values)
                    report.progress(step, values)
                if settings.eval.every and (step % settings.eval.every == 0 or step == steps):
                    evaluate(with_sheet=True)
                    guard.alive()
                if step % settings.checkpoint.every == 0 or step == steps:
                    save()
                if step < steps and stop.after(step):
                    save(whole=True)
                    report.say(f"{stop.name}: saved step {step}; the same command continues from there")
                    code = STOPPED.get(stop.name, FAILED)
                    break
            save(whole=True)
    except Exception as error:  # noqa: BLE001 (reported or raised below)
        failure = error
    finally:
        closing = [batches.close, report.close, ledger.write]
        if profiling:
            closing.insert(0, jax.profiler.stop_trace)
        if failure is None or jax.process_count() == 1:  # else a write would wait for processes that have left it
            closing.append(run.checkpoints.close)
        failure = _close(closing, failure)
    if failure is not None:  # reported last of all, below what threads that were closed had to say
        _report(failure, run, first)
        return FAILED
    if code == 0 and first:
        if settings.eval.every:
            print(f"samples     {run.workdir / 'samples'}")
        if settings.log.tensorboard:
            print(f"tensorboard {run.workdir / metrics.TENSORBOARD}")
        print(f"checkpoint  {run.checkpoints.directory / str(step)}")
        print(f"goodput     {ledger.told()}")
    return code


def _close(closing: Sequence[Callable[[], None]], failure: Exception | None) -> Exception | None:
    """Calls all; returns the failure before, or else the first of these: a full disk fails them all."""
    for close in closing:
        try:
            close()
        except Exception as error:  # noqa: BLE001 (returned)
            failure = failure or error
    return failure


def _report(failure: Exception, run: Run, first: bool) -> None:
    """One line about a failure that was to be expected; raises any other."""
    if isinstance(failure, OSError) and fileio.is_permanent(failure):
        failure = run.checkpoints.failed(failure, "metrics or pictures beside the checkpoints")
    if not isinstance(failure, (FloatingPointError, CheckpointError, data.TooManyCorruptRecords, OSError)):
        raise failure
    if first or not isinstance(failure, FloatingPointError):  # the loss is the same in all processes
        print(f"error: {failure}", file=sys.stderr, flush=True)
