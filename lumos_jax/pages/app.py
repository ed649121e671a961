"""All tabs, and the thread that loads the runs."""

from __future__ import annotations

import functools
import itertools
import pathlib
import threading
from collections.abc import Sequence

import gradio as gr

from lumos_jax.pages import tab, watch
from lumos_jax.pages.controls import Stops
from lumos_jax.pages.runs import Run

KEPT = 3600  # seconds that files of a session are kept


def build(runs: Sequence[Run], watched: Sequence[str] = ()) -> gr.Blocks:
    """The page. Runs are loaded in a thread that this starts."""
    stops, loads = Stops(), []
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = run.workdir
    with gr.Blocks(title="lumos_jax", fill_width=True, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        for run in runs:
            with gr.Tab(run.name):
                loads.append(functools.partial(run.load, tab.build(page, run, stops)))
        for _, group in itertools.groupby(sorted(runs, key=lambda run: run.kind.__name__), lambda run: run.kind):
            alike = list(group)
            if len(alike) > 1:
                with gr.Tab(f"Compare {', '.join(run.name for run in alike)}"):
                    tab.build_pair(page, alike, stops)
        for workdir in watched:
            with gr.Tab(f"Watch {pathlib.Path(workdir).resolve().name}"):
                watch.build(page, workdir)

        def leave(request: gr.Request) -> None:
            stops.set(request.session_hash)

        page.unload(leave)
    threading.Thread(target=lambda: [load() for load in loads], daemon=True).start()
    return page
