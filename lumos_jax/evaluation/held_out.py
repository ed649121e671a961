"""The held-out denoising loss, with its own condition and with the null condition.

The same records, noise and timesteps are used every time and for both, so that the curve and the margin between the two
move for one reason only: what the network has learned. A margin above zero is the information that the condition gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.tasks import objective


def make_held_out_step(task, streams: Callable[[int], Mapping[str, jax.Array]], gather=None, out_shardings=None):
    """The jitted (params, frozen, batch, index) -> float32 (3,): summed loss, summed null loss, summed weight.

    Args:
      task: see tasks.base.
      streams: batch index (traced) -> the keys that `objective.make_example` draws from.
      gather: as for the train step.
      out_shardings: where the sums live.
    """

    def step(params, frozen, batch, index):
        example = objective.make_example(task, frozen, batch, streams(index), dropout=0.0)

        def total(drop):
            given = objective.Example(**{**vars(example), "drop": jnp.full_like(example.drop, drop)})
            return jnp.sum(objective.loss_terms(task, params, given, gather)["loss"] * example.weight)

        return jnp.stack([total(False), total(True), example.weight.sum()])

    return jax.jit(step, out_shardings=out_shardings)


def held_out_loss(step: Callable, params: Any, frozen: Any, batches: Iterable[Any]) -> dict[str, float]:
    """Averages over `batches`: `held_out_loss`, `held_out_null_loss` and `held_out_margin` (null minus conditioned).

    Raises:
      ValueError: not one record could be decoded.
    """
    sums = np.zeros(3)
    for index, batch in enumerate(batches):
        sums += np.asarray(step(params, frozen, batch, index), np.float64)
    if sums[2] == 0:
        raise ValueError("not one held-out record could be decoded: look at the corrupt records named in the log")
    loss, null = sums[:2] / sums[2]
    return {"held_out_loss": loss, "held_out_null_loss": null, "held_out_margin": null - loss}
