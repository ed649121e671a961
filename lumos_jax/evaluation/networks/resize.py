"""Resizing as the reference implementations of metrics do it, by two matrix products in float32.

A metric's value depends on how images were resized (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN
Evaluation"), so every kernel has a name, which reference files record.

    tf1       bilinear, source position i in/out (no half pixel), no antialiasing: TensorFlow 1
    bilinear  bilinear, half-pixel centers, no antialiasing: torch.nn.functional.interpolate
    bicubic   cubic with a = -0.5, half-pixel centers, antialiased: Pillow, and interpolate with antialias=True
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.lru_cache(maxsize=64)
def matrix(source: int, target: int, kernel: str) -> np.ndarray:
    """(target, source) float32 weights of a kernel above; rows sum to 1."""
    scale = source / target
    places = np.arange(target)[:, None]
    if kernel == "tf1":
        centers, support = np.minimum(places * scale, source - 1), 1.0
    else:
        centers = (places + 0.5) * scale - 0.5
        support = 1.0
        if kernel == "bilinear":
            centers = np.clip(centers, 0, source - 1)
        else:
            support = max(scale, 1.0)
    distance = np.abs(np.arange(source)[None] - centers) / support
    if kernel == "bicubic":
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    else:
        weights = np.maximum(1 - distance, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resize(x: jax.Array, height: int, width: int, kernel: str, round_uint8: bool = False) -> jax.Array:
    """Resizes images or frames (..., H, W, C) float32 -> (..., height, width, C).

    Widths first, then heights, as every Pillow before 13 does; since 13 Pillow takes the order that costs less.

    Args:
      x: values in [0, 255].
      kernel: tf1 | bilinear | bicubic.
      round_uint8: clip and round after each of the two passes, as Pillow does with uint8 images.
    """

    def rounded(x):
        return jnp.clip(jnp.floor(x + 0.5), 0, 255) if round_uint8 else x

    if x.shape[-2] != width:
        x = rounded(jnp.einsum("vw,...hwc->...hvc", matrix(x.shape[-2], width, kernel), x, precision="highest"))
    if x.shape[-3] != height:
        x = rounded(jnp.einsum("uh,...hwc->...uwc", matrix(x.shape[-3], height, kernel), x, precision="highest"))
    return x


def shorter_side(x: jax.Array, side: int) -> jax.Array:
    """As `resize` bicubic with round_uint8: the shorter side becomes `side`, the other one in proportion, rounded down."""
    height, width = x.shape[-3:-1]
    short = min(height, width)
    return resize(x, int(side * height / short), int(side * width / short), "bicubic", round_uint8=True)


def center_square(x: jax.Array) -> jax.Array:
    """The largest centered square of images (..., H, W, C); an odd rest goes as Pillow's integer division has it."""
    height, width = x.shape[-3:-1]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return x[..., top : top + side, left : left + side, :]
