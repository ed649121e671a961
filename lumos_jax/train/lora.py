"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685).

    W' = W + A B

A kernel is a matrix from its input dims to its output dims, one for each index of the leading `layers` dim of stacked kernels.
A keeps the input dims and B the output dims as they are, so that both are sharded like the kernel's:

    kernel             shape                      A                      B
    attn, cross        (layers, D, parts, H, K)   (layers, D, rank)      (layers, rank, parts, H, K)
    their out_kernel   (layers, H, K, D)          (layers, H, K, rank)   (layers, rank, D)
    Dense              (layers, D, E)             (layers, D, rank)      (layers, rank, E)

A is uniform within +-1 / sqrt(fan in) (the Kaiming initialization of the paper's released code) and B is zero, so that an
adapted network starts as exactly the network that it adapts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def is_kernel(path: str) -> bool:
    """Whether the parameter at `path` is a stacked kernel of the blocks."""
    return path.startswith("blocks/") and path.endswith(("/kernel", "_kernel"))


def first_output(path: str, ndim: int) -> int:
    """Which of the `ndim` dims of the stacked kernel at `path` is the first output dim; those between `layers` and it are
    inputs."""
    assert is_kernel(path), path
    return ndim - 1 if path.endswith("/out_kernel") else 2


def max_rank(path: str, shape: tuple[int, ...]) -> int:
    """The full rank of a kernel: more is never needed."""
    cut = first_output(path, len(shape))
    return min(math.prod(shape[1:cut]), math.prod(shape[cut:]))


def init_pair(key: jax.Array, path: str, shape: tuple[int, ...], rank: int) -> dict[str, jax.Array]:
    """Float32 {"a": A, "b": B} for the stacked kernel at `path`; see the table at the top for shapes."""
    cut = first_output(path, len(shape))
    bound = math.prod(shape[1:cut]) ** -0.5
    return {
        "a": jax.random.uniform(key, (*shape[:cut], rank), jnp.float32, -bound, bound),
        "b": jnp.zeros((shape[0], rank, *shape[cut:]), jnp.float32),
    }


def pair_axes(path: str, axes: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
    """Logical axis names of A and B from those of the kernel."""
    cut = first_output(path, len(axes))
    return {"a": (*axes[:cut], None), "b": (axes[0], None, *axes[cut:])}


def add(kernels: Any, adapters: Mapping[str, Any]) -> Any:
    """W + A B for the parameters of one block (without `layers`); those without adapters stay as they are.

    Computed in float32 at full precision on every device, so that what is exported is what was trained.
    """
    if set(adapters) == {"a", "b"}:
        return kernels + jnp.tensordot(adapters["a"], adapters["b"], 1, precision=jax.lax.Precision.HIGHEST)
    return {name: add(part, adapters[name]) if name in adapters else part for name, part in kernels.items()}
