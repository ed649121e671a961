"""TrainState: all that a training run changes, and how it is laid out on a mesh."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lumos_jax import config
from lumos_jax.train import finetune, rngs, sharding, storage
from lumos_jax.weights.rules import flatten


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32, how many steps have been taken. params: float32, adapters included. ema: of what trains, as `Plan.split`
    gives it. opt_state: optax's, of the same. How these two are kept: see `storage`."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def state_shardings(settings: config.Optimizer, mesh: jax.sharding.Mesh, shapes: TrainState, plan: finetune.Plan, dit):
    """TrainState of NamedSharding: EMA and optimiser state are split like the parameters, counters replicated."""
    params = sharding.param_shardings(mesh, shapes.params, plan.logical_axes(dit))
    trained, _ = plan.split(params)
    everywhere = sharding.replicated(mesh)
    by_path = flatten(trained)

    def of_leaf(path: tuple, _) -> jax.sharding.NamedSharding:
        """An array of an optimiser is a parameter's where the keys that end its path are that parameter's."""
        names = [*itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))]
        return by_path.get(jax.tree_util.keystr(tuple(names[::-1]), simple=True, separator="/"), everywhere)

    opt_state = jax.tree_util.tree_map_with_path(of_leaf, shapes.opt_state)
    return TrainState(everywhere, params, storage.layout(settings, trained), opt_state)


def _from_params(
    settings: config.Optimizer, params: Any, plan: finetune.Plan, dit, optimizer: optax.GradientTransformation
) -> TrainState:
    trained, _ = plan.split(params)
    # A copy, so that the donated state never holds one buffer twice.
    ema = storage.first_average(settings, trained, plan.trainable(dit))
    opt_state = storage.first_moments(settings, optimizer.init(trained))
    return TrainState(jnp.zeros((), jnp.int32), params, ema, opt_state)


def make_state(
    settings: config.Settings, dit, optimizer, mesh, params: Any = None, abstract_only: bool = False
) -> tuple[TrainState, TrainState | None]:
    """The abstract state (ShapeDtypeStructs with shardings) and the first state on the mesh.

    Args:
      settings: for train.seed, finetune and optimizer.
      dit: the model; its `init` gives the parameters.
      optimizer: as `make_optimizer` builds it.
      mesh: where the state lives.
      params: the network's parameters to start from (a hand-off); None initialises from the seed. Adapters start fresh.
      abstract_only: build no arrays.

    Returns:
      (abstract, state): `abstract` is what a checkpoint is restored into; `state` is None if `abstract_only`.
    """

    plan, seed = finetune.make_plan(settings.finetune, dit), settings.train.seed

    def begin(network):
        return _from_params(settings.optimizer, plan.with_adapters(network, seed), plan, dit, optimizer)

    def init():
        return begin(dit.init(rngs.key(seed, "init")))

    shapes = jax.eval_shape(init)
    layout = state_shardings(settings.optimizer, mesh, shapes, plan, dit)
    abstract = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, layout)
    if abstract_only:
        return abstract, None
    if params is None:
        return abstract, jax.jit(init, out_shardings=layout)()
    return abstract, jax.jit(begin, out_shardings=layout)(params)
