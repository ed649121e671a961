"""A tab with the controls and the output of one run, or of two that are compared."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from lumos_jax.pages import clips, flags, orbit, prompts, variations
from lumos_jax.pages.controls import PRIVATE, QUEUE, Action, Common, Output, Panel, Stops, command_line, sampling
from lumos_jax.pages.runs import Run
from lumos_jax.tasks.i2v import ClipSampling
from lumos_jax.tasks.nvs import OrbitSampling
from lumos_jax.tasks.sampling import FeatureSampling
from lumos_jax.tasks.t2i import CaptionSampling

PANELS = {
    FeatureSampling: variations.panel,
    CaptionSampling: prompts.panel,
    OrbitSampling: orbit.panel,
    ClipSampling: clips.panel,
}
DRAG_STEPS = 3
POLL_SECONDS = 0.3
COMMON = ("num", "guidance", "steps", "sampler", "seed")  # inputs of Common


def make_panel(run: Run) -> Panel:
    """The controls of the run's kind of sampling, made inside the current tab."""
    make = next((make for kind, make in PANELS.items() if issubclass(run.kind, kind)), flags.panel)
    return make(run)


def _first(run: Run, panel: Panel, common: Common) -> tuple[list[str], str]:
    """What is sampled while the run is loaded, which compiles its program: the main action on the first values."""
    found = dict(zip(panel.loaded, panel.on_load(run), strict=True))
    values = [found.get(component, component.value) for component in panel.inputs]
    values = [value.value if isinstance(value, gr.blocks.Block) else value for value in values]
    return command_line(panel.actions[0], values, [component.value for component in common.inputs])


def build(page: gr.Blocks, run: Run, stops: Stops) -> Callable[[], tuple[list[str], str]]:
    """The tab of one run. Returns what `Run.load` takes."""
    with gr.Row():
        with gr.Column(scale=2):
            panel = make_panel(run)
            common = Common(run, num=1 if panel.drag else 2)
            buttons, stop = _buttons(panel)
        with gr.Column(scale=3):
            output = Output(panel)
    inputs = [*panel.inputs, *common.inputs]

    def sampler(action: Action, **changed: Any) -> Callable[..., Iterator[dict]]:
        def sample(request: gr.Request, *values: Any) -> Iterator[dict]:
            own, others = values[: len(panel.inputs)], list(values[len(panel.inputs) :])
            others = [changed.get(name, value) for name, value in zip(COMMON, others, strict=True)]
            yield from sampling(run, output, action, own, others, stops.new(request.session_hash, run))

        return sample

    for button, action in zip(buttons, panel.actions, strict=True):
        button.click(sampler(action), inputs, output.all, show_progress="minimal", show_progress_on=output.picture,
                     **QUEUE, **PRIVATE)  # fmt: skip
    _drag(panel, output, inputs, sampler)
    _stop_by(stop, stops, run)
    _fill(page, run, panel, [output])
    return functools.partial(_first, run, panel, common)


def _drag(panel: Panel, output: Output, inputs: Sequence[Any], sampler: Callable[..., Callable]) -> None:
    """Sliders that sample the main action: in few steps while they move, in all when they are released."""
    released = gr.State(None)
    quick, full = sampler(panel.actions[0], steps=DRAG_STEPS, num=1), sampler(panel.actions[0], num=1)
    where = slice(0, len(panel.inputs))

    def move(before: Any, request: gr.Request, *values: Any) -> Iterator[dict]:
        # The browser may send the last move after the release, whose samples are the better ones.
        if before == values[where]:
            yield output.say(gr.skip())
        else:
            yield from quick(request, *values)

    def release(request: gr.Request, *values: Any) -> Iterator[dict]:
        for update in full(request, *values):
            yield update | {released: values[where]}

    how = {"show_progress": "hidden", **QUEUE, **PRIVATE}
    for slider in panel.drag:
        slider.input(move, [released, *inputs], output.all, trigger_mode="always_last", **how)
        slider.release(release, inputs, [*output.all, released], trigger_mode="always_last", **how)


def build_pair(page: gr.Blocks, runs: Sequence[Run], stops: Stops) -> None:
    """Two runs side by side, on the same noise: all runs have the same kind of sampling."""
    names = {run.name: run for run in runs}
    with gr.Row():
        chosen = [gr.Dropdown(list(names), value=run.name, label=text)
                  for run, text in zip(runs, ("Left", "Right"), strict=False)]  # fmt: skip
    panel = make_panel(runs[0])
    common = Common(runs[0], num=2)
    buttons, stop = _buttons(panel)
    with gr.Row():
        outputs = []
        for side in ("Left", "Right"):
            with gr.Column():
                outputs.append(Output(panel, side))
    inputs = [*chosen, *panel.inputs, *common.inputs]

    def sampler(action: Action) -> Callable[..., Iterator[dict]]:
        def sample(request: gr.Request, *values: Any) -> Iterator[dict]:
            own, others = values[2 : 2 + len(panel.inputs)], values[2 + len(panel.inputs) :]
            stop = stops.new(request.session_hash, page)
            for name, output in zip(values[:2], outputs, strict=True):
                if not stop.is_set():
                    yield from sampling(names[name], output, action, own, others, stop)

        return sample

    for button, action in zip(buttons, panel.actions, strict=True):
        everything = [*outputs[0].all, *outputs[1].all]
        button.click(sampler(action), inputs, everything, show_progress="minimal", **QUEUE, **PRIVATE)
    _stop_by(stop, stops, page)
    _fill(page, runs[0], panel, [])


def _buttons(panel: Panel) -> tuple[list[gr.Button], gr.Button]:
    with gr.Row():
        buttons = [
            gr.Button(action.text, variant="secondary" if number else "primary", min_width=120)
            for number, action in enumerate(panel.actions)
        ]
        return buttons, gr.Button("Stop", variant="stop", min_width=80)


def _stop_by(button: gr.Button, stops: Stops, key: Any) -> None:
    def stop(request: gr.Request) -> None:
        stops.set(request.session_hash, key)

    button.click(stop, None, None, queue=False, **PRIVATE)


def _fill(page: gr.Blocks, run: Run, panel: Panel, outputs: Sequence[Output]) -> None:
    """When the page is opened: how far loading is, then the held-out records and the first samples."""

    def load() -> Iterator[dict]:
        while not run.ready.is_set():
            if outputs:  # Gradio takes an empty dict for one value
                yield {output.status: run.status for output in outputs}
            time.sleep(POLL_SECONDS)
        values = dict(zip(panel.loaded, panel.on_load(run), strict=True)) if run.sampler else {}
        for output in outputs:
            values |= output.show(run.first[1], run.first[0]) if run.first else output.say(run.status)
        if values:
            yield values

    components = [*panel.loaded, *(component for output in outputs for component in output.all)]
    if components:
        page.load(load, None, components, show_progress="hidden", concurrency_limit=None, **PRIVATE)
