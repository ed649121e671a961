"""Convolutions with batch norm and ReLU, of two and three dims: what Inception, I3D and VGG are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax.weights.rules import Rule, dropped

EPS = 1e-3  # of the batch norms of Inception and I3D
_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}  # PyTorch's name: ours


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Any = "SAME") -> jax.Array:
    """x (B, [T,] H, W, C), kernel ([t,] h, w, C, D) -> (B, [T,] H, W, D); padding as lax.conv_general_dilated takes it."""
    spatial = "DHW"[5 - x.ndim :]
    dims = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * len(spatial), padding, dimension_numbers=dims)


def unit(params: Any, x: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    """Convolution without bias, batch norm by its running statistics, ReLU."""
    scale = params["scale"] * jax.lax.rsqrt(params["variance"] + EPS)
    shift = params["bias"] - params["mean"] * scale
    channels = (1,) * (x.ndim - 1) + (-1,)
    return jax.nn.relu(conv(x, params["kernel"], stride, padding) * scale.reshape(channels) + shift.reshape(channels))


def max_pool(x: jax.Array, window: Sequence[int], strides: Sequence[int], padding: str) -> jax.Array:
    """Maxima of windows over the dims between batch and channels."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *strides, 1), padding)


def unit_shapes(path: str, kernel: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of what `unit` takes."""
    return {f"{path}/kernel": tuple(kernel), **{f"{path}/{leaf}": (kernel[-1],) for leaf in _NORM.values()}}


def unit_rules(path: str, convolution: str) -> list[Rule]:
    """PyTorch's names of a `unit`, whose modules are called `convolution` and bn."""
    name = path.replace("/", ".")
    norm = [Rule(f"{name}.bn.{theirs}", f"{path}/{ours}") for theirs, ours in _NORM.items()]
    unused = dropped("counts training steps", f"{name}.bn.num_batches_tracked")
    return [Rule(f"{name}.{convolution}.weight", f"{path}/kernel", "conv"), *norm, *unused]
