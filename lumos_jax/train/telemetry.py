"""What the loop observes while it trains: metrics of steps, where time goes, undecodable records, and the profiler.

Metrics of a step are read while the next one runs, so that the device never waits for the host. What a resumed run needs to
write the same numbers as an uninterrupted one is in `Telemetry.memory`, which is saved with every checkpoint.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lumos_jax import data
from lumos_jax.train import goodput, metrics
from lumos_jax.train.optimizer import make_schedule
from lumos_jax.train.run import Run


class Telemetry:
    """Of one run of the loop. Process 0 writes metrics and goodput; every process keeps the numbers."""

    def __init__(self, run: Run):
        settings, memory, start = run.settings, run.start.memory, run.start.step
        first = jax.process_index() == 0
        self.settings, self.profile_directory = settings, run.workdir / "profile"
        self.report = metrics.Reporter(run.workdir, total=settings.train.steps, start=start, active=first)
        self.ledger = goodput.Ledger(run.workdir, start, active=first)
        self.window = metrics.Window(memory.get("window"))
        self.corrupt = data.CorruptMeter(settings.data.max_corrupt_rate, memory.get("corrupt"))
        self.not_finite = memory.get("bad_in_a_row", 0)  # steps in a row, up to now
        self.learning_rate = make_schedule(settings.optimizer, settings.train.steps)
        self._compilations = 0  # programs that this process compiled or read from the compilation cache
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None  # a step that the device may still work on
        self._steps = 0  # since the last log
        self._profiling = False
        self._dispatched = (0.0, 0)  # time and compilations before the step

    def _count_compilation(self, event: str, _seconds: float, **_: Any) -> None:
        self._compilations += event == "/jax/core/compile/backend_compile_duration"

    def begin(self, restore_seconds: float) -> None:
        """Called before the first step."""
        self.ledger.lose("restore", restore_seconds)
        self.ledger.lose("startup", time.time() - self.ledger.started - restore_seconds)
        self.ledger.reset()

    def before_step(self, step: int, host: Mapping[str, np.ndarray]) -> None:
        """Takes note of the host batch of the step that follows `step`. Raises TooManyCorruptRecords."""
        if step == self.settings.train.profile_at:
            jax.profiler.start_trace(str(self.profile_directory))
            self._profiling = True
        for line in self.corrupt.add(host):
            self.report.say(line)
        self._dispatched = (time.time(), self._compilations)

    def after_step(self, step: int, values: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step that was dispatched, and reads those of the step before it.

        Raises FloatingPointError if config.train.nonfinite_limit steps in a row were not finite.
        """
        began, compilations = self._dispatched
        if self._compilations > compilations:
            jax.block_until_ready(values)
            self.ledger.lose("compile", time.time() - began)
        self.settle()
        self._pending = (step, values)
        self._steps += 1
        profiled = self.settings.train.profile_steps
        if self._profiling and step == self.settings.train.profile_at + profiled:
            self.settle()
            self._stop_profiler()
            self.report.say(f"profiler trace of {profiled} steps in {self.profile_directory}")

    def settle(self) -> None:
        """Reads the metrics of the last step, which waits for the device. Raises FloatingPointError as `after_step`."""
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        with self.ledger.part("device"):
            values = {name: np.asarray(value) for name, value in values.items()}
        self.report.step(step)
        if self.window.add(values):
            self.not_finite = 0
            return
        self.not_finite += 1
        limit = self.settings.train.nonfinite_limit
        self.report.say(
            f"step {step}: loss {float(values['loss'])}, gradient norm {float(values['grad_norm'])}: not finite, step "
            f"skipped ({self.not_finite} in a row; {limit} stop the run)"
        )
        if self.not_finite >= limit:
            raise FloatingPointError(
                f"{self.not_finite} steps in a row up to step {step} had no finite loss and gradient; the checkpoints "
                "are from before. Lower config.optimizer.learning_rate, set config.optimizer.clip_norm, or look at the data"
            )

    def log(self, step: int) -> None:
        """Writes the averages since the last log and moves the progress line."""
        self.settle()
        speed = self.ledger.speed(self._steps, self.settings.train.batch_size)
        self._steps = 0
        values = self.window.close() | speed | self.corrupt.counts() | self.ledger.metrics()
        values["learning_rate"] = float(self.learning_rate(step - 1))
        self.report.write(step, values)
        self.report.progress(step, values)

    def memory(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: plain values."""
        return {"window": self.window.state(), "corrupt": self.corrupt.state(), "bad_in_a_row": self.not_finite}

    def _stop_profiler(self) -> None:
        if self._profiling:
            self._profiling = False
            jax.profiler.stop_trace()

    def closers(self) -> Sequence[Callable[[], None]]:
        """To be called at the end, each whatever the others raise."""
        unregister = functools.partial(jax.monitoring.unregister_event_duration_listener, self._count_compilation)
        return self._stop_profiler, unregister, self.report.close, self.ledger.write
