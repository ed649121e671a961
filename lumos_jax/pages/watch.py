"""Watch a run train: curves, scores and sample sheets, read again and again from the run's files. Nothing is loaded."""

from __future__ import annotations

import json
import os
import pathlib
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd
from PIL import Image

from lumos_jax.checkpoints.manager import DIRECTORY
from lumos_jax.evaluation import scoring
from lumos_jax.pages.controls import PRIVATE
from lumos_jax.train import goodput, metrics

REFRESH_SECONDS, PLAY_SECONDS = 5.0, 0.7
POINTS = 500  # of a curve, at most
SCORES = r"score_.*|suite_.*|neighbour_.*"
QUIET_SECONDS = 120  # without a new line, a run is not called alive
CURVES = {
    "Loss": "loss|held_out_loss",
    "Held-out loss, and with the null and another condition": "held_out_.*loss",
    "Held-out margins": "held_out_.*margin",
    "PSNR of samples, dB": "score_psnr",
    "Other scores of samples": "score_(?!psnr).*|(random_)?neighbour_.*",
    "Suite": r"suite_.*(?<!_error)",
    "Images a second": "images_per_second",
    "Goodput, and shares of a step": "goodput|data_wait_fraction|device_wait_fraction|host_fraction",
}


class Follower:
    """The lines of a run's metrics.jsonl, of which only new ones are read."""

    def __init__(self, workdir: str):
        self.workdir = pathlib.Path(workdir)
        self.lines: list[Mapping[str, Any]] = []
        self._file, self._place, self._lock = 0, 0, threading.Lock()

    def read(self) -> list[Mapping[str, Any]]:
        """All lines so far; raises OSError if the run has none. A restart replaces the file,
        which is then read anew."""
        with self._lock, open(self.workdir / metrics.FILE, "rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._file or about.st_size < self._place:
                self.lines, self._file, self._place = [], about.st_ino, 0
            file.seek(self._place)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]  # the last line may be being written
            self._place += len(whole)
            self.lines += [line for line in map(_parse, whole.splitlines()) if line]
            return list(self.lines)

    def sheets(self) -> list[pathlib.Path]:
        """Of samples, by step."""
        found = {path: re.fullmatch(r"step_(\d+)", path.stem) for path in (self.workdir / "samples").glob("step_*.png")}
        return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))

    def evaluations(self) -> tuple[list[list[Any]], list[str]]:
        """What `lumos_jax.evaluate score` wrote below the run's directory: (rows as of `scores`, unreadable files)."""
        rows, damaged = [], []
        for path in sorted(_score_files(self.workdir)):
            name = path.relative_to(self.workdir)
            try:
                rows += _evaluated(json.loads(path.read_bytes()), str(name.parent))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):  # half-written, or of another program
                damaged.append(str(name))
        return rows, damaged

    def state(self) -> str:
        """A paragraph about step, speed and time left."""
        lines = [line for line in self.lines if "images_per_second" in line]
        total = _json(self.workdir / "config.json").get("train", {}).get("steps", "?")
        if not lines:
            return f"{self.workdir}: no step is logged yet, of {total}"
        last, silent = lines[-1], time.time() - (self.workdir / metrics.FILE).stat().st_mtime
        ended = last["step"] == total
        left = "" if ended or total == "?" else f", {(total - last['step']) * last['step_seconds'] / 60:.0f} min left"
        alive = "ended" if ended else f"silent for {silent / 60:.0f} min" if silent > QUIET_SECONDS else "training"
        text = (
            f"{self.workdir}: {alive}, step {last['step']} of {total}{left}, {last['images_per_second']:.1f} images/s"
        )
        lost = _json(self.workdir / goodput.FILE).get("lost", {})
        causes = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in lost.items() if seconds >= 1)
        return f"{text}, goodput {last.get('goodput', 0):.1%}; lost to {causes or 'nothing'}"


