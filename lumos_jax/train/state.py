"""TrainState: all that a training run changes, and how it is laid out on a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lumos_jax import config
from lumos_jax.train import rngs, sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32, how many steps have been taken. params, ema: float32 trees alike. opt_state: optax's."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def state_shardings(mesh: jax.sharding.Mesh, shapes: TrainState, dit, optimizer: optax.GradientTransformation):
    """TrainState of NamedSharding: EMA and optimiser state are split like the parameters, counters replicated."""
    params = sharding.param_shardings(mesh, shapes.params, dit.logical_axes())
    everywhere = sharding.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer, lambda _, like: like, shapes.opt_state, params, transform_non_params=lambda _: everywhere
    )
    return TrainState(step=everywhere, params=params, ema=params, opt_state=opt_state)


def _from_params(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    # A copy, so that the donated state never holds one buffer twice.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def make_state(
    settings: config.Settings, dit, optimizer, mesh, params: Any = None, abstract_only: bool = False
) -> tuple[TrainState, TrainState | None]:
    """The abstract state (ShapeDtypeStructs with shardings) and the first state on the mesh.

    Args:
      settings: for train.seed.
      dit: the model; its `init` gives the parameters.
      optimizer: as `make_optimizer` builds it.
      mesh: where the state lives.
      params: parameters to start from (a hand-off); None initialises from the seed.
      abstract_only: build no arrays.

    Returns:
      (abstract, state): `abstract` is what a checkpoint is restored into; `state` is None if `abstract_only`.
    """

    def init():
        return _from_params(dit.init(rngs.key(settings.train.seed, "init")), optimizer)

    shapes = jax.eval_shape(init)
    layout = state_shardings(mesh, shapes, dit, optimizer)
    abstract = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, layout)
    if abstract_only:
        return abstract, None
    if params is None:
        return abstract, jax.jit(init, out_shardings=layout)()
    return abstract, jax.jit(lambda given: _from_params(given, optimizer), out_shardings=layout)(params)
