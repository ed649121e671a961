"""Where wall time goes: the speed since the last log, and goodput over all starts of a run.

Goodput is the fraction of time, since a run was first started, spent in steps that count. `goodput.json` in the run's directory
keeps the account of what was lost. Process 0 writes it, by its own clock:

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

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from lumos_jax import fileio

FILE = "goodput.json"
CAUSES = ("startup", "restore", "compile", "data", "save", "evaluation", "redone", "down")
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
    """The account of one run. Every process keeps it; only process 0 (`active`) writes it."""

    def __init__(self, workdir: pathlib.Path, step: int, *, active: bool, began: float | None = None,
                 clock: Callable[[], float] = time.time):  # fmt: skip
        """Continues the account of `workdir` at `step`, or begins one at step 0.

        began: when this process began; None: as the system says. clock: returns the time in seconds.
        """
        self.path, self.active, self.clock = workdir / FILE, active, clock
        self.began = self.started = process_start() if began is None else began
        self.lost = dict.fromkeys(CAUSES, 0.0)
        self.device_wait = 0.0  # seconds of waiting for the device, which count as steps
        self.useful_at: dict[int, float] = {}  # step of a checkpoint -> useful seconds by then
        self._written = 0.0
        try:
            if step and self.path.exists():
                self._continue(json.loads(self.path.read_text(encoding="utf-8")), step)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if active:
                print(f"warning: {self.path} is damaged ({error}): goodput is counted from here on", file=sys.stderr)
        self.reset()

    def _continue(self, account: dict[str, Any], step: int) -> None:
        """Takes over the account of the processes before. Raises as the many ways of damage do, and changes nothing then."""
        lost = self.lost | account["lost"]
        useful_at = {int(at): seconds for at, seconds in account["useful_at"].items() if int(at) <= step}
        useful = account["until"] - account["began"] - sum(lost.values())
        if set(lost) != set(CAUSES) or not math.isfinite(useful + sum(useful_at.values())):
            raise ValueError("other numbers than were written")
        lost["redone"] += max(useful - useful_at.get(step, useful), 0.0)
        lost["down"] += max(self.started - account["until"], 0.0)
        self.began, self.lost, self.useful_at = account["began"], lost, useful_at

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Books the time of a part of the loop: one of CAUSES, or "device"."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            if name == "device":
                self.device_wait += seconds
            else:
                self.lose(name, seconds)

    def lose(self, cause: str, seconds: float) -> None:
        """Books seconds that were lost for steps."""
        self.lost[cause] += max(seconds, 0.0)

    def reset(self) -> None:
        """The next `speed` counts from here."""
        self._since = time.perf_counter(), self.device_wait, dict(self.lost)

    def speed(self, steps: int, batch_size: int) -> dict[str, float]:
        """images_per_second, step_seconds and fractions of the step time since the last call, for so many steps.

        Evaluation and saving do not count as time of steps.
        """
        start, device, before = self._since
        lost = {cause: seconds - before[cause] for cause, seconds in self.lost.items()}
        total = max(time.perf_counter() - start - lost["evaluation"] - lost["save"], 1e-9)
        data, device = lost["data"] / total, (self.device_wait - device) / total
        self.reset()
        return {
            "images_per_second": batch_size * steps / total,
            "step_seconds": total / max(steps, 1),
            "data_wait_fraction": data,
            "device_wait_fraction": device,
            "host_fraction": max(1.0 - data - device, 0.0),
        }

    def useful(self) -> float:
        """Seconds spent in steps that count, so far."""
        return self.clock() - self.began - sum(self.lost.values())

    def goodput(self) -> float:
        """In [0, 1]."""
        return max(self.useful(), 0.0) / max(self.clock() - self.began, 1e-9)

    def saved(self, step: int) -> None:
        """A checkpoint of this step was written: what was done by then will not be redone."""
        self.useful_at[step] = self.useful()
        self.write()

    def metrics(self) -> dict[str, float]:
        """goodput, and goodput_lost_<cause> in seconds."""
        if self.clock() - self._written > _WRITE_EVERY:
            self.write()
        return {"goodput": self.goodput(), **{f"goodput_lost_{cause}": lost for cause, lost in self.lost.items()}}

    def write(self) -> None:
        if self.active:
            self._written = until = self.clock()
            account = {"began": self.began, "until": until, "lost": self.lost, "useful_at": self.useful_at}
            fileio.write_whole(self.path, json.dumps(account, indent=1))

    def summary(self) -> str:
        """For people: goodput, total time, and what was lost, the largest first."""
        lost = sorted(((seconds, cause) for cause, seconds in self.lost.items() if seconds >= 0.05), reverse=True)
        named = ", ".join(f"{cause} {seconds:.1f} s" for seconds, cause in lost)
        total = self.clock() - self.began
        return f"{self.goodput():.1%} of {total:.0f} s in steps; lost to {named or 'nothing'}"
