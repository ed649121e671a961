"""Dtype and memory of the EMA and the optimizer state between steps: bfloat16 or float32, on the device or the host.

Steps compute in float32. bfloat16 has 8 bits of mantissa: rounding to nearest drops a step below 1/512 of the value, so that
an EMA of decay 0.9999 would never move, and Adam's second moment (b2 = 0.999), once large, could not shrink. Both are rounded
stochastically: up with the probability of the cut-off fraction, which is unbiased. The first moment moves by a tenth a step
and is rounded to nearest. The random bits are a function of (seed, path, step), so that a resumed run rounds as an
uninterrupted one, on any mesh.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import config
from lumos_jax.train import rngs

FIRST_MOMENT, SECOND_MOMENT = "mu", "nu"  # as optax names them
MEMORY_KINDS = {"device": "device", "host": "pinned_host"}  # config.optimizer.ema_memory -> JAX's name


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16: one of the two neighbors, with mean x over keys. Values that bfloat16 can hold stay as they are."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    random = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + random) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def init_ema(settings: config.Optimizer, params: Any, trainable: Any) -> Any:
    """The EMA before the first step: a copy of the parameters in config.optimizer.state_dtype; buffers, which never move, in
    their own dtype."""
    dtype = jnp.dtype(settings.state_dtype)
    return jax.tree.map(lambda p, trains: jnp.array(p, dtype if trains else p.dtype, copy=True), params, trainable)


def cast_moments(settings: config.Optimizer, opt_state: Any) -> Any:
    """optax's first state with its moments in config.optimizer.state_dtype."""
    dtype, moments = jnp.dtype(settings.state_dtype), (FIRST_MOMENT, SECOND_MOMENT)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(dtype) if _field_name(path) in moments else x, opt_state
    )


def to_float32(tree: Any) -> Any:
    """bfloat16 leaves as float32; others as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def to_state_dtype(tree: Any, like: Any, seed: int, name: str, step: jax.Array) -> Any:
    """Casts the result of a step to the dtypes of `like`. EMA and second moments are rounded stochastically, with keys of
    (seed, name and path, step)."""

    def cast(path, x, before):
        if x.dtype == before.dtype:
            return x
        if _field_name(path) == FIRST_MOMENT:
            return x.astype(before.dtype)
        return stochastic_round(x, rngs.key(seed, f"{name}{jax.tree_util.keystr(path)}", step))

    return jax.tree_util.tree_map_with_path(cast, tree, like)


def _field_name(path: tuple) -> str:
    """The field of an optimizer state that a leaf belongs to; empty where there is none."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else ""


def ema_shardings(settings: config.Optimizer, shardings: Any) -> Any:
    """NamedShardings of the parameters -> of their EMA, in the memory that config.optimizer.ema_memory names."""
    kind = MEMORY_KINDS[settings.ema_memory]
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), shardings)


def ema_to_device(settings: config.Optimizer, ema: Any) -> Any:
    """The EMA in device memory, inside a compiled function or not."""
    return jax.device_put(ema, jax.memory.Space.Device) if settings.ema_memory == "host" else ema


def ema_to_its_memory(settings: config.Optimizer, ema: Any) -> Any:
    """The EMA on its way back to the memory that config.optimizer.ema_memory names, inside a compiled function."""
    return jax.device_put(ema, jax.memory.Space.Host) if settings.ema_memory == "host" else ema
