"""Writing checkpoints on storage that fails now and then: tried again after a while, with the state as it is by then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

from lumos_jax import patience
from lumos_jax.checkpoints import CheckpointError, Checkpoints


class Saver:
    """Saves what `capture` gives, and finds out about writes that failed behind the steps.

    A process of its own tries again, `retries` times, after 1, 2, 4 ... seconds. Several processes cannot agree on what failed
    in one of them: the error ends them all, and started again they continue from the checkpoint before.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        capture: Callable[[], tuple[int, dict[str, Any], dict[str, Any]] | None],
        say: Callable[[str], None],
        retries: int,
    ):
        """`capture` gives (step, state, meta) for Checkpoints.save, or None while the state is not to be saved; `say` tells
        people that a write is tried again."""
        self.checkpoints, self.capture, self.say, self.retries = checkpoints, capture, say, retries
        self.saved: int | None = None

    def save(self) -> None:
        """Starts to write what `capture` gives now. Raises CheckpointError when no try succeeds."""
        self._patiently(self._write)

    def check(self) -> None:
        """Finds out whether the write under way has failed. Raises CheckpointError as `save` does."""
        self._patiently(self.checkpoints.check)

    def wait(self) -> None:
        """Returns when all that was saved is on disk. Raises CheckpointError as `save` does."""
        self._patiently(self.checkpoints.wait)

    def _write(self) -> None:
        captured = self.capture()
        if captured is not None:
            self.checkpoints.save(*captured)
            self.saved = captured[0]

    def _write_whole(self) -> None:
        self.checkpoints.forget_failure()
        self._write()
        self.checkpoints.wait()

    def _patiently(self, action: Callable[[], None]) -> None:
        for wait in (*patience.waits(self.retries), None):
            try:
                action()
                return
            except CheckpointError as error:
                if wait is None or jax.process_count() > 1 or not patience.may_pass(error.__cause__ or error):
                    raise
                self.say(f"{error}. Trying again in {wait:.0f} s")
                time.sleep(wait)
                action = self._write_whole
