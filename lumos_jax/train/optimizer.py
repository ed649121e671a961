"""AdamW (Loshchilov & Hutter 2019) with warm-up, constant or cosine decay, and clipping by the global norm."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lumos_jax import config
from lumos_jax.name_rules import flatten, unflatten
from lumos_jax.train.finetune import matching


def make_schedule(settings: config.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 over `warmup_steps`, then constant, or a cosine to 0 at `steps`."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if settings.decay == "cosine":
        after = optax.cosine_decay_schedule(peak, steps - warmup)
    else:
        after = optax.constant_schedule(peak)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(settings: config.Optimizer, steps: int, trainable: Any) -> optax.GradientTransformation:
    """The optimiser. Weight decay touches every trainable parameter, as PyTorch's AdamW does.

    Args:
      settings: config.optimizer.
      steps: train.steps, where a cosine ends.
      trainable: tree of bool like the parameters that are updated (`Plan.trainable`); False marks buffers (null
        tables), whose gradients are zero and which must not decay either.

    Raises:
      ValueError: a pattern of config.optimizer.boosted that matches nothing.
    """
    clip = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    adamw = optax.adamw(
        make_schedule(settings, steps),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=trainable if settings.weight_decay else None,
    )
    return optax.chain(*clip, adamw, *_boost(settings, trainable))


def _boost(settings: config.Optimizer, trainable: Any) -> list[optax.GradientTransformation]:
    """Multiplies the updates of config.optimizer.boosted. It comes after AdamW, whose update is proportional to the learning
    rate, weight decay included, and keeps no state."""
    if not settings.boosted:
        return []
    flat = flatten(trainable)
    named = set(matching(settings.boosted, [path for path, on in flat.items() if on], "config.optimizer.boosted"))
    factors = unflatten({path: settings.boost if path in named else 1.0 for path in flat})
    return [optax.stateless(lambda updates, _: jax.tree.map(lambda update, factor: update * factor, updates, factors))]
