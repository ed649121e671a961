"""The held-out denoising loss: with the record's own condition, with the null condition, and with another record's condition.

The same records, noise and timesteps are used every time and for all three, so that the curves and the margins between them
change only because the network does. A higher loss under the null condition shows that the condition is used; a higher loss
under a shuffled condition shows that it is used per example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def make_held_out_step(task, streams: Callable[[int], Mapping[str, jax.Array]], gather=None, out_shardings=None):
    """The jitted (params, frozen, batch, index) -> float32 (4,): weight, summed loss, null loss and shuffled loss; of a task
    without any condition, whose three losses are one, (2,): weight and loss.

    Args:
      task: a tasks.denoising.Denoising.
      streams: batch index (traced) -> keys as `task.example` takes them.
      gather: as for the train step.
      out_shardings: of the sums.
    """

    def step(params, frozen, batch, index):
        example = task.example(frozen, batch, streams(index))
        example = dataclasses.replace(example, drop=jax.tree.map(jnp.zeros_like, example.drop))

        def total(example, null=False):
            return jnp.sum(task.loss_terms(params, example, gather, null)["loss"] * example.weight)

        sums = [example.weight.sum(), total(example)]
        if jax.tree.leaves(example.condition):
            other = dataclasses.replace(example, condition=task.shuffled(example.condition))
            sums += [total(example, null=True), total(other)]
        return jnp.stack(sums)

    return jax.jit(step, out_shardings=out_shardings)


def held_out_loss(step: Callable, params: Any, frozen: Any, batches: Iterable[Any]) -> dict[str, float]:
    """Averages over `batches`: `held_out_loss`, `held_out_null_loss`, `held_out_shuffled_loss`, `held_out_margin` (null minus
    conditioned) and `held_out_shuffled_margin` (shuffled minus conditioned); `held_out_loss` alone without a condition.

    Raises:
      ValueError: the weights of all batches are zero.
    """
    sums = sum(np.asarray(step(params, frozen, batch, index), np.float64) for index, batch in enumerate(batches))
    weight, *losses = sums
    if weight == 0:
        raise ValueError("every held-out record has weight 0")
    loss, *others = (value / weight for value in losses)
    values = {"held_out_loss": loss}
    if others:
        null, shuffled = others
        values |= {"held_out_null_loss": null, "held_out_shuffled_loss": shuffled}
        values |= {"held_out_margin": null - loss, "held_out_shuffled_margin": shuffled - loss}
    return values
