"""Stopping on request: SIGTERM and Ctrl-C finish the step under way, save, and leave."""

from __future__ import annotations

import os
import signal

import jax
from jax.experimental import multihost_utils

FAILED = 1  # exit code of what the same command may cure
STOPPED = {"SIGINT": 130, "SIGTERM": 143}  # exit codes, as a shell reports them


class StopRequest:
    """Context manager that turns signals into a question that the loop asks after each step.

    Several processes must stop after the same step: JAX's preemption service, which handles SIGTERM, agrees on one, and Ctrl-C
    is passed on to it as SIGTERM. A second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self.name: str | None = None
        self._several = jax.process_count() > 1
        self._before: dict[int, object] = {}

    def __enter__(self):
        for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)

    def after(self, step: int) -> bool:
        """Whether the run is to stop after `step`; the same answer in every process."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            self.name = self.name or "SIGTERM"
            return True
        return self.name is not None and not self._several
