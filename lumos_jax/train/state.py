"""TrainState: everything that training changes, its first value, its layout on a mesh, and its dtypes between steps.

Steps compute in float32. EMA and optimizer state may be kept in bfloat16, which has 8 bits of mantissa: rounding to nearest
drops a step below 1/512 of the value, so that an EMA of decay 0.9999 would never move, and Adam's second moment (b2 = 0.999),
once large, could not shrink. Both are rounded stochastically: up with the probability of the cut-off fraction, which is
unbiased. The first moment moves by a tenth a step and is rounded to nearest. The random bits are a function of (seed, path,
step), so that a resumed run rounds as an uninterrupted one, on any mesh.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lumos_jax import config
from lumos_jax.train import finetune, rngs, sharding
from lumos_jax.weights.rules import flatten

FIRST_MOMENT, SECOND_MOMENT = "mu", "nu"  # as optax names them
HOST_MEMORY = "pinned_host"  # JAX's name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state between two steps. EMA and optimizer state are of the parameters that train (see finetune.Plan.split)."""

    step: jax.Array  # int32, how many steps have been taken
    params: Any  # float32 parameters of the network, adapters included
    ema: Any  # in config.optimizer.state_dtype and ema_memory
    opt_state: Any  # optax's, with moments in config.optimizer.state_dtype


def make_state(
    settings: config.Settings, network, plan: finetune.Plan, optimizer: optax.GradientTransformation, params: Any = None
) -> TrainState:
    """The first state; traceable. `params`: those of the network that are given; the others, and adapters, are initialized
    from the seed."""
    seed = settings.train.seed
    fresh = network.init(rngs.key(seed, "init"))
    params = plan.with_adapters(fresh if params is None else finetune.join(fresh, params), seed)
    trained, _ = plan.split(params)
    ema = init_ema(settings.optimizer, trained, plan.trainable(network))
    return TrainState(jnp.zeros((), jnp.int32), params, ema, cast_moments(settings.optimizer, optimizer.init(trained)))


def with_shardings(
    settings: config.Optimizer, network, plan: finetune.Plan, mesh: jax.sharding.Mesh, shapes: TrainState
) -> TrainState:
    """ShapeDtypeStructs with shardings: EMA and optimizer state are split like the parameters, counters replicated."""
    params = sharding.param_shardings(mesh, shapes.params, plan.logical_axes(network))
    trained, _ = plan.split(params)
    replicated, by_path = sharding.replicated(mesh), flatten(trained)

    def of_leaf(path: tuple, _) -> jax.sharding.NamedSharding:
        """An array of the optimizer belongs to the parameter whose keys end its path."""
        names = [*itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))]
        return by_path.get(jax.tree_util.keystr(tuple(names[::-1]), simple=True, separator="/"), replicated)

    opt_state = jax.tree_util.tree_map_with_path(of_leaf, shapes.opt_state)
    kind = HOST_MEMORY if settings.ema_memory == "host" else "device"
    ema = jax.tree.map(lambda layout: layout.with_memory_kind(kind), trained)
    shardings = TrainState(replicated, params, ema, opt_state)
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)


def move_ema(settings: config.Optimizer, ema: Any, to: jax.memory.Space) -> Any:
    """The EMA on its way between the host's and the device's memory, where config.optimizer.ema_memory is the host's."""
    return jax.device_put(ema, to) if settings.ema_memory == "host" else ema


def init_ema(settings: config.Optimizer, params: Any, trainable: Any) -> Any:
    """The EMA before the first step: a copy of the parameters in config.optimizer.state_dtype; buffers, which never move, in
    their own dtype."""
    dtype = jnp.dtype(settings.state_dtype)
    return jax.tree.map(lambda p, trains: jnp.array(p, dtype if trains else p.dtype, copy=True), params, trainable)


def cast_moments(settings: config.Optimizer, opt_state: Any) -> Any:
    """optax's first state with its moments in config.optimizer.state_dtype."""

    def cast(path, x):
        return x.astype(settings.state_dtype) if _field_name(path) in (FIRST_MOMENT, SECOND_MOMENT) else x

    return jax.tree_util.tree_map_with_path(cast, opt_state)


def to_float32(tree: Any) -> Any:
    """bfloat16 leaves as float32; others as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def to_state_dtype(tree: Any, like: Any, seed: int, name: str, step: jax.Array) -> Any:
    """Casts the result of a step to the dtypes of `like`. EMA and second moments are rounded stochastically, with keys of
    (seed, name and path, step)."""

    def cast(path, x, before):
        if x.dtype == before.dtype or _field_name(path) == FIRST_MOMENT:
            return x.astype(before.dtype)
        return stochastic_round(x, rngs.key(seed, f"{name}{jax.tree_util.keystr(path)}", step))

    return jax.tree_util.tree_map_with_path(cast, tree, like)


def _field_name(path: tuple) -> str:
    """The field of an optimizer state that a leaf belongs to; empty where there is none."""
    return next((key.name for key in reversed(path) if isinstance(key, jax.tree_util.GetAttrKey)), "")


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16: one of the two neighbors, with mean x over keys. Values that bfloat16 can hold stay as they are."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    random = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + random) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
