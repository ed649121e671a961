"""What the other priors have in common (DiT, RCG): no cross-attention; a condition, if any, is added to the timestep embedding.

Peebles & Xie 2023, "Scalable diffusion models with transformers"; Li et al. 2024, "Return of unconditional generation".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, encoders
from lumos_jax.models import Condition
from lumos_jax.tasks import denoising, pictures
from lumos_jax.tasks.handoffs import FROM_ADALN, Handoff


@dataclasses.dataclass(frozen=True)
class AdaLn(denoising.Denoising):
    """Base class; `encoder` is None for priors that condition on no features."""

    @property
    def identity(self) -> dict[str, str]:
        frozen = {"encoder": self.encoder, "autoencoder": self.autoencoder}
        return {name: network.identity for name, network in frozen.items() if network is not None}

    def handoff(self) -> Handoff:
        # Another condition starts anew; what cross-attends is of no use here.
        vector = FROM_ADALN.gone
        return Handoff(new=vector, gone=(*vector, *FROM_ADALN.new), refit=vector)

    def prepare(self, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Condition]:
        return self.latents(frozen, batch, key), self.condition(frozen, batch)

    def encode(self, frozen: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        if self.autoencoder.network is None:
            return {"image": batch["image"]}
        return {"latent": self.autoencoder.moments(frozen["autoencoder"], batch["image"])}

    def source_pictures(self, frozen: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The records' pictures; of conditions alone, pictures without pixels."""
        if "image" in batch or "latent" in batch:
            return super().source_pictures(frozen, batch)
        return jnp.zeros((len(next(iter(batch.values()))), 0, 0, 3), jnp.uint8)

    def sheet(self, host: Mapping[str, np.ndarray], sources: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Rows of (record's picture, where there is one | sample | sample ...)."""
        return super().sheet(host, sources, drawn) if sources.size else pictures.sheet(drawn)


def make(
    kind: type[AdaLn],
    settings: config.Settings,
    place: encoders.Placement | None,
    encoder: Any = None,
    encoder_params: Any = None,
    **network: Any,
) -> tuple[AdaLn, dict[str, Any]]:
    """A task of that class and its frozen parameters.

    Arguments and errors as of `denoising.make`; `network` is what `models.make_dit` is told about the condition.
    """
    network = {"token_shape": None, "final": "adaln"} | network
    return denoising.make(kind, settings, place, encoder, encoder_params, network=network)
