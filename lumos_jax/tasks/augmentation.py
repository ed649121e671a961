"""Random views of images, on the device, for tasks that train an encoder. What is sampled for a row does not depend on the
others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import encoders

LUMINANCE = (0.299, 0.587, 0.114)


def view(
    key: jax.Array, image: jax.Array, side: int, scale: tuple[float, float], mirror: bool = False, jitter: float = 0.0
) -> jax.Array:
    """A random view of each image: uint8 (B, H, W, 3) -> float32 (B, side, side, 3), normalized.

    scale: share of the image's area that a crop has. mirror: whether half of the views are mirrored. jitter: of the colors.
    """
    box, flip, color = jax.random.split(key, 3)
    crop = random_crop(box, image, side, scale)
    crop = random_flip(flip, crop) if mirror else crop
    return encoders.normalize(color_jitter(color, crop, jitter), encoders.IMAGENET_STATISTICS)


def random_crop(key: jax.Array, image: jax.Array, side: int, scale: tuple[float, float]) -> jax.Array:
    """A random box of each image, resized: (B, H, W, 3) of any dtype -> float32 (B, side, side, 3), in the values of `image`.
    scale: smallest and largest share of the image's area; width over height lies between 3/4 and 4/3."""
    size, height, width, _ = image.shape
    uniform = jax.random.uniform(key, (size, 4))
    area = scale[0] + (scale[1] - scale[0]) * uniform[:, 0]
    ratio = jnp.exp((2 * uniform[:, 1] - 1) * float(np.log(4 / 3)))
    high = jnp.minimum(jnp.sqrt(area / ratio), 1.0) * height
    wide = jnp.minimum(jnp.sqrt(area * ratio), 1.0) * width
    top, left = uniform[:, 2] * (height - high), uniform[:, 3] * (width - wide)

    def one(image, top, left, high, wide):
        factor = jnp.stack([side / high, side / wide])
        shift = -jnp.stack([top, left]) * factor
        return jax.image.scale_and_translate(image, (side, side, 3), (0, 1), factor, shift, "linear", antialias=True)

    return jax.vmap(one)(image.astype(jnp.float32), top, left, high, wide)


def random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Images (B, S, S, 3), half of them mirrored left to right."""
    mirrored = jax.random.bernoulli(key, 0.5, (image.shape[0], 1, 1, 1))
    return jnp.where(mirrored, image[:, :, ::-1], image)


def color_jitter(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """Images (B, S, S, 3) float32 in [0, 255] with random brightness, contrast, saturation and color balance. Factors lie
    within 1 - strength and 1 + strength; within half of that for each channel's own."""
    keys, size = jax.random.split(key), image.shape[0]
    factors = 1 + strength * jax.random.uniform(keys[0], (size, 3, 1, 1, 1), minval=-1.0)
    balance = 1 + 0.5 * strength * jax.random.uniform(keys[1], (size, 1, 1, 3), minval=-1.0)
    mean = image.mean(axis=(1, 2, 3), keepdims=True)
    image = (image - mean) * factors[:, 0] + mean * factors[:, 1]
    gray = (image * jnp.asarray(LUMINANCE)[None, None, None]).sum(axis=-1, keepdims=True)
    return jnp.clip((gray + (image - gray) * factors[:, 2]) * balance, 0.0, 255.0)
