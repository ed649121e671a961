"""Parts that every tab has: fields, chosen images, and what a sampling shows."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np

from lumos_jax import data
from lumos_jax.data.decode import size_of
from lumos_jax.diffusion import SAMPLERS
from lumos_jax.pages.runs import MAX_PIXELS, PROBLEMS, THUMBNAILS, Run, Stopped, Update
from lumos_jax.tasks import media
from lumos_jax.tasks.sampling import Sampled
from lumos_jax.train.sampler import HELD_OUT

MAX_SAMPLES, MAX_STEPS, MAX_SEED = 16, 250, 2**31 - 1
BATCH = 4  # samples at a time; a single one runs alone
QUEUE = {"concurrency_id": "device", "concurrency_limit": 1}  # everybody's sampling, in order
STOPPED = "stopped"  # a status
PRIVATE = {"api_visibility": "private"}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Flags of a task for `lumos_jax.sample`, and the samples that they ask for."""

    flags: Sequence[str]
    samples: int
    ending: str = ".png"


@dataclasses.dataclass(frozen=True)
class Action:
    """A button: its text, and (values of the panel's inputs, samples per condition) -> Wanted; ValueError for a mistake."""

    text: str
    flags: Callable[..., Wanted]


@dataclasses.dataclass(frozen=True)
class Panel:
    """The controls of one kind of sampling.

    Attributes:
      inputs: components that are passed to actions.
      actions: buttons, the first of which is the main one.
      frames: what a slider goes through, uint8 (F, H, W, 3); None for no slider.
      on_load: (run) -> values of `loaded`, once the run is loaded.
      drag: sliders that sample at once: in few steps while they move, in all when they are released.
    """

    inputs: Sequence[Any]
    actions: Sequence[Action]
    frames: Callable[[Sampled], np.ndarray | None] = lambda sampled: None
    loaded: Sequence[Any] = ()
    on_load: Callable[[Run], Sequence[Any]] = lambda run: ()
    drag: Sequence[Any] = ()


def number(value: Any, what: str, low: float, high: float, whole: bool = False) -> float | int:
    """The value of a field. Raises ValueError unless it is a number within the bounds."""
    kind = "a whole number" if whole else "a number"
    good = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
    if not good or (whole and value != int(value)):
        raise ValueError(f"{what} must be {kind} from {low:g} to {high:g}, not {value}")
    return int(value) if whole else float(value)


def slider(*args: Any, **kwargs: Any) -> gr.Slider:
    """A gr.Slider whose value may be anything: `number` checks it, with a message for users."""
    made = gr.Slider(*args, **kwargs)
    made.preprocess = lambda payload: payload
    return made


class Common:
    """Number of samples, guidance, steps, sampler and seed."""

    def __init__(self, run: Run, num: int):
        used, flow = run.settings.eval, run.settings.diffusion.schedule == "flow"
        names = [name for name in SAMPLERS if (name in ("euler", "heun")) == flow]
        with gr.Row():
            self.num = gr.Number(num, label="Samples", min_width=50)
            self.guidance = gr.Number(used.guidance, label="Guidance", min_width=50)
            self.steps = gr.Number(used.steps, label="Steps", min_width=50)
            self.sampler = gr.Dropdown(names, value=used.sampler, label="Sampler", min_width=80, scale=2)
            self.seed = gr.Number(0, label="Seed", min_width=50)
        self.inputs = [self.num, self.guidance, self.steps, self.sampler, self.seed]

    @staticmethod
    def flags(guidance: Any, steps: Any, name: str, seed: Any) -> list[str]:
        """Of `lumos_jax.sample`. Raises ValueError for values out of range."""
        guidance = number(guidance, "Guidance", 0, 100)
        steps, seed = number(steps, "Steps", 1, MAX_STEPS, whole=True), number(seed, "Seed", 0, MAX_SEED, whole=True)
        return [f"--guidance={guidance:g}", f"--steps={steps}", f"--sampler={name}", f"--seed={seed}"]


