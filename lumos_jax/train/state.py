"""TrainState: everything that training changes, its first value and its layout on a mesh."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lumos_jax import config
from lumos_jax.train import finetune, rngs, sharding, state_dtype
from lumos_jax.weights.rules import flatten


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state between two steps.

    Attributes:
      step: int32, how many steps have been taken.
      params: float32 parameters of the network, adapters included.
      ema: of the parameters that train (see finetune.Plan.split), in the dtype and memory of `state_dtype`.
      opt_state: optax's, of the parameters that train, in the dtypes of `state_dtype`.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def make_state(
    settings: config.Settings, network, plan: finetune.Plan, optimizer: optax.GradientTransformation, params: Any = None
) -> TrainState:
    """The first state; traceable.

    Args:
      settings: for train.seed and optimizer.
      network: models.Network, or any with its `init` and `trainable`.
      plan: what trains.
      optimizer: as `make_optimizer` builds it.
      params: the network's parameters to start from, without adapters; None initializes them from the seed.
    """
    seed = settings.train.seed
    params = plan.with_adapters(network.init(rngs.key(seed, "init")) if params is None else params, seed)
    trained, _ = plan.split(params)
    ema = state_dtype.init_ema(settings.optimizer, trained, plan.trainable(network))
    opt_state = state_dtype.cast_moments(settings.optimizer, optimizer.init(trained))
    return TrainState(jnp.zeros((), jnp.int32), params, ema, opt_state)


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
    shardings = TrainState(replicated, params, state_dtype.ema_shardings(settings, trained), opt_state)
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
