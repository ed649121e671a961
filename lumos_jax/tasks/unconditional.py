"""Unconditional prior: images, and nothing about them."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, ClassVar

import numpy as np

from lumos_jax import config
from lumos_jax.encoders import Placement
from lumos_jax.models import Condition
from lumos_jax.tasks import denoising, media
from lumos_jax.tasks.base import Batch
from lumos_jax.tasks.sampling import Host, Load, Sampling

_COLUMNS = 8  # of a sheet


class UnconditionalSampling(Sampling):
    """Samples of noise alone, row after row."""

    def sample_inputs(self, args: argparse.Namespace, load: Load) -> dict[str, np.ndarray]:
        return {"row": np.zeros(1, np.int32)}

    def sheet(self, host: Host, sources: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """The samples alone: they have nothing to do with the batch's images."""
        samples = samples.reshape(-1, *samples.shape[2:])
        columns = min(len(samples), _COLUMNS)
        white = np.full((-len(samples) % columns, *samples.shape[1:]), 255, np.uint8)
        return media.image_grid(np.concatenate([samples, white]).reshape(-1, columns, *samples.shape[1:]))


@dataclasses.dataclass(frozen=True)
class Unconditional(denoising.Denoising):
    """The task without a condition; batches hold `image`, or `latent` of a cache."""

    name: ClassVar[str] = "unconditional"
    sampling_class: ClassVar[type[Sampling]] = UnconditionalSampling

    @classmethod
    def build(cls, settings: config.Settings, place: Placement | None) -> tuple[Unconditional, dict[str, Any]]:
        dropout, guidance = settings.task.condition_dropout, settings.eval.guidance
        if dropout != 0:
            raise ValueError(f"config.task.condition_dropout={dropout}: there is no condition to drop; set it to 0")
        if guidance != 1:
            raise ValueError(f"config.eval.guidance={guidance}: there is no condition to guide by; set it to 1")
        return denoising.make(cls, settings, place)

    def condition(self, frozen: Any, batch: Batch) -> Condition:
        return Condition()


TASK = Unconditional
