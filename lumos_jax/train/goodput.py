"""Goodput: the fraction of wall time, since a run was first started, spent in steps that count, and where the rest went.

`goodput.json` in the run's directory keeps the account over restarts. Process 0 writes it, by its own clock:

    startup     from the start of the process to the first step, except restore and compile
    restore     reading the checkpoint
    compile     tracing and compiling the step, and its first run
    data        waiting for batches
    save        steps waiting for a checkpoint; asynchronous writes cost nothing
    evaluation  held-out losses and samples
    redone      steps after the checkpoint that a restart went back to
    down        from the last entry of one process to the start of the next
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lumos_jax import fileio

FILE = "goodput.json"
CAUSES = ("startup", "restore", "compile", "data", "save", "evaluation", "redone", "down")
PREFIX = "goodput"  # of its metrics
_WRITE_EVERY = 10.0  # seconds


def process_start() -> float:
    """When this process began, in seconds of time.time(); now, where the system does not say."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return time.time()
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


class Ledger:
    """The account of one run. Only process 0 writes it."""

    def __init__(self, workdir: pathlib.Path, step: int, *, active: bool, began: float | None = None,
                 clock: Callable[[], float] = time.time):  # fmt: skip
        """Opens the account of `workdir`, or begins one at step 0.

        Args:
          workdir: the run's directory.
          step: where the run continues.
          active: whether this process writes it.
          began: when this process began; None: as the system says.
          clock: returns the time in seconds.
        """
        self.path, self.active, self.clock = workdir / FILE, active, clock
        self.began = self.started = process_start() if began is None else began
        self.lost = dict.fromkeys(CAUSES, 0.0)
        self.useful_at: dict[int, float] = {}  # step of a checkpoint -> useful seconds by then
        self._written = 0.0
        if account := self._read() if step else None:
            self.began = account["began"]
            self.lost |= account["lost"]
            useful = account["until"] - self.began - sum(self.lost.values())
            self.useful_at = {int(at): seconds for at, seconds in account["useful_at"].items() if int(at) <= step}
            self.lost["redone"] += max(useful - self.useful_at.get(step, useful), 0.0)
            self.lost["down"] += max(self.started - account["until"], 0.0)

    def _read(self) -> Mapping[str, Any] | None:
        """The account so far; None for a new run, and with a warning where the file is damaged."""
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            numbers = [kept["began"], kept["until"], *kept["lost"].values(), *kept["useful_at"].values()]
            if not set(kept["lost"]) <= set(CAUSES) or not all(
                map(math.isfinite, [*numbers, *map(int, kept["useful_at"])])
            ):
                raise ValueError("other numbers than were written")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if self.active:
                print(f"warning: {self.path} is damaged ({error}): goodput is counted from here on", file=sys.stderr)
            return None
        return kept

    def lose(self, cause: str, seconds: float) -> None:
        """Books seconds that were lost for steps."""
        self.lost[cause] += max(seconds, 0.0)

    def useful(self) -> float:
        """Seconds spent in steps that count, so far."""
        return self.clock() - self.began - sum(self.lost.values())

    def saved(self, step: int) -> None:
        """A checkpoint of this step was written: what was done by then will not be redone."""
        self.useful_at[step] = self.useful()
        self.write()

    def metrics(self) -> dict[str, float]:
        """goodput, in [0, 1], and goodput_lost_<cause> in seconds."""
        total = max(self.clock() - self.began, 1e-9)
        lost = {f"{PREFIX}_lost_{cause}": seconds for cause, seconds in self.lost.items()}
        if self.clock() - self._written > _WRITE_EVERY:
            self.write()
        return {PREFIX: max(self.useful(), 0.0) / total, **lost}

    def write(self) -> None:
        if not self.active:
            return
        self._written = until = self.clock()
        account = {"began": self.began, "until": until, "lost": self.lost, "useful_at": self.useful_at}
        fileio.write_whole(self.path, json.dumps(account, indent=1))

    def summary(self) -> str:
        """For people: goodput, total time, and what was lost, the largest first."""
        total = self.clock() - self.began
        lost = sorted(((seconds, cause) for cause, seconds in self.lost.items() if seconds >= 0.05), reverse=True)
        named = ", ".join(f"{cause} {seconds:.1f} s" for seconds, cause in lost)
        return (
            f"{max(self.useful(), 0.0) / max(total, 1e-9):.1%} of {total:.0f} s in steps; lost to {named or 'nothing'}"
        )


class CompilationCounter:
    """Counts what this process compiles or reads from the compilation cache, until it is closed."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, _seconds: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
