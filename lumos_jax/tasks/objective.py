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

    x0, noise: (B, h, w, c). t: (B,), as the process counts time. condition: the task's Condition. drop: (B,) bool, rows
    that see the null condition. weight: (B,) float32, 0 for records that could not be decoded.
    """

    x0: jax.Array
    noise: jax.Array
    t: jax.Array
    condition: Any
    drop: jax.Array
    weight: jax.Array


def make_example(task, frozen: Any, batch: Mapping[str, jax.Array], keys: Mapping[str, jax.Array], dropout: float):
    """Draws latents, noise, timesteps and condition dropout for a batch.

    Args:
      task: see tasks.base.
      frozen: parameters of the frozen encoders.
      batch: uint8 `image` (B, H, W, 3) and `weight` (B,).
      keys: one key per name in ("posterior", "timestep", "noise", "dropout").
      dropout: probability in [0, 1] of the null condition.
    """
    x0, condition = task.prepare(frozen, batch, keys["posterior"])
    size = x0.shape[0]
    return Example(
        x0=jax.lax.stop_gradient(x0),
        noise=jax.random.normal(keys["noise"], x0.shape, jnp.float32),
        t=diffusion.sample_timesteps(task.process, keys["timestep"], (size,)),
        condition=jax.lax.stop_gradient(condition),
        drop=jax.random.bernoulli(keys["dropout"], dropout, (size,)),
        weight=batch["weight"],
    )


def loss_terms(task, params: Any, example: Example, gather: Callable | None = None) -> dict[str, jax.Array]:
    """Losses per example, each (B,) float32 and unweighted: `loss`, `mse` and, for the hybrid loss, `vlb`."""
    null = task.dit.null_condition(params, example.condition)
    condition = select(example.drop, null, example.condition)

    def predict(x, network_time):
        return task.dit.apply(params, x, network_time, condition, gather=gather)

    return diffusion.loss_terms(task.process, predict, example.x0, example.t, example.noise)


QUARTILES = 4


class Denoising:
    """What all diffusion tasks tell the trainer (see tasks.base.Task): mix in, beside dit, process and condition_dropout."""

    @property
    def network(self):
        return self.dit

    def example(self, frozen: Any, batch: Mapping[str, jax.Array], keys: Mapping[str, jax.Array]) -> Example:
        return make_example(self, frozen, batch, keys, self.condition_dropout)

    def losses(
        self, params: Any, average: Any, example: Example, total: jax.Array, gather: Any
    ) -> dict[str, jax.Array]:
        """`loss`, `mse`, `vlb` (hybrid loss only), and the weighted sums quartile_loss and quartile_weight (4,) by quartile of
        the timestep, which are not divided by `total`."""
        terms = loss_terms(self, params, example, gather)
        terms = {name: value * example.weight / total for name, value in terms.items()}
        quartile = jax.nn.one_hot(diffusion.timestep_quartile(self.process, example.t), QUARTILES)
        sums = {name: value.sum() for name, value in terms.items()}
        sums["quartile_loss"] = terms["loss"] @ quartile * total
        sums["quartile_weight"] = example.weight @ quartile
        return sums

    def settle(self, params: Any, sums: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        return params, sums


def select(rows: jax.Array, yes: Any, no: Any) -> Any:
    """Row by row of two conditions alike: `yes` where `rows` (B,) is true, else `no`."""

    def one(a, b):
        return jnp.where(rows.reshape(rows.shape + (1,) * (b.ndim - 1)), a.astype(b.dtype), b)

    return jax.tree.map(one, yes, no)
