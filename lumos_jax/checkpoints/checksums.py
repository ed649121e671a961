"""Checksums of arrays, by which a restore detects damage that storage does not report.

Each element's bits are multiplied by an odd number that depends on its position and summed modulo 2^32. Any changed element
changes the sum, and the order in which devices add their parts does not, so that a checkpoint may be restored on another mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)  # one per dim, odd


def _sum_of(array: jax.Array) -> jax.Array:
    bits = array.astype(jnp.uint8) if array.dtype == bool else array
    bits = jax.lax.bitcast_convert_type(bits, f"uint{8 * bits.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for dim in range(array.ndim):
        steps = jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim)
        place = place * np.uint32(_PRIMES[dim % len(_PRIMES)]) + steps
    return jnp.sum(bits * (place * np.uint32(2) + np.uint32(1)), dtype=jnp.uint32)


@functools.cache  # one program a layout: a new function would be compiled again at each save
def _compiled_sums(layout: jax.sharding.Sharding | None) -> Callable:
    def sums_of(leaves):
        # Some leaves are in host memory.
        return jnp.stack([_sum_of(jax.device_put(leaf, jax.memory.Space.Device)) for leaf in leaves])

    return jax.jit(sums_of, out_shardings=layout)


def checksums(tree: Any) -> dict[str, int]:
    """{path: checksum} of a tree of arrays of up to 32 bits per element, on any mesh; the same in every process."""
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    layout, replicated = getattr(next(iter(named.values())), "sharding", None), None
    if isinstance(layout, jax.sharding.NamedSharding):
        replicated = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec())
    sums = _compiled_sums(replicated)(list(named.values()))
    return dict(zip(named, np.asarray(sums).tolist(), strict=True))
