"""Image to image: reproduce an image from the frozen self-supervised feature of that same image (paper section 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, diffusion, encoders, models
from lumos_jax.models import Condition
from lumos_jax.tasks import requests
from lumos_jax.tasks.denoising import Denoising


@dataclasses.dataclass(frozen=True)
class ImageToImage(Denoising):
    """The I2I task; see tasks.base for the interface."""

    name: str = "i2i"

    def prepare(self, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Condition]:
        return self.latents(frozen, batch, key), self.condition(frozen, batch)

    def condition(self, frozen: Any, batch: Mapping[str, jax.Array]) -> Condition:
        if "feature" in batch:
            return Condition(tokens=batch["feature"].astype(jnp.float32))
        return Condition(tokens=self.encoder.apply(frozen["encoder"], batch["image"]))

    def truth(self, host: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The picture itself: the prior reproduces it from its features. None where a cache keeps no pictures."""
        return host.get("image")

    def request(self, asked: Mapping[str, Any], load: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        return {"image": requests.images(asked, load)}


def make_i2i(settings: config.Settings, place: encoders.Placement | None = None) -> tuple[ImageToImage, dict[str, Any]]:
    """The task and its frozen parameters {"encoder", "autoencoder"}, loaded as the settings name them; see tasks.make_task.

    Raises:
      ValueError: weights that cannot be found or do not fit; sizes that do not divide.
    """
    encoder, encoder_params = encoders.make_encoder(settings.encoder, place)
    autoencoder, autoencoder_params = encoders.make_autoencoder(settings.autoencoder, place)
    latent_shape = autoencoder.latent_shape(settings.data.image_size)
    process = diffusion.make_process(settings.diffusion)
    dit = models.make_dit(
        settings.model,
        latent_shape=latent_shape,
        out_channels=process.out_channels(latent_shape[-1]),
        token_shape=(encoder.tokens, encoder.dim),
    )
    task = ImageToImage(dit, process, encoder, autoencoder, latent_shape, settings.task.condition_dropout)
    return task, {"encoder": encoder_params, "autoencoder": autoencoder_params}
