"""Stopping on request (SIGTERM and Ctrl-C finish the step under way, save, and leave), and the watchdog."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Context manager that turns signals into a question that the loop asks after each step.

    Several processes must stop after the same step: JAX's preemption service, which handles SIGTERM, agrees on one, and Ctrl-C
    is passed on to it as SIGTERM. A second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self.name: str | None = None
        self._several = jax.process_count() > 1

    def __enter__(self):
        numbers = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
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


@contextlib.contextmanager
def watchdog(minutes: float = 30.0) -> Iterator[Callable[[], None]]:
    """Yields `alive`: without a call of it for `minutes` the stacks of all threads go to stderr, again and again. The run goes
    on: whoever watches it decides."""
    alive = functools.partial(faulthandler.dump_traceback_later, 60 * minutes, repeat=True, file=sys.__stderr__)
    alive()
    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()
