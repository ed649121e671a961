"""The frozen map between images and latents: the KL-autoencoder, or pixels as they are.

Axes: B batch, H W pixels, h w latents, c latent channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import config
from lumos_jax.encoders import frozen
from lumos_jax.encoders.frozen import Placement
from lumos_jax.encoders.kl import KLAutoencoder


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """The network (None: pixels as they are), config.autoencoder, and where the weights are from with a hash of them."""

    network: KLAutoencoder | None
    settings: config.Autoencoder
    identity: str
    dtype: str = "float32"

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(h, w, c) of a square image's latents. Raises ValueError if the side does not divide."""
        if self.network is None:
            return image_size, image_size, 3
        if image_size % self.network.factor:
            raise ValueError(
                f"config.data.image_size={image_size} is not divisible by the autoencoder's {self.network.factor}"
            )
        side = image_size // self.network.factor
        return side, side, self.network.latent_channels

    def encode(self, params: Any, image: jax.Array, key: jax.Array) -> jax.Array:
        """uint8 (B, H, W, 3) -> (B, h, w, c) float32, scaled; `key` is for the posterior sample."""
        return _unit(image) if self.network is None else self.sample(self.moments(params, image), key)

    def mode(self, params: Any, image: jax.Array) -> jax.Array:
        """Pixels (B, H, W, 3) in 0..255 -> (B, h, w, c) float32, the posterior's mode, unscaled, as conditions have it."""
        return _unit(image) if self.network is None else jnp.split(self.moments(params, image), 2, axis=-1)[0]

    def moments(self, params: Any, image: jax.Array) -> jax.Array:
        """Pixels in 0..255 (B, H, W, 3) -> mean and log variance of the posterior (B, h, w, 2 c) float32, unscaled; of `kl`."""
        both = self.network.moments(params, _unit(image).astype(self.dtype))
        return jnp.concatenate(both, axis=-1).astype(jnp.float32)

    def sample(self, moments: jax.Array, key: jax.Array) -> jax.Array:
        """Moments (B, h, w, 2 c) of any floating dtype -> (B, h, w, c) float32, scaled; `key` as for `encode`."""
        latent, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        latent = latent + jnp.exp(0.5 * log_variance) * jax.random.normal(key, latent.shape)
        return latent * self.settings.scaling_factor

    def mean(self, moments: jax.Array) -> jax.Array:
        """Moments as for `sample` -> the posterior's mean, scaled."""
        return jnp.split(moments.astype(jnp.float32), 2, axis=-1)[0] * self.settings.scaling_factor

    def decode(self, params: Any, latent: jax.Array) -> jax.Array:
        """(B, h, w, c) scaled -> pixels (B, H, W, 3) float32 in [-1, 1], clipped."""
        if self.network is not None:
            unscaled = (latent / self.settings.scaling_factor).astype(self.dtype)
            latent = self.network.decode(params, unscaled)
        return jnp.clip(latent.astype(jnp.float32), -1.0, 1.0)


def _unit(image: jax.Array) -> jax.Array:
    """0..255 -> [-1, 1], float32."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def make_autoencoder(
    settings: config.Autoencoder, place: Placement | None = None, dtype: str = "float32"
) -> tuple[Autoencoder, Any]:
    """The autoencoder that config.autoencoder names, and its parameters; `place`, `dtype` and errors as of `frozen.load`."""
    if settings.kind == "identity":
        return Autoencoder(None, settings, "identity"), {}
    made = frozen.load("autoencoder", settings.weights, random=KLAutoencoder, dtype=dtype, place=place)
    return Autoencoder(made.network, settings, made.identity, dtype), made.params
