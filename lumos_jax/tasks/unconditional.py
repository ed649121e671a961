"""Unconditional prior: images, and nothing about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lumos_jax import config, encoders
from lumos_jax.models import Condition
from lumos_jax.tasks import adaln, pictures, requests

_COLUMNS = 8  # of a sheet


@dataclasses.dataclass(frozen=True)
class Unconditional(adaln.AdaLn):
    """The task; see tasks.base for the interface."""

    name: str = "unconditional"

    def describe(self) -> dict[str, str]:
        return {"latents": " x ".join(map(str, self.latent_shape)), "condition": "none"}

    def condition(self, frozen: Any, batch: Mapping[str, jax.Array]) -> Condition:
        return Condition()

    def guidance(self, scale: float) -> float:
        if scale != 1:
            raise ValueError(f"guidance={scale}: there is no condition to guide towards; set it to 1")
        return scale

    def request(self, asked: Mapping[str, Any], load: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        requests.check(asked, ())
        return {"row": np.zeros(1, np.int32)}

    def sheet(self, host: Mapping[str, np.ndarray], sources: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """The samples alone, row after row: they have nothing to do with the batch's pictures."""
        samples = drawn.reshape(-1, *drawn.shape[2:])
        columns = min(len(samples), _COLUMNS)
        white = np.full((-len(samples) % columns, *samples.shape[1:]), 255, np.uint8)
        return pictures.sheet(np.concatenate([samples, white]).reshape(-1, columns, *samples.shape[1:]))


def make_unconditional(
    settings: config.Settings, place: encoders.Placement | None = None
) -> tuple[Unconditional, dict[str, Any]]:
    """The task and its frozen parameters; see tasks.make_task.

    Raises:
      ValueError: settings that only a condition gives a meaning, or as `adaln.make`.
    """
    for field, value, needed in (
        ("task.condition_dropout", settings.task.condition_dropout, 0),
        ("eval.guidance", settings.eval.guidance, 1),
    ):
        if value != needed:
            raise ValueError(
                f"config.{field}={value}: there is no condition to drop or guide towards; set it to {needed}"
            )
    return adaln.make(Unconditional, settings, place)
