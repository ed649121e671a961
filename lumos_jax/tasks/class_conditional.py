"""Class-conditional prior: an image of a class, as DiT is trained on ImageNet (Peebles & Xie 2023)."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config
from lumos_jax.encoders import Placement
from lumos_jax.models import Condition
from lumos_jax.tasks import denoising
from lumos_jax.tasks.base import Batch
from lumos_jax.tasks.sampling import Conditions, Load, Sampling


class ClassSampling(Sampling):
    """A row of samples a class."""

    needs = ("label",)

    @classmethod
    def add_flags(cls, parser: argparse._ArgumentGroup) -> None:
        text = "classes to sample, by number from 0"
        parser.add_argument("--classes", nargs="+", type=int, required=True, metavar="N", help=text)

    def sample_inputs(self, args: argparse.Namespace, load: Load) -> dict[str, np.ndarray]:
        return self.inputs([{"label": label} for label in args.classes], load)

    def inputs(self, conditions: Conditions, load: Load) -> dict[str, np.ndarray]:
        label = np.array([condition["label"] for condition in conditions], np.int32)
        count = self.task.network.vector_dim
        if label.min() < 0 or label.max() >= count:
            raise ValueError(f"classes {' '.join(map(str, label))}: this run's classes are 0 to {count - 1}")
        return {"label": label}


@dataclasses.dataclass(frozen=True)
class ClassConditional(denoising.Denoising):
    """The class, embedded, is added to the timestep embedding; batches hold `label` int32 (B,)."""

    name: ClassVar[str] = "class_conditional"
    sample_type: ClassVar[str] = "labeled"
    sampling_class: ClassVar[type[Sampling]] = ClassSampling

    @classmethod
    def build(cls, settings: config.Settings, place: Placement | None) -> tuple[ClassConditional, dict[str, Any]]:
        network = {"vector_dim": settings.data.num_classes, "vector_kind": "class"}
        return denoising.make(cls, settings, place, network=network)

    def describe(self) -> dict[str, str]:
        return super().describe() | {"condition": f"{self.network.vector_dim} classes"}

    def condition(self, frozen: Any, batch: Batch) -> Condition:
        return Condition(vector=batch["label"][:, None].astype(jnp.float32))  # integers are exact up to 2^24

    def encode_condition(self, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        return {"label": batch["label"]}


TASK = ClassConditional
