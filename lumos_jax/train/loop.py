"""The training loop, top to bottom: set up, start or resume, step, report, evaluate, save, stop.

Step n is dispatched before the metrics of step n - 1 are read, so the device never waits for the host. Everything that a
resumed run needs is in the state, the step number and a little memory saved beside them; the data position is the step.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lumos_jax import config, config_io, data, evaluation, tasks
from lumos_jax.checkpoints import CheckpointError, Checkpoints
from lumos_jax.tasks import pictures, sampling
from lumos_jax.train import cache, metrics, rngs, sharding, startup
from lumos_jax.train.optimizer import make_optimizer, make_schedule
from lumos_jax.train.state import TrainState
from lumos_jax.train.step import make_train_step
from lumos_jax.train.stop import StopRequest

FAILED = 1
STOPPED = {"SIGINT": 130, "SIGTERM": 143}  # as a shell reports them


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that is built before the first step."""

    settings: config.Settings
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    source: data.Source
    task: tasks.Task
    frozen: Any
    optimizer: Any
    checkpoints: Checkpoints
    start: startup.Start
    fingerprints: Mapping[str, str]


def prepare(settings: config.Settings, workdir: str) -> Run:
    """Opens the data, loads the frozen networks and makes or restores the state. Nothing of the step is compiled yet.

    Raises:
      ValueError: a user's mistake; the message says what, where and what to do.
    """
    if settings.train.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(settings.train.compilation_cache))
    mesh = sharding.make_mesh(settings.mesh)
    sharding.check_batch(mesh, settings.train.batch_size // settings.optimizer.accumulate, "train.batch_size")
    if settings.eval.every:
        sharding.check_batch(mesh, settings.eval.batch_size, "eval.batch_size")
    source = data.make_source(settings.data)
    task, frozen = tasks.make_task(settings)
    if settings.data.source == "cached":
        cache.check(settings, task)
        frozen = task.without_encoders(frozen)
    frozen = jax.device_put(frozen, sharding.replicated(mesh))
    fingerprints = {"data": source.fingerprint(), **task.identity}
    shapes = jax.eval_shape(task.dit.init, rngs.key(0, "init"))
    optimizer = make_optimizer(settings.optimizer, settings.train.steps, task.dit.trainable())
    path = pathlib.Path(workdir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(path, settings.checkpoint)
    except OSError as error:
        raise ValueError(f"--workdir={workdir} cannot be used: {error}") from error
    begin = startup.start(settings, path, checkpoints, task.dit, optimizer, mesh, fingerprints)
    if jax.process_index() == 0:
        config_io.save(settings, path / "config.json")
        _introduce(settings, path, mesh, source, task, shapes, begin)
    return Run(settings, path, mesh, source, task, frozen, optimizer, checkpoints, begin, fingerprints)


def _introduce(settings, path, mesh, source, task, shapes, begin) -> None:
    count = sum(
        leaf.size for leaf, on in zip(jax.tree.leaves(shapes), jax.tree.leaves(task.dit.trainable()), strict=True) if on
    )
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    print(f"run         {path}: {begin.origin}", flush=True)
    print(f"devices     {mesh.size} x {mesh.devices.flat[0].device_kind} ({axes}), {jax.process_count()} process(es)")
    print(f"model       {count:,} trainable parameters, latents {task.latent_shape}")
    print(f"condition   {settings.encoder.output} tokens of {task.identity['encoder']}")
    print(f"data        {settings.data.source}, {len(source):,} records, {settings.data.holdout} held out", flush=True)


class _Evaluator:
    """The held-out loss and the sample sheet, on the same records every time."""

    def __init__(self, run: Run):
        self.run, settings = run, run.settings
        self.gather = sharding.make_gather(run.mesh, settings.model.dtype)
        ids = data.holdout_records(settings.data, run.source)
        size = settings.eval.batch_size
        rows = sharding.local_rows(run.mesh, size)
        self.batches = []
        for first in range(0, settings.eval.records, size):
            local = data.read_batch(settings.data, run.source, [ids[first + row] for row in rows])
            self.batches.append(_to_mesh(run.mesh, local, rows, size))
        everywhere = sharding.replicated(run.mesh)
        self.loss_step = evaluation.make_held_out_step(
            run.task, lambda index: rngs.streams(settings.train.seed, "eval", index), self.gather, everywhere
        )
        self.shown = _of_the_task(data.read_batch(settings.data, run.source, ids[: settings.eval.rows]))
        show = jax.jit(run.task.source_pictures, out_shardings=everywhere)
        self.sources = np.asarray(show(run.frozen, self.shown))
        keys = (rngs.key(settings.train.seed, "sheet/noise"), rngs.key(settings.train.seed, "sheet/sampler"))
        options = sampling.options_of(settings.eval)
        self.draw = jax.jit(
            lambda params, frozen, batch: sampling.draw_for_images(
                run.task, params, frozen, batch, keys, settings.eval.samples, options, self.gather
            ),
            out_shardings=everywhere,
        )

    def loss(self, state: TrainState) -> dict[str, float]:
        return evaluation.held_out_loss(self.loss_step, state.ema, self.run.frozen, self.batches)

    def sheet(self, state: TrainState) -> np.ndarray:
        """Rows of (source | sample | sample ...), one picture (H, W, 3) uint8."""
        drawn = np.asarray(self.draw(state.ema, self.run.frozen, self.shown))
        return pictures.sheet(np.concatenate([self.sources[:, None], drawn], axis=1))


def _to_mesh(mesh, host: Mapping[str, np.ndarray], rows, size: int):
    """What the device needs of a host batch, on the device."""
    return sharding.global_batch(mesh, _of_the_task(host) | {"weight": host["weight"]}, rows, size)


def _of_the_task(host: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The pictures, or what a cache holds of them; not weights and names."""
    return {name: array for name, array in host.items() if name not in ("weight", "record", "problem")}


def train(run: Run) -> int:
    """Trains to the end, or until asked to stop, or until it cannot go on. Returns the process's exit code."""
    settings, memory = run.settings, run.start.memory
    steps, size = settings.train.steps, settings.train.batch_size
    first = jax.process_index() == 0
    report = metrics.Reporter(
        run.workdir, total=steps, start=run.start.step, tensorboard=settings.log.tensorboard, active=first
    )
    rows = sharding.local_rows(run.mesh, size)
    batches = data.make_train_iterator(settings.data, run.source, batch_size=size, rows=rows, start_step=run.start.step)
    window, watch = metrics.Window(memory.get("window")), metrics.Stopwatch()
    corrupt = data.CorruptMeter(settings.data.max_corrupt_rate, memory.get("corrupt"))
    learning_rate = make_schedule(settings.optimizer, steps)
    step_fn = make_train_step(settings, run.task, run.optimizer, run.mesh)
    state, step = run.start.state, run.start.step
    bad_in_a_row = memory.get("bad_in_a_row", 0)
    saved = step if step else None
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

    def save() -> None:
        nonlocal saved
        settle()
        if saved == step or bad_in_a_row:
            return
        with watch.part("paused"):
            report.sync()
            kept = {"window": window.state(), "corrupt": corrupt.state(), "bad_in_a_row": bad_in_a_row}
            meta = {"settings": config_io.to_dict(settings), "fingerprints": dict(run.fingerprints), "memory": kept}
            run.checkpoints.save(step, vars(state), meta)
            saved = step

    evaluator = _Evaluator(run) if settings.eval.every else None

    def evaluate(with_sheet: bool) -> None:
        if evaluator is None:
            return
        settle()
        with watch.part("paused"):
            values = evaluator.loss(state)
            report.write(step, values)
            report.say(
                f"step {step}: held-out loss {values['held_out_loss']:.4f}, with the null condition "
                f"{values['held_out_null_loss']:.4f}, margin {values['held_out_margin']:+.4f}"
            )
            if with_sheet:
                picture = evaluator.sheet(state)
                report.pictures(step, picture)
                if first:
                    pictures.save_png(picture, run.workdir / "samples" / f"step_{step}.png")

    profiling = False
    code = 0
    try:
        with StopRequest() as stop:
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
                state, values = step_fn(state, run.frozen, _to_mesh(run.mesh, host, rows, size))
                settle()
                step += 1
                watch.steps += 1
                pending = (step, values)
                if profiling and step == settings.train.profile_at + settings.train.profile_steps:
                    settle()
                    jax.profiler.stop_trace()
                    profiling = False
                    report.say(f"profiler trace of {settings.train.profile_steps} steps in {run.workdir / 'profile'}")
                if step % settings.log.every == 0 or step == steps:
                    settle()
                    values = window.close() | watch.close(size) | corrupt.counts()
                    values["learning_rate"] = float(learning_rate(step - 1))
                    report.write(step, values)
                    report.progress(step, values)
                if settings.eval.every and (step % settings.eval.every == 0 or step == steps):
                    evaluate(with_sheet=True)
                if step % settings.checkpoint.every == 0 or step == steps:
                    save()
                if step < steps and stop.after(step):
                    save()
                    run.checkpoints.wait()
                    report.say(f"{stop.name}: saved step {step}; the same command continues from there")
                    code = STOPPED.get(stop.name, FAILED)
                    break
            run.checkpoints.wait()
    except (FloatingPointError, CheckpointError, data.TooManyCorruptRecords, OSError) as error:
        report.say(f"error: {error}")
        code = FAILED
    finally:
        if profiling:
            jax.profiler.stop_trace()
        batches.close()
        report.close()
        run.checkpoints.close()
    if code == 0 and first:
        if settings.eval.every:
            print(f"samples     {run.workdir / 'samples'}")
        if settings.log.tensorboard:
            print(f"tensorboard {run.workdir / metrics.TENSORBOARD}")
        print(f"checkpoint  {run.checkpoints.directory / str(step)}")
    return code