class Stops:
    """The events that end samplings, by session and tab."""

    def __init__(self):
        self._events: dict[tuple[str, Any], threading.Event] = {}

    def new(self, session: str, key: Any) -> threading.Event:
        """Of a sampling that begins."""
        event = self._events[session, key] = threading.Event()
        return event

    def set(self, session: str, key: Any = None) -> None:
        """Ends the sampling of this tab, or all of a session."""
        for own in [own for own in self._events if own[0] == session and key in (None, own[1])]:
            self._events.pop(own).set()


class Output:
    """A run's picture, its frames, files, status and command line."""

    def __init__(self, panel: Panel, label: str = ""):
        self.panel = panel
        plain = {"interactive": False, "format": "png", "show_label": False, "buttons": []}
        if label:
            gr.Markdown(f"### {label}")
        self.picture = gr.Image(elem_classes="picture", **plain)
        self.frames = gr.State(None)
        self.frame = slider(0, 1, value=0, step=1, label="Frame", visible=False)
        self.view = gr.Image(visible=False, height=280, **plain)
        self.status = gr.Textbox(label="Status", interactive=False, max_lines=4)
        self.command = gr.Textbox(
            label="The same on the command line",
            interactive=False,
            lines=2,
            max_lines=8,
            buttons=["copy"],
            elem_classes="command",
        )
        self.files = gr.File(label="Files", interactive=False, visible=False, file_count="multiple")
        self.all = [self.picture, self.frames, self.frame, self.view, self.status, self.command, self.files]
        how = {"queue": False, "show_progress": "hidden", **PRIVATE}
        self.frame.input(_frame, [self.frames, self.frame], self.view, **how)

    def _values(self, **changed: Any) -> dict[Any, Any]:
        return {getattr(self, name): value for name, value in changed.items()}

    def say(self, status: str) -> dict[Any, Any]:
        """Only the status changes."""
        return self._values(status=status)

    def show(self, update: Update, command: str = "") -> dict[Any, Any]:
        """The components' new values."""
        values = self._values(status=update.status) | (self._values(command=command) if command else {})
        if update.preview is not None:
            first = update.preview if update.preview.ndim == 4 else update.preview[:, -1]  # of clips the last frame
            values[self.picture] = media.image_grid(first[None])
        if update.sampled is None:
            return values
        frames = self.panel.frames(update.sampled)
        some = frames is not None
        large = [media.image_grid(frame[None, None], gap=0, min_side=256) for frame in frames] if some else None
        first = len(large) // 2 if some else 0
        return values | self._values(
            picture=update.files[0],
            frames=large,
            frame=gr.Slider(visible=some, maximum=len(large) - 1 if some else 1, value=first),
            view=gr.Image(visible=some, value=large[first] if some else None),
            files=gr.File(list(update.files), visible=True),
        )


def _frame(frames: Sequence[np.ndarray] | None, place: Any) -> np.ndarray | None:
    """The frame at a slider's place, which may be empty."""
    return frames[min(max(int(place or 0), 0), len(frames) - 1)] if frames else None


def command_line(action: Action, values: Sequence[Any], common: Sequence[Any]) -> tuple[list[str], str]:
    """Arguments of `lumos_jax.sample` without --workdir and --out, and the ending of --out. Raises ValueError for a mistake."""
    num, *others = common
    wanted = action.flags(*values, number(num, "Samples", 1, MAX_SAMPLES, whole=True))
    batch = 1 if wanted.samples == 1 else BATCH
    return [*wanted.flags, *Common.flags(*others), f"--batch={batch}"], wanted.ending


def sampling(
    run: Run, output: Output, action: Action, values: Sequence[Any], common: Sequence[Any], stop: threading.Event
) -> Iterator[dict[Any, Any]]:
    """Samples as the controls say, and yields the new values of `output`; a mistake of the user is its status."""
    try:
        arguments, ending = command_line(action, values, common)
        shown = [_short(word) for word in arguments]
        command = run.command([*shown, f"--out=samples{ending}"]) if run.sampler else ""
        with tempfile.TemporaryDirectory() as folder:
            for update in run.stream([*arguments, f"--out={folder}/samples{ending}"], stop):
                yield output.show(update, command)
    except Stopped:
        yield output.say(STOPPED)
    except PROBLEMS as error:
        yield output.say(f"error: {_without_folders(str(error))}")


