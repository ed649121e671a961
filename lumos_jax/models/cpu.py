"""Forms that XLA's CPU backend compiles to faster code; no other platform runs them, and results are the same.

`layers.matmul` picks `kernel_gradient` by `jax.lax.platform_dependent`, so that it is lowered for CPUs alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Blocks unrolled at once by default. A CPU's scan copies each layer's residuals into stacked arrays and back, at memory speed.
SCAN_UNROLL = 12


def kernel_gradient(x_BD: jax.Array, grad_BE: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x^T grad in `dtype`, (D, E), for a matmul that wants its left operand row-major.

    By default XLA always writes out x^T, and where x comes from an activation it computes it again, element by element, in
    that strided order. Here the narrower operand is transposed, once it is in memory.
    """

    def dot(a, b):
        return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=dtype)

    barrier = jax.lax.optimization_barrier
    x_BD, grad_BE = barrier((x_BD, grad_BE))
    if x_BD.shape[1] <= grad_BE.shape[1]:
        return dot(barrier(x_BD.T), grad_BE)
    return barrier(dot(barrier(grad_BE.T), x_BD)).T
