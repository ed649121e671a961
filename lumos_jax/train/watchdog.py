"""The watchdog: a run that hangs says so, and where every thread of every process stands."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time

import jax


class Watchdog:
    """Context manager; `alive` is to be called as steps finish.

    When that has not happened for `minutes`, each process that waits writes one line and the stacks of all its threads to its
    stderr, and again after as long. The run goes on: whoever watches it decides. 0 minutes: no watchdog.
    """

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.step, self.since = 0, time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self, step: int) -> None:
        self.step, self.since = step, time.monotonic()

    def __enter__(self):
        self.alive(self.step)
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        if self.seconds:
            self._thread.join()

    def _watch(self) -> None:
        barked = self.since
        while not self._ended.wait(min(self.seconds / 4, 5.0)):
            barked = max(barked, self.since)
            if time.monotonic() - barked < self.seconds:
                continue
            barked = time.monotonic()
            print(
                f"watchdog: process {jax.process_index()} has finished no step for {(barked - self.since) / 60:.3g} minutes, "
                f"since step {self.step}; its threads stand here (config.train.watchdog_minutes):",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
