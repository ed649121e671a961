"""The image half of RCG (Li et al. 2024): an image from one self-supervised feature of it, added to the timestep embedding.

As RCG has it: MoCo-v3 ViT-B's projector, 256 features, each image's standardised; a learned null feature with probability 0.1.
RCG's other half, which draws features to start from, is no prior of images; here they come from images.
"""

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
class Rcg(adaln.AdaLn):
    """The task; see tasks.base for the interface."""

    name: str = "rcg"

    def describe(self) -> dict[str, str]:
        return {
            "latents": " x ".join(map(str, self.latent_shape)),
            "condition": f"{self.encoder.output} feature of {self.identity['encoder']}, added to the timestep's",
        }

    def condition(self, frozen: Any, batch: Mapping[str, jax.Array]) -> Condition:
        if "feature" in batch:
            feature = batch["feature"].astype(jnp.float32)
        else:
            feature = self.encoder.apply(frozen["encoder"], batch["image"])
        return Condition(vector=feature[:, 0])

    def encode(self, frozen: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        feature = self.encoder.apply(frozen["encoder"], batch["image"])
        return super().encode(frozen, batch) | {"feature": feature}

    def request(self, asked: Mapping[str, Any], load: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        return {"image": requests.images(asked, load)}


def make_rcg(settings: config.Settings, place: encoders.Placement | None = None) -> tuple[Rcg, dict[str, Any]]:
    """The task and its frozen parameters; see tasks.make_task.

    Raises:
      ValueError: several tokens an image, or as `encoders.make_encoder` and `adaln.make`.
    """
    encoder, params = encoders.make_encoder(settings.encoder, place)
    if encoder.tokens != 1:
        raise ValueError(
            f"config.encoder.output={settings.encoder.output} gives {encoder.tokens} tokens an image, and this prior adds one "
            "feature to the timestep embedding: set it to pooled or cls"
        )
    return adaln.make(Rcg, settings, place, encoder, params, vector_dim=encoder.dim)
