"""Novel views of an image: a camera to drag, and an orbit as an animation."""

from __future__ import annotations

import gradio as gr
import numpy as np

from lumos_jax.pages.controls import Action, Images, Panel, Wanted, number, slider
from lumos_jax.pages.runs import Run
from lumos_jax.tasks.sampling import Sampled

VIEWS = 24


def panel(run: Run) -> Panel:
    """Of tasks whose sampling is an OrbitSampling."""
    images = Images(run, most=1)
    azimuth = slider(-180, 180, value=30, step=1, label="Azimuth, degrees", elem_id="azimuth")
    elevation = slider(-90, 90, value=0, step=1, label="Elevation, degrees", elem_id="elevation")
    with gr.Row():
        views = gr.Number(12, label="Views of the orbit", min_width=90)
        reach = gr.Number(run.settings.data.scenes.max_view_angle, label="Orbit to each side, degrees", min_width=90)

    def camera(azimuths: list[float], elevation: float) -> list[str]:
        return [f"--elevation={elevation:g}", "--azimuths", *(f"{azimuth:g}" for azimuth in azimuths)]

    def view(chosen: list[str], azimuth: float, elevation: float, _: float, __: float, num: int) -> Wanted:
        turn, rise = number(azimuth, "Azimuth", -360, 360), number(elevation, "Elevation", -90, 90)
        return Wanted([*images.flags(chosen), *camera([turn], rise), f"--num={num}"], num)

    def orbit(chosen: list[str], _: float, elevation: float, views: float, reach: float, num: int) -> Wanted:
        count, rise = number(views, "Views", 2, VIEWS, whole=True), number(elevation, "Elevation", -90, 90)
        reach = number(reach, "Orbit to each side", 1, 180)
        azimuths = np.linspace(-reach, reach, count, endpoint=reach < 180).round(2).tolist()
        return Wanted([*images.flags(chosen), *camera(azimuths, rise), f"--num={num}"], count * num)

    return Panel(
        [images.chosen, azimuth, elevation, views, reach],
        [Action("View", view), Action("Orbit", orbit)],
        frames, images.loaded, images.on_load, drag=[azimuth, elevation],
    )  # fmt: skip


def frames(sampled: Sampled) -> np.ndarray | None:
    """The views of an orbit; None of one view."""
    views = sampled.samples[:, 0]
    return views if len(views) > 1 else None
