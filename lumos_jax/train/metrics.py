"""Metrics of a run: averages over the steps since the last log, written to metrics.jsonl, TensorBoard and a progress line.

The averages are saved with a checkpoint (`Window.state`), so that a resumed run writes the numbers of an uninterrupted one.
Timings are not.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from lumos_jax import fileio
from lumos_jax.train import goodput
from lumos_jax.train.tensorboard import EventWriter

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class Window:
    """Sums of the metrics of steps since the last log; steps that were not finite are counted, not averaged."""

    def __init__(self, state: Mapping[str, Any] | None = None):
        state = state or {}
        self.sums: dict[str, list[float] | float] = dict(state.get("sums", {}))
        self.steps: int = state.get("steps", 0)
        self.skipped: int = state.get("skipped", 0)

    def add(self, metrics: Mapping[str, np.ndarray]) -> bool:
        """Adds one step's metrics; False (and only counted) if that step was not finite."""
        if not metrics["finite"]:
            self.skipped += 1
            return False
        for name, value in metrics.items():
            new = np.asarray(value, np.float64) + self.sums.get(name, 0.0)
            self.sums[name] = new.tolist()
        self.steps += 1
        return True

    def state(self) -> dict[str, Any]:
        """Plain values for JSON, which is exact for float64."""
        return {"sums": self.sums, "steps": self.steps, "skipped": self.skipped}

    def close(self) -> dict[str, float]:
        """The averages by name, with loss_q1 .. loss_q4 by quartile of the timestep where there is one; empties the window."""
        result: dict[str, float] = {"skipped_steps": self.skipped}
        for name, total in self.sums.items():
            if name not in ("quartile_loss", "quartile_weight", "finite"):
                result[name] = total / self.steps
        if self.steps and "quartile_loss" in self.sums:
            pairs = zip(self.sums["quartile_loss"], self.sums["quartile_weight"], strict=True)
            for i, (loss, weight) in enumerate(pairs, start=1):
                if weight > 0:  # a small batch may miss a quartile
                    result[f"loss_q{i}"] = loss / weight
        self.__init__()
        return result


class Stopwatch:
    """Wall time of steps: waiting for data, waiting for the device, and host work."""

    def __init__(self, ledger: goodput.Ledger):
        """`ledger`: also books the parts that are lost for steps."""
        self.ledger = ledger
        self.reset()

    def reset(self) -> None:
        self.start = time.perf_counter()
        self.spent = {"data": 0.0, "device": 0.0, "paused": 0.0}
        self.steps = 0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Books its time: "data", "device", or "evaluation" and "save", which do not count as time of steps."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self.spent[name if name in self.spent else "paused"] += seconds
            if name in goodput.CAUSES:
                self.ledger.lose(name, seconds)

    def close(self, batch_size: int) -> dict[str, float]:
        """images_per_second, step_seconds and fractions of the step time; resets."""
        total = max(time.perf_counter() - self.start - self.spent["paused"], 1e-9)
        data, device = self.spent["data"] / total, self.spent["device"] / total
        steps = self.steps
        self.reset()
        return {
            "images_per_second": batch_size * steps / total,
            "step_seconds": total / max(steps, 1),
            "data_wait_fraction": data,
            "device_wait_fraction": device,
            "host_fraction": max(1.0 - data - device, 0.0),
        }


class Reporter:
    """Writes metrics.jsonl, TensorBoard events and the progress line; does nothing unless `active` (process 0)."""

    def __init__(self, workdir: pathlib.Path, *, total: int, start: int, active: bool):
        self.active = active
        if not active:
            return
        self.path = workdir / FILE
        _truncate(self.path, start)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self.events = EventWriter(workdir / TENSORBOARD, start)
        self.total, self.begun, self.first = total, time.monotonic(), start
        live = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1) if live else None

    def say(self, text: str) -> None:
        """Prints a line above the progress line."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def step(self, step: int) -> None:
        """Moves the progress line."""
        if self.active and self.bar is not None:
            self.bar.update(step - self.bar.n)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One object in metrics.jsonl and one point per name in TensorBoard."""
        if not self.active:
            return
        values = {name: float(value) if isinstance(value, np.floating) else value for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        fileio.with_retries(self.file.flush)  # a failed flush keeps its buffer
        self.events.write_scalars(step, values)
        fileio.with_retries(self.events.flush)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Updates the progress line: loss, images/s and time left."""
        if not self.active:
            return
        loss = f"loss {values['loss']:.4f}" if "loss" in values else "loss not finite"
        rate = f"{values['images_per_second']:.0f} images/s"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{loss}, {rate}")
            return
        done, elapsed = step - self.first, time.monotonic() - self.begun
        left = elapsed / max(done, 1) * (self.total - step)
        print(f"step {step}/{self.total}  {loss}  {rate}  {_clock(left)} left", file=sys.stderr, flush=True)

    def images(self, step: int, sheet: np.ndarray) -> None:
        """A sample sheet (H, W, 3) uint8 for TensorBoard."""
        if self.active:
            self.events.write_images(step, {"samples": sheet})

    def sync(self) -> None:
        """Syncs metrics.jsonl to disk, before a checkpoint that relies on it."""
        if self.active:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.events.close()
            if self.bar is not None:
                self.bar.close()


def _truncate(path: pathlib.Path, start: int) -> None:
    """Drop the lines after step `start`, which will be written again, and damaged ones, with a warning."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    kept, damaged = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
            if start > 0 and step <= start:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            damaged += number < len(lines)  # a kill leaves half of the last line
    if damaged:
        print(f"warning: {path}: {damaged} damaged line(s) dropped", file=sys.stderr)
    fileio.write_whole(path, b"".join(kept))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
