"""Samples from features of images: variations of each, and the path between two."""

from __future__ import annotations

import numpy as np

from lumos_jax.pages.controls import Action, Images, Panel, Wanted, number, slider
from lumos_jax.pages.runs import Run
from lumos_jax.tasks.sampling import Sampled

MAX_PATH = 32


def panel(run: Run) -> Panel:
    """Of tasks whose sampling is a FeatureSampling."""
    images = Images(run, most=4)
    length = slider(2, MAX_PATH, value=8, step=1, label="Samples on a path between the last two")

    def variations(chosen: list[str], _: float, num: int) -> Wanted:
        return Wanted([*images.flags(chosen), f"--num={num}"], len(chosen) * num)

    def path(chosen: list[str], length: float, _: int) -> Wanted:
        if len(chosen) < 2:
            raise ValueError("a path needs two images: choose another one")
        steps = number(length, "Samples on the path", 2, MAX_PATH, whole=True)
        return Wanted([*images.flags(chosen[-2:]), f"--interpolate={steps}"], steps)

    actions = Action("Variations", variations), Action("Path", path)
    return Panel([images.chosen, length], actions, frames, images.loaded, images.on_load)


def frames(sampled: Sampled) -> np.ndarray | None:
    """The path, ends included."""
    if len(sampled.samples) == len(sampled.sources):
        return None
    return np.concatenate([sampled.sources[:1], sampled.samples[0], sampled.sources[1:]])
