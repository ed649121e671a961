"""Random views of images on the device: crop, mirror, change of brightness, contrast, saturation and colour balance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

LUMINANCE = (0.299, 0.587, 0.114)
_LOG_RATIO = float(np.log(4 / 3))


def random_crop(key: jax.Array, image: jax.Array, side: int, scale: tuple[float, float]) -> jax.Array:
    """A random box of each image, resized: (B, H, W, 3) -> float32 (B, side, side, 3), in the values of `image`.

    Args:
      key: what is drawn for a row does not depend on the other rows.
      image: any dtype.
      side: pixels.
      scale: smallest and largest share of the image's area; width over height lies between 3/4 and 4/3.
    """
    size, height, width, _ = image.shape
    drawn = jax.random.uniform(key, (size, 4))
    area = scale[0] + (scale[1] - scale[0]) * drawn[:, 0]
    ratio = jnp.exp((2 * drawn[:, 1] - 1) * _LOG_RATIO)
    high = jnp.minimum(jnp.sqrt(area / ratio), 1.0) * height
    wide = jnp.minimum(jnp.sqrt(area * ratio), 1.0) * width
    top, left = drawn[:, 2] * (height - high), drawn[:, 3] * (width - wide)

    def one(picture, top, left, high, wide):
        factor = jnp.stack([side / high, side / wide])
        shift = -jnp.stack([top, left]) * factor
        return jax.image.scale_and_translate(picture, (side, side, 3), (0, 1), factor, shift, "linear", antialias=True)

    return jax.vmap(one)(image.astype(jnp.float32), top, left, high, wide)


def mirror(key: jax.Array, image: jax.Array) -> jax.Array:
    """Images (B, S, S, 3), half of them mirrored; `key` as for `random_crop`."""
    mirrored = jax.random.bernoulli(key, 0.5, (image.shape[0], 1, 1, 1))
    return jnp.where(mirrored, image[:, :, ::-1], image)


def jitter(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """Images (B, S, S, 3) in [0, 255] with random brightness, contrast, saturation and balance of colours.

    Args:
      key: as for `random_crop`.
      image: float32.
      strength: factors lie within 1 - strength and 1 + strength; within half of that for each channel's own.
    """
    keys = jax.random.split(key)
    size = image.shape[0]
    factors = 1 + strength * jax.random.uniform(keys[0], (size, 3, 1, 1, 1), minval=-1.0)
    balance = 1 + 0.5 * strength * jax.random.uniform(keys[1], (size, 1, 1, 3), minval=-1.0)
    mean = image.mean(axis=(1, 2, 3), keepdims=True)
    image = (image - mean) * factors[:, 0] + mean * factors[:, 1]
    grey = (image * jnp.asarray(LUMINANCE)[None, None, None]).sum(axis=-1, keepdims=True)
    return jnp.clip((grey + (image - grey) * factors[:, 2]) * balance, 0.0, 255.0)
