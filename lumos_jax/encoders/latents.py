"""The frozen map between images and latents: the KL-autoencoder, or pixels as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import config
from lumos_jax.encoders import architectures
from lumos_jax.encoders import autoencoder as kl
from lumos_jax.weights import files, frozen_files, names
from lumos_jax.weights import rules as name_rules
from lumos_jax.weights.placement import Placement, Take


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Fields as in config.Autoencoder; `shape` is None for the identity."""

    kind: str
    scale: float
    posterior: str
    tile: int
    dtype: str
    shape: kl.KlShape | None
    identity: str

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(h, w, c) of a square image's latents.

        Raises:
          ValueError: the side does not divide.
        """
        if self.shape is None:
            return image_size, image_size, 3
        if image_size % self.shape.factor:
            raise ValueError(
                f"config.data.image_size={image_size} is not divisible by the autoencoder's {self.shape.factor}"
            )
        side = image_size // self.shape.factor
        return side, side, self.shape.latent_channels

    def encode(self, params: Any, image: jax.Array, key: jax.Array) -> jax.Array:
        """uint8 (B, H, W, 3) -> (B, h, w, c) float32, scaled; `key` draws the posterior sample."""
        if self.shape is None:
            return _unit(image)
        return self.draw(self.moments(params, image), key)

    def mode(self, params: Any, image: jax.Array) -> jax.Array:
        """Pixels (B, H, W, 3), uint8 or float in 0..255, -> (B, h, w, c) float32, the posterior's mode, unscaled, as conditions
        have it."""
        if self.shape is None:
            return _unit(image)
        return jnp.split(self.moments(params, image), 2, axis=-1)[0]

    def moments(self, params: Any, image: jax.Array) -> jax.Array:
        """Pixels in 0..255 (B, H, W, 3) -> mean and log variance of the posterior (B, h, w, 2 c) float32, unscaled; of `kl`."""
        assert self.shape is not None
        both = kl.moments(self.shape, params, _unit(image).astype(self.dtype))
        return jnp.concatenate(both, axis=-1).astype(jnp.float32)

    def draw(self, moments: jax.Array, key: jax.Array) -> jax.Array:
        """Moments (B, h, w, 2 c) of any floating dtype -> (B, h, w, c) float32, scaled; `key` as for `encode`."""
        latent, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        if self.posterior == "sample":
            latent = latent + jnp.exp(0.5 * log_variance) * jax.random.normal(key, latent.shape)
        return latent * self.scale

    def mean(self, moments: jax.Array) -> jax.Array:
        """The posterior's mean, scaled as `draw` does it."""
        return jnp.split(moments.astype(jnp.float32), 2, axis=-1)[0] * self.scale

    def decode(self, params: Any, latent: jax.Array) -> jax.Array:
        """(B, h, w, c) scaled -> pixels (B, H, W, 3) float32 in [-1, 1], clipped."""
        if self.shape is not None:
            unscaled = (latent / self.scale).astype(self.dtype)
            latent = kl.decode(self.shape, params, unscaled, self.tile)
        return jnp.clip(latent.astype(jnp.float32), -1.0, 1.0)


def _unit(image: jax.Array) -> jax.Array:
    """0..255 -> [-1, 1], float32."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def make_autoencoder(autoencoder: config.Autoencoder, place: Placement | None = None) -> tuple[Autoencoder, Any]:
    """The autoencoder that config.autoencoder names, and its parameters in the compute dtype.

    Args:
      autoencoder: config.autoencoder.
      place: puts each array on devices as it is read; None keeps them on the host.

    Raises:
      ValueError: weights that cannot be found, read or fitted.
    """
    common = (autoencoder.posterior, autoencoder.tile, autoencoder.dtype)
    if autoencoder.kind == "identity":
        return Autoencoder("identity", 1.0, *common, None, "identity"), {}
    take = Take(autoencoder.dtype, place)
    if autoencoder.weights.startswith("random:"):
        shape = kl.KlShape(autoencoder.channels, autoencoder.layers, autoencoder.groups)
    else:
        shape = architectures.known(autoencoder.weights, take, kl.KlShape)
    if take.shapes_only and shape is not None:
        params = architectures.shapes(lambda key: kl.init(shape, key), take)
    elif shape is not None:
        seed = int(autoencoder.weights.removeprefix("random:"))
        params = name_rules.flatten(kl.init(shape, jax.random.key(seed)))
        params = name_rules.unflatten({path: take(path, array) for path, array in params.items()})
    else:
        shape, params = load_kl(autoencoder.weights, take)
    return Autoencoder("kl", autoencoder.scaling_factor, *common, shape, take.identity(autoencoder.weights)), params


def load_kl(weights: str, take: Take | None = None) -> tuple[kl.KlShape, Any]:
    """A pre-trained KL-autoencoder in diffusers' layout; `take` as for `vit_files.load_vit`.

    Raises:
      ValueError: as `files.locate`, `files.read` and `name_rules.convert` do; or another architecture.
    """
    path = files.locate(weights, "config.autoencoder.weights")

    def convert():
        state, told = files.read(path, "diffusion_pytorch_model")
        shape = kl.KlShape() if told is None else kl_shape_of(told, weights)
        return shape, *convert_kl(state, shape, weights, take)

    shape, flat = frozen_files.load_any(path, "autoencoder", kl.KlShape, convert, take)
    return shape, name_rules.unflatten(flat)


def kl_shape_of(told: dict[str, Any], origin: str) -> kl.KlShape:
    """The network's shape from diffusers' config.json. Raises ValueError for another architecture."""
    if told.get("_class_name") != "AutoencoderKL" or set(told.get("down_block_types", ())) != {"DownEncoderBlock2D"}:
        raise ValueError(
            f"{origin}: config.json describes a {told.get('_class_name')}, not Stable Diffusion's AutoencoderKL"
        )
    try:
        return kl.KlShape(
            tuple(told["block_out_channels"]),
            told["layers_per_block"],
            told["norm_num_groups"],
            told["latent_channels"],
        )
    except KeyError as error:
        raise ValueError(f"{origin}: config.json does not say {error.args[0]}") from None


def convert_kl(state: dict[str, Any], shape: kl.KlShape, origin: str, take: Callable | None = None):
    """State dict (arrays, or shapes alone) -> ({path: array}, account). Raises ValueError as `name_rules.convert`."""
    shapes = name_rules.flatten(jax.eval_shape(lambda: kl.init(shape, jax.random.key(0))))
    target = {path: leaf.shape for path, leaf in shapes.items()}
    rules = names.kl_rules(target)
    return name_rules.convert(names.modern_kl_names(state), rules, target, origin=origin, place=take)
