"""Metrics of a run: averages over the steps since the last log, written to metrics.jsonl, TensorBoard and a progress line.

The averages are saved with a checkpoint (`Window.state`), so that a resumed run writes the numbers of an uninterrupted one.
Timings are not.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from lumos_jax import fileio

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class Window:
    """Sums of the metrics of steps since the last log; steps that were not finite are counted, not averaged."""

    def __init__(self, state: Mapping[str, Any] | None = None):
        self.sums: dict[str, list[float] | float] = {}
        self.steps = self.skipped = 0
        vars(self).update(state or {})

    def add(self, metrics: Mapping[str, np.ndarray]) -> bool:
        """Adds one step's metrics; False (and only counted) if that step was not finite."""
        if not metrics["finite"]:
            self.skipped += 1
            return False
        for name, value in metrics.items():
            self.sums[name] = (np.asarray(value, np.float64) + self.sums.get(name, 0.0)).tolist()
        self.steps += 1
        return True

    def state(self) -> dict[str, Any]:
        """Plain values for JSON, which is exact for float64."""
        return {"sums": self.sums, "steps": self.steps, "skipped": self.skipped}

    def close(self) -> dict[str, float]:
        """The averages by name, with loss_q1 .. loss_q4 by quartile of the timestep where there is one; empties the window."""
        sums = {name: total for name, total in self.sums.items() if name != "finite"}
        quartiles = zip(sums.pop("quartile_loss", ()), sums.pop("quartile_weight", ()), strict=True)
        result = {"skipped_steps": self.skipped} | {name: total / self.steps for name, total in sums.items()}
        for i, (loss, weight) in enumerate(quartiles, start=1):
            if weight > 0:  # a small batch may miss a quartile
                result[f"loss_q{i}"] = loss / weight
        self.__init__()
        return result


class EventWriter:
    """Writes one file of TensorBoard events (scalars and images), buffered until `flush`, without TensorFlow.

    Records and their checksums are TensorBoard's own. Its `EventFileWriter` would import TensorFlow where that is installed,
    which takes seconds, and memory of a GPU; so would `clu.metric_writers`.
    """

    def __init__(self, directory: pathlib.Path, start: int = 0):
        """`start`: the last step that counts. TensorBoard drops points of later steps that a former process wrote."""
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard finds event files by this name and reads them in its order.
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self.records = RecordWriter(open(directory / name, "xb"))  # noqa: SIM115 (closed by close())
        self.flush, self.close = self.records.flush, self.records.close
        self._write(file_version="brain.Event:2")
        self._write(step=start + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def _write(self, **fields) -> None:
        self.records.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one point per name."""
        values = [summary_pb2.Summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()]
        self._write(step=step, summary=summary_pb2.Summary(value=values))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes one image (H, W, 3) uint8, as PNG."""
        png, (height, width, _) = io.BytesIO(), pixels.shape
        Image.fromarray(pixels).save(png, "PNG")
        image = summary_pb2.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png.getvalue())
        self._write(step=step, summary=summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=name, image=image)]))


class Reporter:
    """Writes metrics.jsonl, TensorBoard events and the progress line; of all processes only the `active` one, process 0."""

    def __init__(self, workdir: pathlib.Path, *, total: int, start: int, active: bool):
        self.active, self.total, self.begun, self.first = active, total, time.monotonic(), start
        if active:
            _truncate(workdir / FILE, start)
        self.file = open(workdir / FILE if active else os.devnull, "a", encoding="utf-8")  # noqa: SIM115
        self.events = EventWriter(workdir / TENSORBOARD, start) if active else None
        hidden = not (active and sys.stderr.isatty())
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1, disable=hidden)

    def say(self, text: str) -> None:
        """Prints a line above the progress line."""
        if self.active:
            tqdm.write(text, file=sys.stderr)

    def step(self, step: int) -> None:
        """Moves the progress line."""
        self.bar.update(step - self.bar.n)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One object in metrics.jsonl and one point per name in TensorBoard."""
        values = {name: float(value) if isinstance(value, np.floating) else value for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        fileio.with_retries(self.file.flush)  # a failed flush keeps its buffer
        if self.events is not None:
            self.events.scalars(step, values)
            fileio.with_retries(self.events.flush)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Updates the progress line: loss, images/s and time left."""
        loss = f"loss {values['loss']:.4f}" if "loss" in values else "loss not finite"
        rate = f"{values['images_per_second']:.0f} images/s"
        self.bar.set_postfix_str(f"{loss}, {rate}")
        if self.bar.disable:
            left = (time.monotonic() - self.begun) / max(step - self.first, 1) * (self.total - step)
            self.say(f"step {step}/{self.total}  {loss}  {rate}  {tqdm.format_interval(left)} left")

    def image(self, step: int, sheet: np.ndarray) -> None:
        """A sample sheet (H, W, 3) uint8 for TensorBoard."""
        if self.events is not None:
            self.events.image(step, "samples", sheet)

    def sync(self) -> None:
        """Syncs metrics.jsonl to disk, before a checkpoint that relies on it."""
        if self.active:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.events is not None:
            self.events.close()


def _truncate(path: pathlib.Path, start: int) -> None:
    """Drops the lines after step `start`, which will be written again, and damaged ones, with a warning."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept, damaged = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= start > 0:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            damaged += number < len(lines)  # a kill leaves half of the last line
    if damaged:
        print(f"warning: {path}: {damaged} damaged line(s) dropped", file=sys.stderr)
    if lines:
        fileio.write_whole(path, b"".join(kept))
