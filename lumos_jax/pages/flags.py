"""Samples of any other task: a text field for each of its flags."""

from __future__ import annotations

import argparse
import shlex

import gradio as gr

from lumos_jax.pages.controls import Action, Panel, Wanted
from lumos_jax.pages.runs import Run


def panel(run: Run) -> Panel:
    """Of any Sampling that needs no files."""
    group = argparse.ArgumentParser(add_help=False).add_argument_group()
    run.kind.add_flags(group)
    flags = [(action.option_strings[0], action) for action in group._group_actions]
    fields = [gr.Textbox("0" if action.required else "", label=flag, info=action.help) for flag, action in flags]

    def samples(*values: str | int) -> Wanted:
        *texts, num = values
        words, rows = [], 1
        for (flag, _), text in zip(flags, texts, strict=True):
            given = shlex.split(text or "")
            if any(word.startswith("-") and not word[1:].isdigit() for word in given):
                raise ValueError(f"{flag}: values must not begin with a hyphen")
            rows = max(rows, len(given))
            words += [flag, *given] if given else []
        return Wanted([*words, f"--num={num}"], rows * num, run.kind.endings[0])

    return Panel(fields, [Action("Sample", samples)])
