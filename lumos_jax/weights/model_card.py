"""The model card that goes with exported weights: what they are, how they were trained, how well they do."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from lumos_jax import config
from lumos_jax.config import io as config_io

_LOADING = {
    "official": '`torch.load("lumos_{step}.pth")["state_dict"]`, under the names of the official Lumos release.',
    "safetensors": '`safetensors.torch.load_file("lumos_{step}.safetensors")`, under the names of the official Lumos release.',
    "encoder": "`--config.encoder.weights=DIRECTORY`, with the encoder size and patch size below.",
    "diffusers": (
        "`transformer/`, under diffusers' names of a PixArt-like transformer. Each block has its own modulation "
        "(`norm1.linear`), for which diffusers ships no class."
    ),
}


def text(
    workdir: pathlib.Path, settings: config.Settings, meta: Mapping[str, Any], step: int, weights: str, layout: str
):
    """The card as Markdown.

    Args:
      workdir: the run's directory; its metrics.jsonl gives the latest numbers up to `step`, if there is one.
      settings: of the run.
      meta: of the checkpoint: fingerprints of data and frozen networks, or where imported weights came from.
      step: of the checkpoint.
      weights: "ema" or "params".
      layout: the export's format.
    """
    kind = {"ema": "exponential moving average of the parameters", "params": "raw parameters"}[weights]
    lines = [
        "---",
        "library_name: lumos_jax",
        "tags: [diffusion, text-free]",
        "---",
        "",
        "# An image encoder" if layout == "encoder" else "# A visual generative prior",
        "",
    ]
    lines += [f"Trained with lumos_jax for {step:,} steps; {kind}.", "", _LOADING[layout].format(step=step), ""]
    if meta.get("imported"):
        lines += [f"Imported from `{meta['imported']}`.", ""]
    lines += ["## Data and frozen networks", "", "| what | fingerprint |", "| --- | --- |"]
    lines += [f"| {name} | `{value}` |" for name, value in meta["fingerprints"].items()]
    measured = _metrics(workdir / "metrics.jsonl", step)
    if measured:
        lines += ["", "## Metrics", "", "| metric | value | step |", "| --- | --- | --- |"]
        lines += [f"| {name} | {value:.6g} | {at} |" for name, (value, at) in sorted(measured.items())]
    settings_text = json.dumps(config_io.to_dict(settings), indent=2)
    lines += ["", "## Settings", "", "```json", settings_text, "```", ""]
    return "\n".join(lines)


# Metrics of the machine, which say nothing about the weights.
_OF_THE_MACHINE = ("images_per_second", "step_seconds", "data_wait_fraction", "device_wait_fraction", "host_fraction")


def _metrics(path: pathlib.Path, step: int) -> dict[str, tuple[float, int]]:
    """The last value of every scalar logged up to `step`, with the step it is from."""
    if not path.exists():
        return {}
    latest = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        logged = json.loads(line)
        if logged["step"] <= step:
            numbers = {
                name: value for name, value in logged.items() if isinstance(value, int | float) and name != "step"
            }
            latest |= {name: (value, logged["step"]) for name, value in numbers.items()}
    return {
        name: value
        for name, value in latest.items()
        if name not in ("step", *_OF_THE_MACHINE) and not name.startswith("goodput")
    }
