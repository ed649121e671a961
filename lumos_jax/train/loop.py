"""The training loop, top to bottom: input, steps, reports, evaluation, checkpoints, stop.

Step n is dispatched before the metrics of step n - 1 are read, so that the device never waits for the host. A resumed run needs
the state, the step number and a little memory saved beside them; its position in the data is the step number.
"""

from __future__ import annotations

import sys
from typing import Any

import jax

from lumos_jax import data, fileio
from lumos_jax.checkpoints import CheckpointError
from lumos_jax.exit_codes import FAILED, STOPPED
from lumos_jax.train import metrics, sharding
from lumos_jax.train.run import Run, prepare
from lumos_jax.train.saving import Saver
from lumos_jax.train.state import TrainState
from lumos_jax.train.stop import StopRequest, watchdog
from lumos_jax.train.telemetry import Telemetry

__all__ = ["prepare", "train"]


def train(run: Run) -> int:
    """Trains to the end, or until asked to stop, or until it cannot go on. Returns the process's exit code."""
    settings, experiment = run.settings, run.experiment
    steps, size = settings.train.steps, settings.train.batch_size
    state, step = run.start.state, run.start.step
    code, failure = 0, None

    telemetry = Telemetry(run)
    say = telemetry.report.say
    batches = data.make_train_iterator(
        settings.data, run.source, batch_size=size, rows=experiment.local_rows(size), start_step=step,
        finish=experiment.task.host,
    )  # fmt: skip

    def capture() -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """What a checkpoint holds; None while steps are not finite: the state is good, but may never become finite again."""
        telemetry.settle()
        if telemetry.not_finite:
            return None
        telemetry.report.sync()  # metrics.jsonl reaches at least as far as the checkpoint
        return step, vars(state), run.meta(telemetry.memory())

    saver = Saver(run.checkpoints, capture, lambda text: say(f"step {step}: {text}"))
    saver.saved = step or None
    try:
        with StopRequest() as stop, watchdog() as alive:
            sharding.barrier("the first step")
            telemetry.begin(run.restore_seconds)
            if step == 0 and run.evaluator is not None:
                _evaluate(run, telemetry, step, state, sheet=False)

            while step < steps:
                with telemetry.ledger.part("data"):
                    host = next(batches)
                telemetry.before_step(step, host)
                batch = experiment.device_batch(host, size)
                state, values = experiment.train_step(state, experiment.frozen, batch)
                step += 1
                telemetry.after_step(step, values)  # reads the metrics of the step before
                alive()
                saver.check()  # a write behind the steps may have failed

                last = step == steps
                if last or step % settings.log.every == 0:
                    telemetry.log(step)
                if run.evaluator is not None and (last or step % settings.eval.every == 0):
                    _evaluate(run, telemetry, step, state, sheet=True)
                    alive()
                if run.suite is not None and (last or step % settings.eval.suite_every == 0):
                    _evaluate_suite(run, telemetry, step, state)
                    alive()
                if last or step % settings.checkpoint.every == 0:
                    _save(saver, telemetry, step)
                if not last and stop.after(step):
                    _save(saver, telemetry, step, wait=True)
                    say(f"{stop.name}: saved step {step}; the same command continues from there")
                    code = STOPPED.get(stop.name, FAILED)
                    break
            _save(saver, telemetry, step, wait=True)
    except Exception as error:  # noqa: BLE001 (reported or raised below)
        failure = error
    finally:
        closers = [batches.close, *telemetry.closers()]
        if failure is None or jax.process_count() == 1:  # else a write would wait for processes that have left it
            closers.append(run.checkpoints.close)
        for close in closers:
            try:
                close()
            except Exception as error:  # noqa: BLE001 (reported or raised below)
                failure = failure or error  # the first: a full disk fails several
    if failure is not None:  # reported last, below what closed threads had to print
        return _report(failure, run)
    if code == 0 and jax.process_index() == 0:
        _conclude(run, telemetry, step)
    return code


def _evaluate(run: Run, telemetry: Telemetry, step: int, state: TrainState, sheet: bool) -> None:
    """Measures the held-out records, and shows samples of them if `sheet`."""
    telemetry.settle()
    with telemetry.ledger.part("evaluation"):
        values, sentence = run.evaluator.measure(state)
        telemetry.report.write(step, values)
        telemetry.report.say(f"step {step}: {sentence}")
        if sheet:
            image = run.evaluator.sheet(state)
            telemetry.report.image(step, image)
            if jax.process_index() == 0:
                fileio.save_png(image, run.workdir / "samples" / f"step_{step}.png")


def _evaluate_suite(run: Run, telemetry: Telemetry, step: int, state: TrainState) -> None:
    telemetry.settle()
    with telemetry.ledger.part("evaluation"):
        values, sentence = run.suite.measure(state)
        telemetry.report.write(step, values)
        telemetry.report.say(f"step {step}: {sentence}")


def _save(saver: Saver, telemetry: Telemetry, step: int, wait: bool = False) -> None:
    """Starts to write a checkpoint of this step, if there is none; `wait`: until all are on disk."""
    with telemetry.ledger.part("save"):
        if saver.saved != step:
            saver.save()
            if saver.saved == step:
                telemetry.ledger.saved(step)
        if wait:
            saver.wait()


def _report(failure: Exception, run: Run) -> int:
    """Prints one line about a failure that is no fault of the program; raises any other. Returns the exit code."""
    if isinstance(failure, OSError) and fileio.permanent_reason(failure):
        failure = run.checkpoints.failed(failure, "metrics or images beside the checkpoints")
    if not isinstance(failure, (FloatingPointError, CheckpointError, data.TooManyCorruptRecords, OSError)):
        raise failure
    if jax.process_index() == 0 or not isinstance(failure, FloatingPointError):  # all processes have the same loss
        print(f"error: {failure}", file=sys.stderr, flush=True)
    return FAILED


def _conclude(run: Run, telemetry: Telemetry, step: int) -> None:
    """Prints where the results are."""
    if run.settings.eval.every:
        print(f"samples     {run.workdir / 'samples'}")
    print(f"tensorboard {run.workdir / metrics.TENSORBOARD}")
    print(f"checkpoint  {run.checkpoints.directory / str(step)}")
    print(f"goodput     {telemetry.ledger.summary()}")
