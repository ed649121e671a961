"""Class-conditional prior: an image of a class, as DiT is trained on ImageNet (Peebles & Xie 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, encoders
from lumos_jax.models import Condition
from lumos_jax.tasks import adaln, requests


@dataclasses.dataclass(frozen=True)
class ClassConditional(adaln.AdaLn):
    """The task; see tasks.base for the interface. Batches have `label` int32 (B,)."""

    name: str = "class_conditional"

    def describe(self) -> dict[str, str]:
        return {"latents": " x ".join(map(str, self.latent_shape)), "condition": f"{self.dit.vector_dim} classes"}

    def condition(self, frozen: Any, batch: Mapping[str, jax.Array]) -> Condition:
        return Condition(vector=batch["label"][:, None].astype(jnp.float32))  # whole numbers are exact up to 2^24

    def encode(self, frozen: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return super().encode(frozen, batch) | {"label": batch["label"]}

    def request(self, asked: Mapping[str, Any], load: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        requests.check(asked, ("classes",))
        label, count = np.array(asked["classes"], np.int32), self.dit.vector_dim
        if label.min() < 0 or label.max() >= count:
            raise ValueError(f"--classes {' '.join(map(str, label))}: this run's classes are 0 to {count - 1}")
        return {"label": label}


def make_class_conditional(
    settings: config.Settings, place: encoders.Placement | None = None
) -> tuple[ClassConditional, dict[str, Any]]:
    """The task and its frozen parameters; see tasks.make_task.

    Raises:
      ValueError: records without labels, or as `adaln.make`.
    """
    if settings.data.sample_type != "labeled":
        raise ValueError(
            f"config.data.sample_type={settings.data.sample_type} has no classes: set it to labeled, and config.data.classes"
        )
    return adaln.make(ClassConditional, settings, place, vector_dim=settings.data.classes, vector_kind="class")
