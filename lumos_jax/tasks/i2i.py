"""Image to image: reproduce an image from the frozen self-supervised feature of that same image (paper section 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import config, diffusion, encoders, models
from lumos_jax.encoders import Autoencoder, ImageEncoder
from lumos_jax.models import Condition, DiT
from lumos_jax.tasks.objective import Denoising
from lumos_jax.tasks.sampling import to_uint8


@dataclasses.dataclass(frozen=True)
class ImageToImage(Denoising):
    """The I2I task; see tasks.base.Task for the interface."""

    dit: DiT
    process: diffusion.Process
    encoder: ImageEncoder
    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]
    condition_dropout: float
    name: str = "i2i"

    @property
    def identity(self) -> dict[str, str]:
        return {"encoder": self.encoder.identity, "autoencoder": self.autoencoder.identity}

    def describe(self) -> dict[str, str]:
        return {
            "latents": " x ".join(map(str, self.latent_shape)),
            "condition": f"{self.encoder.output} tokens of {self.identity['encoder']}",
        }

    def prepare(self, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Condition]:
        if "latent" in batch:
            x0 = self.autoencoder.draw(batch["latent"], key)
        else:
            x0 = self.autoencoder.encode(frozen["autoencoder"], batch["image"], key)
        return x0, self.condition(frozen, batch)

    def condition(self, frozen: Any, batch: Mapping[str, jax.Array]) -> Condition:
        if "feature" in batch:
            return Condition(tokens=batch["feature"].astype(jnp.float32))
        return Condition(tokens=self.encoder.apply(frozen["encoder"], batch["image"]))

    def encode(self, frozen: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        feature = self.encoder.apply(frozen["encoder"], batch["image"])
        if self.autoencoder.shape is None:
            return {"image": batch["image"], "feature": feature}
        return {"latent": self.autoencoder.moments(frozen["autoencoder"], batch["image"]), "feature": feature}

    def without_encoders(self, frozen: Any) -> Any:
        return {"autoencoder": {name: part for name, part in frozen["autoencoder"].items() if name != "encoder"}}

    def source_pictures(self, frozen: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        if "image" in batch:
            return batch["image"]
        return to_uint8(self.decode(frozen, self.autoencoder.mean(batch["latent"])))

    def decode(self, frozen: Any, latent: jax.Array) -> jax.Array:
        return self.autoencoder.decode(frozen["autoencoder"], latent)


def make_i2i(settings: config.Settings) -> tuple[ImageToImage, dict[str, Any]]:
    """The task and its frozen parameters {"encoder", "autoencoder"}, loaded as the settings name them.

    Raises:
      ValueError: weights that cannot be found or do not fit; sizes that do not divide.
    """
    encoder, encoder_params = encoders.make_encoder(settings.encoder)
    autoencoder, autoencoder_params = encoders.make_autoencoder(settings.autoencoder)
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
