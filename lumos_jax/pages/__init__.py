"""The pages of `lumos_jax.demo`, in Gradio: a tab for each run, tabs that compare two, and one that watches a run train."""

from lumos_jax.pages.app import build
from lumos_jax.pages.runs import Run, close

__all__ = ["Run", "build", "close"]
