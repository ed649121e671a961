"""Checkpoint writes that one process retries; of several processes an error ends the run, which the launcher restarts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import jax

from lumos_jax import fileio
from lumos_jax.checkpoints import CheckpointError, Checkpoints


class Saver:
    """Saves behind the steps; a write that fails is retried with the state of that time. Methods raise CheckpointError when no
    try succeeds."""

    def __init__(self, checkpoints: Checkpoints, capture: Callable[[], tuple | None], say: Callable[[str], None]):
        """`capture` gives (step, state, meta) for Checkpoints.save, or None while that must not be saved; `say` reports."""
        self.checkpoints, self.capture, self.say = checkpoints, capture, say
        self.saved: int | None = None  # the last step whose write was started
        self._writing = False

    def save(self) -> None:
        """Starts to write what `capture` gives now."""
        self._try(self._write)

    def check(self) -> None:
        """Finds out whether the write under way has failed."""
        if self._writing:
            self._writing = self._try(self.checkpoints.check) is False

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        self._try(self.checkpoints.wait)

    def _write(self, done: Collection[int] = ()) -> None:
        self.checkpoints.wait()
        captured = self.capture()
        if captured is not None and captured[0] not in done:
            self.checkpoints.save(*captured)
            self.saved, self._writing = captured[0], True

    def _write_again(self) -> None:
        self.checkpoints.reopen()
        self._write(self.checkpoints.steps())
        self.checkpoints.wait()

    def _try(self, action: Callable[[], Any]) -> Any:
        for delay in fileio.delays():
            try:
                return action()
            except CheckpointError as error:
                if jax.process_count() > 1 or fileio.permanent_reason(error.__cause__ or error):
                    raise
                self.say(f"{error}. Trying again in {delay:.0f} s")
            time.sleep(delay)
            action = self._write_again
        return action()
