"""The image half of RCG (Li et al. 2024): an image from one self-supervised feature of it, added to the timestep embedding.

As in RCG: MoCo-v3 ViT-B's projector, 256 features, each image's standardized; a learned null feature with probability 0.1.
RCG's other half, which samples features to start from, is no prior of images; here they come from images.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from lumos_jax import config, encoders
from lumos_jax.models import Condition
from lumos_jax.tasks import denoising
from lumos_jax.tasks.base import Batch
from lumos_jax.tasks.sampling import FeatureSampling, Sampling


@dataclasses.dataclass(frozen=True)
class Rcg(denoising.Denoising):
    """The RCG task; batches hold `image`, or `latent` and `feature` of a cache."""

    name: ClassVar[str] = "rcg"
    sampling_class: ClassVar[type[Sampling]] = FeatureSampling

    @classmethod
    def build(cls, settings: config.Settings, place: encoders.Placement | None) -> tuple[Rcg, dict[str, Any]]:
        encoder, params = encoders.make_encoder(settings.encoder, place, settings.model.dtype)
        if encoder.tokens != 1:
            raise ValueError(
                f"config.encoder.output={settings.encoder.output} gives {encoder.tokens} tokens an image, and this prior adds "
                "one feature to the timestep embedding: set it to pooled or cls"
            )
        network = {"token_shape": None, "vector_dim": encoder.dim, "final": "adaln"}
        return denoising.make(cls, settings, place, encoder, params, network=network)

    def condition(self, frozen: Any, batch: Batch) -> Condition:
        return Condition(vector=self.image_features(frozen, batch)[:, 0])


TASK = Rcg
