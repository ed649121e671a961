"""The watchdog: a process that hangs prints where each of its threads stands."""

from __future__ import annotations

import faulthandler
import sys


class Watchdog:
    """Context manager. Without a call of `alive` for `minutes` the stacks of all threads go to stderr, again and again.

    The run goes on: whoever watches it decides.
    """

    def __init__(self, minutes: float = 30.0):
        self.seconds = 60 * minutes

    def alive(self) -> None:
        """Starts the time anew."""
        faulthandler.dump_traceback_later(self.seconds, repeat=True, file=sys.__stderr__)

    def __enter__(self):
        self.alive()
        return self

    def __exit__(self, *_):
        faulthandler.cancel_dump_traceback_later()
