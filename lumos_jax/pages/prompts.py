"""Samples from texts."""

from __future__ import annotations

import gradio as gr

from lumos_jax.pages.controls import Action, Panel, Wanted
from lumos_jax.pages.runs import Run

MAX_PROMPTS, MAX_CHARACTERS = 8, 2000


def panel(run: Run) -> Panel:
    """Of tasks whose sampling is a CaptionSampling."""
    texts = gr.Textbox("", label=f"Prompts, one a line, up to {MAX_PROMPTS}", lines=3)
    size = gr.Dropdown([], label="Size", visible=False)

    def samples(text: str, size: str | None, num: int) -> Wanted:
        prompts = read_prompts(text)
        sizes = [f"--size={size}"] if size else []
        return Wanted(["--prompts", *prompts, *sizes, f"--num={num}"], len(prompts) * num)

    def on_load(run: Run) -> list:
        buckets = run.sampler.sampling.task.buckets if run.sampler else ()
        sizes = [f"{bucket.height}x{bucket.width}" for bucket in buckets]
        return [run.caption, gr.Dropdown(sizes, value=None, visible=bool(sizes))]

    return Panel([texts, size], [Action("Sample", samples)], loaded=[texts, size], on_load=on_load)


def read_prompts(text: str | None) -> list[str]:
    """The lines. Raises ValueError: none, too many or too long, or one that looks like a flag."""
    prompts = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if not prompts:
        raise ValueError("write a prompt first")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts: at most {MAX_PROMPTS} at a time")
    longest = max(map(len, prompts))
    if longest > MAX_CHARACTERS:
        raise ValueError(f"a prompt of {longest} characters: at most {MAX_CHARACTERS}")
    for prompt in prompts:
        if prompt.startswith("-"):
            raise ValueError(f"a prompt must not begin with a hyphen: {prompt[:40]}")
    return prompts
