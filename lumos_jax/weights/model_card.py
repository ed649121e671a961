"""The model card that goes with exported weights: what they are, how they were trained, how well they do."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_LOADING = {
    "official": '`torch.load("lumos_{step}.pth")["state_dict"]`, under the names of the official Lumos release.',
    "safetensors": '`safetensors.torch.load_file("lumos_{step}.safetensors")`, under the names of the official Lumos release.',
    "encoder": "`--config.encoder.weights=DIRECTORY`, with the encoder size and patch size below.",
    "diffusers": (
        "`transformer/`, under diffusers' names of a PixArt-like transformer. Each block has its own modulation "
        "(`norm1.linear`), for which diffusers ships no class."
    ),
}
_WEIGHTS = {"ema": "exponential moving average of the parameters", "params": "raw parameters"}
# Not in the card: metrics of the machine.
_LEFT_OUT = ("step", "images_per_second", "step_seconds", "data_wait_fraction", "device_wait_fraction", "host_fraction")


def make(
    workdir: pathlib.Path, settings: Mapping[str, Any], meta: Mapping[str, Any], step: int, weights: str, layout: str
) -> ModelCard:
    """Makes the card of a run's weights.

    Args:
      workdir: the run's directory; its metrics.jsonl gives the latest numbers up to `step`, if there is one.
      settings: of the run, as its config.json has them.
      meta: of the checkpoint: fingerprints of data and frozen networks, or where imported weights came from.
      step: of the checkpoint.
      weights: "ema" or "params".
      layout: the export's format.
    """
    title = "An image encoder" if layout == "encoder" else "A visual generative prior"
    data = ModelCardData(library_name="lumos_jax", tags=["diffusion", "text-free"])
    parts = [f"---\n{data.to_yaml()}\n---", f"# {title}"]
    parts += [f"Trained with lumos_jax for {step:,} steps; {_WEIGHTS[weights]}.", _LOADING[layout].format(step=step)]
    if meta.get("imported"):
        parts.append(f"Imported from `{meta['imported']}`.")
    fingerprints = ((name, f"`{value}`") for name, value in meta["fingerprints"].items())
    parts += ["## Data and frozen networks", _table(("what", "fingerprint"), fingerprints)]
    if metrics := _metrics(workdir / "metrics.jsonl", step):
        rows = ((name, f"{value:.6g}", at) for name, (value, at) in sorted(metrics.items()))
        parts += ["## Metrics", _table(("metric", "value", "step"), rows)]
    parts += ["## Settings", f"```json\n{json.dumps(settings, indent=2)}\n```"]
    return ModelCard("\n\n".join(parts) + "\n")


def _table(header: tuple[str, ...], rows: Any) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ("---",) * len(header), *rows))


def _metrics(path: pathlib.Path, step: int) -> dict[str, tuple[float, int]]:
    """The last value of every scalar logged up to `step`, with the step it is from."""
    latest = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        logged = json.loads(line)
        if logged["step"] <= step:
            latest |= {n: (value, logged["step"]) for n, value in logged.items() if isinstance(value, int | float)}
    return {name: found for name, found in latest.items() if name not in _LEFT_OUT and not name.startswith("goodput")}
