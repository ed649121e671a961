"""Stopping on request: SIGTERM and Ctrl-C finish the step under way, save, and leave."""

from __future__ import annotations

import os
import signal

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Context manager that turns signals into a question the loop asks between steps.

    With several processes all must leave after the same step: JAX's preemption service, which listens for SIGTERM, agrees
    on one; Ctrl-C is turned into SIGTERM for it. A second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self.name: str | None = None
        self._many = jax.process_count() > 1
        self._before: dict[int, object] = {}

    def __enter__(self):
        handled = (signal.SIGINT,) if self._many else (signal.SIGINT, signal.SIGTERM)
        for number in handled:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._many:
                os.kill(os.getpid(), signal.SIGTERM)

    def after(self, step: int) -> bool:
        """True if the run is to stop after `step`; the same answer in every process."""
        if not self._many:
            return self.name is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.name = self.name or "SIGTERM"
            return True
        return False
