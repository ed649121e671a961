"""Writing checkpoints on storage that fails now and then: tried again after a while, with the state as it is by then."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lumos_jax import patience
from lumos_jax.checkpoints import CheckpointError, Checkpoints

_DONE, _UNDER_WAY, _MAY_PASS, _LASTS = range(4)  # how a write stands, the worst last


class _Alone(CheckpointError):
    """Within steps of a save that all processes take together, where no other one may know of it: no try can follow."""


class Saver:
    """Saves what `capture` gives, and finds out about writes that failed behind the steps.

    It tries again, `retries` times, after 1, 2, 4 ... seconds. Several processes do so together: whatever fails in one of them
    counts as failed in all, which they agree on before each save, after it, and where all call `check`.
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
        self._several = jax.process_count() > 1
        self._under_way = False

    def save(self) -> None:
        """Starts to write what `capture` gives now. Raises CheckpointError when no try succeeds."""
        if not self._patiently(self._get_ready):
            if self._several:
                self._write()
            else:
                self._patiently(self._write)

    def check(self, together: bool = True) -> None:
        """Finds out whether the write under way has failed: of several processes only where `together`, as all call it then.
        Raises CheckpointError as `save` does."""
        if self._under_way and (together or not self._several):
            self._patiently(self.checkpoints.check)

    def wait(self) -> None:
        """Returns when all that was saved is on disk. Raises CheckpointError as `save` does."""
        self._patiently(self.checkpoints.wait)

    def _get_ready(self) -> None:
        self.checkpoints.wait()
        self.checkpoints.probe()

    def _write(self, whole: Collection[int] = ()) -> None:
        """`whole`: steps that are on disk, as where only what followed a write has failed."""
        captured = self.capture()
        if captured is None or captured[0] in whole:
            return
        try:
            self.checkpoints.save(*captured)
        except CheckpointError as error:
            raise (_Alone(str(error)) if self._several else error) from error.__cause__
        self.saved, self._under_way = captured[0], True

    def _write_whole(self) -> None:
        if self._several:  # opening the directory is a step that all take together
            problem = self._tried(self.checkpoints.probe)
            if self._agree(problem, _DONE) != _DONE:
                raise self._told(problem)
        try:
            self.checkpoints.forget_failure()
        except CheckpointError as error:
            raise (_Alone(str(error)) if self._several else error) from error.__cause__
        self._write(self.checkpoints.steps())
        self.checkpoints.wait()

    def _patiently(self, action: Callable[[], bool | None]) -> bool:
        """Whether it took a further try, by which all is written."""
        again = False
        for wait in (*patience.waits(self.retries), None):
            stands = []
            problem = self._tried(lambda action=action, stands=stands: stands.append(action()))
            worst = self._agree(problem, _UNDER_WAY if stands == [False] else _DONE)
            if worst in (_DONE, _UNDER_WAY):
                self._under_way = self._under_way and worst == _UNDER_WAY
                return again
            problem = self._told(problem)
            if wait is None or worst == _LASTS:
                raise problem
            self.say(f"{problem}. Trying again in {wait:.0f} s")
            time.sleep(wait)
            action, again = self._write_whole, True
        raise AssertionError("the last try returns or raises")

    def _tried(self, action: Callable[[], Any]) -> CheckpointError | None:
        try:
            action()
        except _Alone:
            raise
        except CheckpointError as error:
            return error
        return None

    def _agree(self, problem: CheckpointError | None, well: int) -> int:
        """How it stands in the process where it stands worst; `well` is how it does in this one unless there is a problem."""
        own = well
        if problem is not None:
            own = _MAY_PASS if patience.may_pass(problem.__cause__ or problem) else _LASTS
        if not self._several:
            return own
        return int(multihost_utils.process_allgather(np.asarray(own, np.int32)).max())

    def _told(self, problem: CheckpointError | None) -> CheckpointError:
        return problem or CheckpointError("another process could not write its part of a checkpoint; see its log")
