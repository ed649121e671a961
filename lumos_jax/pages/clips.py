"""Clips that begin with an image."""

from __future__ import annotations

import gradio as gr
import numpy as np

from lumos_jax.pages.controls import Action, Images, Panel, Wanted, number, slider
from lumos_jax.pages.runs import Run
from lumos_jax.tasks.i2v import FPS, MOTION, MOTION_IDS
from lumos_jax.tasks.sampling import Sampled

MAX_FRAMES = 64


def panel(run: Run) -> Panel:
    """Of tasks whose sampling is a ClipSampling."""
    images = Images(run, most=2)
    with gr.Row():
        count = gr.Number(run.settings.data.clips.frames, label="Frames", min_width=90)
        fps = gr.Number(FPS, label="Frames a second", min_width=90)
        motion = slider(0, MOTION_IDS - 1, value=MOTION, step=1, label="Motion")

    def clip(chosen: list[str], count: float, fps: float, motion: float, num: int) -> Wanted:
        own = f"--frames={number(count, 'Frames', 1, MAX_FRAMES, whole=True)}"
        own = [own, f"--fps={number(fps, 'Frames a second', 0.1, 50):g}"]
        own += [f"--motion={number(motion, 'Motion', 0, MOTION_IDS - 1, whole=True)}"]
        return Wanted([*images.flags(chosen), *own, f"--num={num}"], len(chosen) * num, ".gif")

    inputs = [images.chosen, count, fps, motion]
    return Panel(inputs, [Action("Clip", clip)], frames, images.loaded, images.on_load)


def frames(sampled: Sampled) -> np.ndarray:
    """Those of the first clip."""
    return sampled.samples[0, 0]
