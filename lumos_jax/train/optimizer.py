"""AdamW (Loshchilov & Hutter 2019) or Muon, with warm-up, constant or cosine decay, and clipping by the global norm.

Muon (Jordan et al. 2024) orthogonalizes the momentum of the blocks' matrices by Newton-Schulz iterations; its updates are
scaled to the size that Adam's usually have (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4), so that one learning
rate serves both. Biases, modulations, embeddings and the layers that read and write latents stay Adam's, as its authors
advise, with Nesterov's momentum in both.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax import contrib

from lumos_jax import config
from lumos_jax.train import lora
from lumos_jax.train.finetune import matching
from lumos_jax.weights.rules import flatten, unflatten

# Root mean square of an orthogonalized update before the learning rate: about Adam's (Liu et al. 2025).
MUON_RMS = 0.2


def make_schedule(settings: config.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 over `warmup_steps`, then constant, or a cosine to 0 at `steps`."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    cosine = settings.decay == "cosine"
    after = optax.cosine_decay_schedule(peak, steps - warmup) if cosine else optax.constant_schedule(peak)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(settings: config.Optimizer, steps: int, trainable: Any) -> optax.GradientTransformation:
    """The optimizer. Weight decay touches every trainable parameter, as PyTorch's AdamW does.

    Args:
      settings: config.optimizer.
      steps: train.steps, where a cosine ends.
      trainable: tree of bool like the parameters that are updated (`Plan.trainable`); False marks buffers (null
        tables), whose gradients are zero and which must not decay either.

    Raises:
      ValueError: a pattern of config.optimizer.lr_multipliers that matches nothing.
    """
    clip = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    decay = [optax.add_decayed_weights(settings.weight_decay, trainable)] if settings.weight_decay else []
    rate = optax.scale_by_learning_rate(make_schedule(settings, steps))
    return optax.chain(*clip, _direction(settings), *decay, rate, *_multipliers(settings, trainable))


def _direction(settings: config.Optimizer) -> optax.GradientTransformation:
    """The update before weight decay and learning rate."""
    if settings.name == "adamw":
        return optax.scale_by_adam(settings.b1, settings.b2, settings.eps)
    # optax's descends; the rate, with its sign, comes after.
    return contrib.muon(
        -1.0, consistent_rms=MUON_RMS, nesterov=True, muon_weight_dimension_numbers=_matrices, adam_b1=settings.b1,
        adam_b2=settings.b2, eps=settings.eps,
    )  # fmt: skip


def _matrices(params: Any) -> Any:
    """Tree of optax's MuonDimensionNumbers for the blocks' kernels: the matrices of `lora`, but queries, keys and values apart;
    None for what is Adam's."""

    def of_leaf(keys: tuple, leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        path = path[max(path.find("/blocks/"), -1) + 1 :]  # from the network's name on, where a task trains several
        if not lora.is_kernel(path) or "/modulation/" in path:
            return None
        cut = lora.first_output(path, leaf.ndim)
        outputs = range(cut + 1 if leaf.ndim == 5 else cut, leaf.ndim)
        return contrib.MuonDimensionNumbers(tuple(range(1, cut)), tuple(outputs))

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _multipliers(settings: config.Optimizer, trainable: Any) -> list[optax.GradientTransformation]:
    """Multiplies updates by config.optimizer.lr_multipliers. It comes last, where updates, weight decay included, are
    proportional to the learning rate, and keeps no state."""
    if not settings.lr_multipliers:
        return []
    flat = flatten(trainable)
    factors, trained = dict.fromkeys(flat, 1.0), [path for path, on in flat.items() if on]
    for pattern, factor in settings.lr_multipliers:
        factors |= dict.fromkeys(matching((pattern,), trained, "config.optimizer.lr_multipliers"), factor)
    factors = unflatten(factors)
    return [optax.stateless(lambda updates, _: jax.tree.map(lambda update, factor: update * factor, updates, factors))]