def _temporary(word: str) -> bool:
    return word.startswith((os.environ["GRADIO_TEMP_DIR"] + "/", tempfile.gettempdir() + "/"))


def _short(word: str) -> str:
    """The name that an uploaded file has for its user."""
    return pathlib.Path(word).name if _temporary(word) else word


def _without_folders(text: str) -> str:
    return " ".join(_short(word) for word in text.split(" "))


class Images:
    """Images to condition on: uploads, and held-out records of the run.

    Attributes:
      chosen: paths of files, and held-out:N.
      components: to be filled once the run is loaded, see `on_load`.
    """

    def __init__(self, run: Run, most: int):
        self.run, self.most = run, most
        self.chosen = gr.State([])
        gallery = {
            "interactive": False,
            "allow_preview": False,
            "object_fit": "contain",
            "buttons": [],
            "show_label": False,
        }
        with gr.Row():
            text = "Drop an image" if most == 1 else f"Drop up to {most} images"
            self.upload = gr.File(label=text, file_count="multiple", height=150, min_width=160)
            self.shown = gr.Gallery(columns=min(most, 2), height=150, min_width=160, elem_classes="chosen", **gallery)
        gr.Markdown("or choose held-out records:")
        self.held_out = gr.Gallery(columns=THUMBNAILS, height=90, elem_classes="held-out", **gallery)
        self.note = gr.Textbox(label="Problem", interactive=False, visible=False)
        self.loaded = [self.held_out, self.chosen, self.shown]
        changed = [self.chosen, self.shown, self.note]
        self.upload.upload(self._add_files, [self.upload, self.chosen], [self.upload, *changed], **PRIVATE)
        self.held_out.select(self._add_held_out, self.chosen, changed, **PRIVATE)

    def on_load(self, run: Run) -> list[Any]:
        """Values of `loaded`."""
        thumbnails = [media.image_grid(image[None, None], gap=0) for image in run.thumbnails]
        chosen = [f"{HELD_OUT}0"] if thumbnails else []
        return [thumbnails, chosen, self._show(chosen)]

    def _show(self, chosen: Sequence[str]) -> list[tuple[np.ndarray, str]]:
        return [(media.image_grid(self._load(name)[None, None], gap=0), _short(name)) for name in chosen]

    def _load(self, name: str) -> np.ndarray:
        if name.startswith(HELD_OUT):
            return self.run.thumbnails[int(name.removeprefix(HELD_OUT))]
        with open(name, "rb") as file:
            height, width = size_of(file)
        if height * width > MAX_PIXELS:
            raise ValueError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS >> 20} million are read")
        return data.load_image(name, self.run.settings.data.image_size)

    def _add_files(self, files: Sequence[str] | None, chosen: Sequence[str]) -> list[Any]:
        """The field is emptied, so that it takes the next files."""
        good, problems = [], []
        for name in files or []:
            try:
                self._load(name)
                good.append(name)
            except PROBLEMS as error:
                problems.append(_without_folders(str(error)))
        # What is uploaded first replaces the example.
        kept = [] if all(name.startswith(HELD_OUT) for name in chosen) and good else list(chosen)
        return [None, *self._choose([*kept, *good], "; ".join(problems))]

    def _add_held_out(self, chosen: Sequence[str], event: gr.SelectData) -> list[Any]:
        return self._choose([*chosen, f"{HELD_OUT}{int(event.index)}"])

    def _choose(self, names: Sequence[str], problem: str = "") -> list[Any]:
        names = list(dict.fromkeys(names))[-self.most :]
        return [names, self._show(names), gr.Textbox(problem, visible=bool(problem))]

    @staticmethod
    def flags(chosen: Sequence[str]) -> list[str]:
        """Raises ValueError if there is no image."""
        if not chosen:
            raise ValueError("choose an image first")
        return ["--images", *chosen]
