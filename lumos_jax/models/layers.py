"""The small layers of the transformer: matmul, dense, layer norm, modulation, sinusoids, patches and positions.

Parameters are float32 and carry logical axis names (Flax boxes, which `Network.init` unboxes). Results have the dtype of the
input. Axis letters: B batch, N tokens, D width, E output features, h w c latent, p patch side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lumos_jax.models import cpu

EPSILON = 1e-6  # of every layer norm
FREQUENCY_DIM = 256  # of the timestep's sinusoid
MAX_PERIOD = 10000.0
NORM_STATISTICS = "norm_statistics"  # name by which remat policies know mean and variance of a layer norm

Initializer = Callable[..., jax.Array]
xavier = nn.initializers.xavier_uniform()
small = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, out_dtype: Any) -> jax.Array:
    """(..., D) @ (D, E) -> (..., E), computed in the dtype of x, accumulated in float32, returned in `out_dtype`. Its own
    gradient, so that the kernel's is in the kernel's dtype (float32), and the residual is the kernel, not a bfloat16 copy."""
    return _dot(x, kernel.astype(x.dtype), (x.ndim - 1,), (0,), out_dtype)


def _dot(a, b, a_dims, b_dims, dtype):
    return jax.lax.dot_general(a, b, ((a_dims, b_dims), ((), ())), preferred_element_type=dtype)


def _matmul_forward(x, kernel, out_dtype):
    # Calling `matmul` here would hide the dot from remat policies, which decide whether to save it.
    return _dot(x, kernel.astype(x.dtype), (x.ndim - 1,), (0,), out_dtype), (x, kernel)


def _matmul_backward(_, residuals, grad):
    x, kernel = residuals
    grad = grad.astype(x.dtype)
    grad_x = _dot(grad, kernel.astype(x.dtype), (x.ndim - 1,), (1,), x.dtype)

    rows = tuple(range(x.ndim - 1))

    def default(x, grad):
        return _dot(x, grad, rows, rows, kernel.dtype)

    def on_cpu(x, grad):
        return cpu.kernel_gradient(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), kernel.dtype)

    return grad_x, jax.lax.platform_dependent(x, grad, cpu=on_cpu, default=default)


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """tanh-GELU in float32, returned in the dtype of x. The backward pass keeps the input alone and computes the tanh again."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def _gelu_backward(x, grad):
    # Factored otherwise than in the forward pass: XLA would find the same tanh there, and keep it in float32 until here.
    slope, cubic, v = math.sqrt(2 / math.pi), 0.044715, x.astype(jnp.float32)
    square = v * v
    tanh = jnp.tanh(slope * v * (1 + cubic * square))
    derivative = 0.5 * (1 + tanh) + 0.5 * slope * v * (1 - tanh * tanh) * (1 + 3 * cubic * square)
    return ((grad.astype(jnp.float32) * derivative).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def broadcast_add(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y, where y has as many dims as x, some of them of length 1. CPUs sum the gradient of y in float32: in bfloat16 they
    round after every row."""
    return x + y


def _broadcast_add_backward(y, grad):
    dims = tuple(dim for dim in range(grad.ndim) if grad.shape[dim] != y.shape[dim])

    def total(grad):
        return jax.lax.reduce(grad, np.zeros((), grad.dtype), jax.lax.add, dims).reshape(y.shape)

    def on_cpu(grad):
        return total(grad.astype(jnp.float32)).astype(grad.dtype)

    return grad, jax.lax.platform_dependent(grad, cpu=on_cpu, default=total)


broadcast_add.defvjp(lambda x, y: (x + y, y), _broadcast_add_backward)


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array, out_dtype: Any = None) -> jax.Array:
    """x @ kernel + bias, as `matmul`; `out_dtype` defaults to the dtype of x."""
    out_dtype = out_dtype or x.dtype
    return broadcast_add(matmul(x, kernel, out_dtype), jnp.expand_dims(bias.astype(out_dtype), range(x.ndim - 1)))


def reshaped(initializer: Initializer, fan_in: int, fan_out: int) -> Initializer:
    """An initializer of a (fan_in, fan_out) matrix for a parameter stored with more dims, as (D, 3, H, K)."""

    def init(key, shape, dtype=jnp.float32):
        return initializer(key, (fan_in, fan_out), dtype).reshape(shape)

    return init


def parameter(module: nn.Module, name: str, init: Initializer, axes: Sequence[str | None], shape: Sequence[int]):
    """A float32 parameter with a logical axis name, or None, per dim."""
    return module.param(name, nn.with_logical_partitioning(init, tuple(axes)), tuple(shape), jnp.float32)


class Dense(nn.Module):
    """Linear layer (..., D) -> (..., features) with `kernel` (D, features) and `bias`."""

    features: int
    axes: tuple[str | None, str | None]
    kernel_init: Initializer = xavier
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_DE = parameter(self, "kernel", self.kernel_init, self.axes, (x.shape[-1], self.features))
        bias_E = parameter(self, "bias", zeros, self.axes[1:], (self.features,))
        return dense(x, kernel_DE, bias_E, self.out_dtype)


def layer_norm(x: jax.Array) -> jax.Array:
    """Layer norm over the last dim, without affine parameters, in float32 whatever the input's dtype.

    The variance is E x^2 - (E x)^2, so that one pass over x gives both sums.
    """
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean)
    mean, variance = checkpoint_name((mean, variance), NORM_STATISTICS)
    return (x - mean) * jax.lax.rsqrt(jnp.maximum(variance, 0.0) + EPSILON)


def modulated_norm(x_BND: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """LN(x) (1 + scale) + shift in float32, returned in the dtype of x; shift and scale are float32."""
    return (layer_norm(x_BND) * (1.0 + scale_BD[:, None]) + shift_BD[:, None]).astype(x_BND.dtype)


def sinusoid(t_B: jax.Array, dim: int = FREQUENCY_DIM) -> jax.Array:
    """(B,) -> (B, dim) float32: [cos, sin] of t times geometric frequencies from 1 to 1 / MAX_PERIOD."""
    half = dim // 2
    # Exponents rounded to float32 first, as in the reference networks: at t near 1000 it makes a difference of 1e-5.
    exponents = np.float32(-math.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t_B.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def patchify(x_Bhwc: jax.Array, patch: int) -> jax.Array:
    """(B, h, w, c) -> (B, N, p p c), tokens row by row, features in the order (row, column, channel)."""
    b, h, w, c = x_Bhwc.shape
    x = x_Bhwc.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x_BNP: jax.Array, patch: int, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `patchify`: (B, N, p p c) -> (B, h, w, c) for a grid of (h / p, w / p) tokens."""
    b, _, features = x_BNP.shape
    rows, columns = grid
    x = x_BNP.reshape(b, rows, columns, patch, patch, features // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * patch, columns * patch, features // patch**2)


def positions(grid: tuple[int, int], base: tuple[int, int], scale: float, width: int) -> jax.Array:
    """Fixed 2-D sin-cos positions (N, D) float32 of a grid of tokens: the first half of the dims for x, the second for y.

    Along a side they are `arange(grid) / (grid / base) / scale`: a grid larger than `base` spans the same range. Each half is
    [sin, cos], of unit amplitude. [PixArt]
    """

    def one_side(count, count_base):
        frequencies = MAX_PERIOD ** -(np.arange(width // 4) / (width / 4))
        angles = np.outer(np.arange(count) / (count / count_base) / scale, frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)

    rows, columns = grid
    # Only the two sides are constants of the program; the device broadcasts them to the (N, D) table.
    x = jnp.broadcast_to(one_side(columns, base[1])[None], (rows, columns, width // 2))
    y = jnp.broadcast_to(one_side(rows, base[0])[:, None], (rows, columns, width // 2))
    return jnp.concatenate([x, y], axis=-1).reshape(rows * columns, width)
