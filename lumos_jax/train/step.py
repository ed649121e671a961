"""One training step: prepare, corrupt, predict, differentiate, update, average.

The step is one compiled program. A step whose loss or gradient is not finite changes nothing but the step counter, so
that the state stays good whatever one batch or one overflow does; the loop counts such steps and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lumos_jax import config
from lumos_jax.train import finetune, rngs, sharding, storage
from lumos_jax.train.state import TrainState


def next_average(average: Any, params: Any, decay: float) -> Any:
    """decay * average + (1 - decay) * params, written as a step towards the parameter: where the two are equal (the null table)
    the average stays exact."""
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), average, params)


def make_train_step(settings: config.Settings, task, optimizer, mesh) -> Callable:
    """The jitted step: (state, frozen, batch) -> (state, metrics); the state's buffers are donated.

    `metrics` are replicated float32: the task's sums (see tasks.base.Task.losses), and the scalars grad_norm and finite (1
    or 0).
    """
    gather = sharding.make_gather(mesh, settings.model.dtype)
    plan = finetune.make_plan(settings.finetune, task.network)
    micro = settings.optimizer.accumulate
    decay, seed = settings.optimizer.ema_decay, settings.train.seed

    def total_loss(trained, rest, average, example, total_weight):
        params, prepare = plan.for_apply(finetune.join(trained, rest), gather)
        # Divided by the whole batch's weight, so that micro-batches add up to the large batch exactly.
        sums = task.losses(params, average, example, total_weight, prepare)
        return sums["loss"], sums

    differentiate = jax.grad(total_loss, has_aux=True)

    def gradients(trained, rest, average, example):
        total_weight = jnp.maximum(example.weight.sum(), 1.0)
        if micro == 1:
            return differentiate(trained, rest, average, example, total_weight)

        # Micro-batch j takes the rows r with r % micro == j: every device keeps the rows it has.
        def split(x):
            return jnp.moveaxis(x.reshape(x.shape[0] // micro, micro, *x.shape[1:]), 1, 0)

        def body(carry, part):
            part = sharding.constrain(mesh, part)
            return jax.tree.map(jnp.add, carry, differentiate(trained, rest, average, part, total_weight)), None

        parts = jax.tree.map(split, example)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(differentiate, trained, rest, average, first, total_weight)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(body, zeros, parts)[0]

    def step(state: TrainState, frozen: Any, batch: Mapping[str, jax.Array]):
        keys = rngs.streams(seed, "train", state.step)
        example = task.example(frozen, batch, keys)
        example = sharding.constrain(mesh, example)
        trained, rest = plan.split(state.params)
        kept = storage.on_device(settings.optimizer, state.ema)
        average = storage.in_float32(kept)
        grads, sums = gradients(trained, rest, average, example)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        updates, opt_state = optimizer.update(grads, storage.in_float32(state.opt_state), trained)
        moved, metrics = task.post_update(optax.apply_updates(trained, updates), sums)
        ema = storage.as_kept(next_average(average, moved, decay), kept, seed, "ema", state.step)
        opt_state = storage.as_kept(opt_state, state.opt_state, seed, "optimizer", state.step)
        new = (moved, ema, opt_state)
        old = (trained, kept, state.opt_state)
        moved, ema, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        metrics |= {"grad_norm": norm, "finite": finite.astype(jnp.float32)}
        ema = storage.put_back(settings.optimizer, ema)
        return TrainState(state.step + 1, finetune.join(moved, rest), ema, opt_state), metrics

    # The state keeps the layout it came with; metrics are whole everywhere, so that any process can read them.
    return jax.jit(step, donate_argnums=0, out_shardings=(None, sharding.replicated(mesh)))
