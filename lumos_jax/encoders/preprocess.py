"""Image to encoder input, on the device, once: shorter side resized (bilinear, antialiased), centre crop, mean and std."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def preprocess(image: jax.Array, *, resize: int, crop: int) -> jax.Array:
    """uint8 (B, H, W, 3) -> float32 (B, crop, crop, 3), normalised with ImageNet's mean and std.

    Agrees with Pillow's antialiased bilinear resize to one grey level (Pillow rounds between its two passes).
    """
    _, height, width, _ = image.shape
    x = image.astype(jnp.float32)
    short = min(height, width)
    height, width = int(height * resize / short), int(width * resize / short)
    if x.shape[1:3] != (height, width):
        x = jax.image.resize(x, (x.shape[0], height, width, 3), "linear", antialias=True)
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    x = x[:, top : top + crop, left : left + crop]
    mean, std = 255 * np.array(IMAGENET_MEAN, np.float32), 255 * np.array(IMAGENET_STD, np.float32)
    return (x - mean[None, None, None]) / std[None, None, None]
