"""Image to encoder input, on the device, once: shorter side resized (antialiased), center crop, mean and std."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# Mean and standard deviation of each channel, of values in [0, 1].
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

_METHODS = {"bilinear": "linear", "bicubic": "cubic"}


def preprocess(image: jax.Array, resize: int, crop: int, interpolation: str, statistics) -> jax.Array:
    """uint8 (B, H, W, 3) -> float32 (B, crop, crop, 3), normalized.

    Agrees with Pillow's antialiased resize to one gray level (Pillow rounds between its two passes).

    Args:
      image: any size.
      resize: the shorter side afterwards, pixels.
      crop: side of the center crop, pixels.
      interpolation: bilinear | bicubic.
      statistics: (mean, standard deviation) of the channels in [0, 1].
    """
    _, height, width, _ = image.shape
    x = image.astype(jnp.float32)
    short = min(height, width)
    height, width = int(height * resize / short), int(width * resize / short)
    for shape in ((x.shape[0], x.shape[1], width, 3), (x.shape[0], height, width, 3)):
        if x.shape != shape:  # columns first, and clipped in between (a cubic kernel overshoots), as Pillow does it
            x = jnp.clip(jax.image.resize(x, shape, _METHODS[interpolation], antialias=True), 0, 255)
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    x = x[:, top : top + crop, left : left + crop]
    return normalize(x, statistics)


def normalize(x: jax.Array, statistics) -> jax.Array:
    """float32 (B, H, W, 3) in [0, 255] -> zero mean and unit deviation by `statistics`, as for `preprocess`."""
    mean, std = 255 * np.array(statistics, np.float32)
    return (x - mean[None, None, None]) / std[None, None, None]
