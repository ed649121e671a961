"""The denoising objective that training and the held-out loss share.

    record -> (x0, Condition) -> x_t, target -> prediction -> loss per example

Eq. (1) of the paper: E ||eps - eps_theta(x_t, t, c)||^2, with the parameterisations and weights of `diffusion`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import diffusion


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Example:
    """One prepared batch: everything random about it is already drawn.

    x0, noise: (B, [F,] h, w, c). t: (B,), as the process counts time. condition: the task's Condition, before
    `project_camera`. drop: for each name of models.PARTS, (B,) bool, the rows that lose that part of their condition. weight:
    (B,) float32, 0 for records that could not be decoded.
    """

    x0: jax.Array
    noise: jax.Array
    t: jax.Array
    condition: Any
    drop: Mapping[str, jax.Array]
    weight: jax.Array


def make_example(task, frozen: Any, batch: Mapping[str, jax.Array], keys: Mapping[str, jax.Array]) -> Example:
    """Draws latents, noise, timesteps and condition dropout for a batch.

    Args:
      task: see tasks.base.
      frozen: parameters of the frozen encoders.
      batch: the arrays that the task reads, and `weight` (B,).
      keys: one key per name in ("posterior", "timestep", "noise", "dropout").
    """
    x0, condition = task.prepare(frozen, batch, keys["posterior"])
    size = x0.shape[0]
    return Example(
        x0=jax.lax.stop_gradient(x0),
        noise=jax.random.normal(keys["noise"], x0.shape, jnp.float32),
        t=diffusion.sample_timesteps(task.process, keys["timestep"], (size,)),
        condition=jax.lax.stop_gradient(condition),
        drop=task.draw_drop(keys["dropout"], size),
        weight=batch["weight"],
    )


def loss_terms(task, params: Any, example: Example, gather: Callable | None = None, null: bool = False):
    """Losses per example, each (B,) float32 and unweighted: `loss`, `mse` and, for the hybrid loss, `vlb`.

    Args:
      task: see tasks.base.
      params: float32 parameters.
      example: as from `make_example`.
      gather: as for `models.Network.apply`.
      null: with the null condition that guidance uses, instead of the condition with what is dropped.
    """
    if null:
        condition = task.dit.null_condition(params, task.dit.project_camera(params, example.condition))
    else:
        condition = task.dit.drop_condition(params, example.condition, example.drop)

    def predict(x, network_time):
        return task.dit.apply(params, x, network_time, condition, gather=gather)

    return diffusion.loss_terms(task.process, predict, example.x0, example.t, example.noise)