def _parse(line: bytes) -> Mapping[str, Any]:
    """Of a damaged line, nothing: the run remakes its metrics."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _json(path: pathlib.Path) -> Mapping[str, Any]:
    """Of a file that is missing or being replaced, nothing."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def curves(lines: Sequence[Mapping[str, Any]], pattern: str) -> pd.DataFrame:
    """Columns step, value and name of the metrics whose name matches, at most POINTS steps each."""
    rows = [
        (line["step"], value, name)
        for line in lines
        for name, value in line.items()
        if re.fullmatch(pattern, name) and isinstance(value, (int, float))
    ]
    frame = pd.DataFrame(rows, columns=["step", "value", "name"])
    every = -(-frame.groupby("name").size().max() // POINTS) if rows else 1
    return frame[frame.groupby("name").cumcount(ascending=False) % every == 0]  # the newest is kept


def scores(lines: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows of (score, newest value, interval, step)."""
    newest: dict[str, tuple[float, int]] = {}
    for line in lines:
        newest |= {name: (value, line["step"]) for name, value in line.items() if re.fullmatch(SCORES, name)}
    rows = []
    for name, (value, step) in newest.items():
        half = 1.96 * newest.get(f"{name}_error", (0.0, 0))[0]
        if not name.endswith("_error"):
            rows.append([name, f"{value:.4g}", f"{value - half:.4g} .. {value + half:.4g}" if half else "", step])
    return rows


def _score_files(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, folders, names in os.walk(workdir):
        folders[:] = [name for name in folders if name != DIRECTORY]  # checkpoints: many files, and no scores
        if scoring.FILE in names:
            yield pathlib.Path(folder, scoring.FILE)


def _evaluated(content: Mapping[str, Any], where: str) -> list[list[Any]]:
    """Rows of a scores.json in the folder `where`; raises one of several errors if it is none."""
    step, rows = content["samples"].get("step", ""), []
    for name, entry in content["scores"].items():
        unbiased = "" if entry["corrected"] is None else f" → {entry['corrected']:.4g}"
        interval = f"{entry['low']:.4g} .. {entry['high']:.4g}"
        rows.append([f"{where}: {name}", f"{entry['value']:.4g}{unbiased}", interval, step])
    return rows


def build(page: gr.Blocks, workdir: str) -> None:
    """The tab of a run that is watched. Raises ValueError if there is no such directory."""
    if not pathlib.Path(workdir).is_dir():
        raise ValueError(f"--watch={workdir} is no directory")
    follower = Follower(workdir)
    state = gr.Textbox(label="State", interactive=False)
    with gr.Row():
        with gr.Column():
            table = gr.Dataframe(headers=["score", "value", "95 % interval", "step"], label="Scores", interactive=False)
            sheet = gr.Image(show_label=False, interactive=False, format="png", buttons=[])
            place = gr.Slider(0, 1, value=1, step=1, label="Sample sheet", visible=False)
            playing = gr.Checkbox(False, label="Play")
        with gr.Column(scale=2):
            plots = [gr.LinePlot(x="step", y="value", color="name", title=title, height=240) for title in CURVES]
    shown, newest = [state, table, place, sheet, *plots], gr.State(True)

    def refresh(place: float, follow: bool) -> list[Any]:
        try:
            lines, found = follower.read(), follower.sheets()
            last = max(len(found) - 1, 0)
            index = last if follow else min(int(place or 0), last)
            slider = gr.Slider(maximum=max(last, 1), value=index, visible=last > 0, label=_title(found, index))
            rows, damaged = follower.evaluations()
            skipped = f"; damaged or half-written, skipped: {', '.join(damaged)}" if damaged else ""
            values = [follower.state() + skipped, scores(lines) + rows, slider, _picture(found, index)]
        except OSError as error:
            return [f"{workdir} cannot be read: {error.strerror or error}", *[gr.skip()] * (len(shown) - 1)]
        frames = [curves(lines, pattern) for pattern in CURVES.values()]
        return values + [gr.LinePlot(frame, visible=not frame.empty) for frame in frames]

    def scrub(place: float) -> list[Any]:
        found = follower.sheets()
        index = min(int(place or 0), max(len(found) - 1, 0))
        return [_picture(found, index), gr.Slider(label=_title(found, index)), index == len(found) - 1]

    def play(place: float) -> list[Any]:
        following = (int(place or 0) + 1) % max(len(follower.sheets()), 1)
        return [gr.Slider(value=following), *scrub(following)]

    hidden = {"show_progress": "hidden", "concurrency_limit": None, **PRIVATE}
    page.load(refresh, [place, newest], shown, **hidden)
    gr.Timer(REFRESH_SECONDS).tick(refresh, [place, newest], shown, **hidden)
    place.input(scrub, place, [sheet, place, newest], trigger_mode="always_last", **hidden)
    film = gr.Timer(PLAY_SECONDS, active=False)
    film.tick(play, place, [place, sheet, place, newest], **hidden)
    playing.change(lambda on: gr.Timer(active=on), playing, film, **hidden)


def _title(sheets: Sequence[pathlib.Path], index: int) -> str:
    return f"Sample sheet of {sheets[index].stem.replace('_', ' ')}" if sheets else "Sample sheet"


def _picture(sheets: Sequence[pathlib.Path], index: int) -> np.ndarray | None:
    if not sheets:
        return None
    with Image.open(sheets[index]) as image:
        return np.asarray(image)
