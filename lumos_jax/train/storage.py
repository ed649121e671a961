"""How the train state is kept between steps: in bfloat16 to save memory, or in the host's memory. Steps compute in float32.

bfloat16 has 8 bits of mantissa: where a step adds less than 1/512 of a value, rounding to the nearest adds nothing, ever. So an
average of decay 0.9999 would stay where it began, and Adam's second moment (b2 = 0.999), once large, could not shrink again.
Both are rounded stochastically: up with the probability of what is cut off, which adds the right amount on average. The first
moment moves by a tenth a step, and is rounded to the nearest. The random bits are a function of (seed, path, step), so that a
resumed run rounds as an uninterrupted one, on any mesh.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import config
from lumos_jax.train import rngs

SECOND_MOMENT = "nu"  # as optax names it
MOMENTS = ("mu", SECOND_MOMENT)


def stochastically_rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16: one of the two neighbours, whose mean over keys is x. What bfloat16 can hold stays as it is."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    cut = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = jax.lax.bitcast_convert_type((bits + cut) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), kept, x).astype(jnp.bfloat16)


def first_average(settings: config.Optimizer, params: Any, trainable: Any) -> Any:
    """The average before the first step, a copy: of buffers, which never move, in float32; on the device."""
    low = jnp.dtype(settings.ema_dtype)
    return jax.tree.map(lambda p, trains: jnp.array(p, low if trains else p.dtype, copy=True), params, trainable)


def first_moments(settings: config.Optimizer, opt_state: Any) -> Any:
    """optax's first state with its moments as config.optimizer.moments_dtype has them."""
    low = jnp.dtype(settings.moments_dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(low) if _last_name(path) in MOMENTS else x, opt_state
    )


def in_float32(tree: Any) -> Any:
    """What is kept in bfloat16, as float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def as_kept(tree: Any, like: Any, seed: int, name: str, step: jax.Array) -> Any:
    """A tree that a step computed, in the dtypes of `like`, the one before it. Averages and second moments are rounded
    stochastically, with keys of (seed, name and path, step)."""

    def one(path, x, before):
        if x.dtype == before.dtype:
            return x
        if _last_name(path) == MOMENTS[0]:
            return x.astype(before.dtype)
        return stochastically_rounded(x, rngs.key(seed, f"{name}{jax.tree_util.keystr(path)}", step))

    return jax.tree_util.tree_map_with_path(one, tree, like)


def _last_name(path: tuple) -> str:
    """The name of the field of an optimiser's state that a leaf belongs to; empty where there is none."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else ""


# Where the average is kept: config.optimizer.ema_memory -> the kind of memory, as jax names it.
MEMORY_KINDS = {"device": "device", "host": "pinned_host"}


def layout(settings: config.Optimizer, shardings: Any) -> Any:
    """NamedShardings of the parameters -> of their average."""
    kind = MEMORY_KINDS[settings.ema_memory]
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), shardings)


def on_device(settings: config.Optimizer, tree: Any) -> Any:
    """The average where it can be computed with, inside a compiled function or not."""
    return jax.device_put(tree, jax.memory.Space.Device) if settings.ema_memory == "host" else tree


def put_back(settings: config.Optimizer, tree: Any) -> Any:
    """The average, as a step computed it, on its way to where it is kept."""
    return jax.device_put(tree, jax.memory.Space.Host) if settings.ema_memory == "host" else tree


def average(settings: config.Optimizer, ema: Any) -> Any:
    """The average as weights to compute with: float32, on the device."""
    return in_float32(on_device(settings, ema))
