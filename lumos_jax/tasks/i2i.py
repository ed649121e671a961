"""Image to image: reproduce an image from the frozen self-supervised feature of that same image (paper section 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, encoders
from lumos_jax.models import Condition
from lumos_jax.tasks import denoising, requests


@dataclasses.dataclass(frozen=True)
class ImageToImage(denoising.Denoising):
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
    return denoising.make(ImageToImage, settings, place, *encoders.make_encoder(settings.encoder, place))
