"""One training step: batch -> example -> loss and gradient -> update -> EMA, as one compiled program.

A step whose loss or gradient is not finite changes nothing but the step counter, so that one bad batch or overflow cannot
damage the state; the loop counts and reports such steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lumos_jax import config
from lumos_jax.train import finetune, rngs, sharding
from lumos_jax.train.state import TrainState, move_ema, to_float32, to_state_dtype

# By device kind. 32 MiB of vector memory for one fusion, twice the default, from which large matmuls take larger tiles; earlier
# TPUs have no more than that in all. Gradients are reduced while others are computed, and are not combined, so that each
# reduction begins as soon as its gradient is there: on v5e in the fusions of matmuls, on v5p and v6e by their SparseCores.
_COMMON = {"xla_tpu_scoped_vmem_limit_kib": "32768", "xla_jf_crs_combiner_threshold_in_bytes": "0"}
_V5E = {"xla_enable_async_all_reduce": "true", "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true"}
_OFFLOADED = ("all_gather", "2d_all_gather", "3d_all_gather", "all_reduce")
_SPARSE_CORES = {f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true" for kind in _OFFLOADED}
COMPILER_OPTIONS = {
    "TPU v5 lite": _COMMON | _V5E,
    "TPU v5": _COMMON | _SPARSE_CORES,
    "TPU v6 lite": _COMMON | _SPARSE_CORES,
}


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """decay * ema + (1 - decay) * params, as a step towards the parameter: where the two are equal (the null table) it is
    exact."""
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)


def make_train_step(settings: config.Settings, task, plan: finetune.Plan, optimizer, mesh) -> Callable:
    """The jitted step: (state, frozen, batch) -> (state, metrics). Donates the state's buffers.

    `metrics` are replicated float32: the task's sums (see tasks.base.Task.losses), `grad_norm`, and `finite` (1 or 0).
    """
    gather = sharding.make_gather(mesh, settings.model.dtype)
    decay, seed, parts = settings.optimizer.ema_decay, settings.train.seed, settings.optimizer.accumulate

    def loss(trained, rest, ema, example, total_weight):
        params, gather_layer = plan.for_apply(finetune.join(trained, rest), gather)
        # Divided by the whole batch's weight, so that micro-batches add up to the large batch exactly.
        sums = task.losses(params, ema, example, total_weight, gather_layer)
        return sums["loss"], sums

    differentiate = jax.grad(loss, has_aux=True)

    def step(state: TrainState, frozen: Any, batch: Mapping[str, jax.Array]):
        # Every random choice is made here, so that micro-batches and meshes see the same numbers.
        example = task.example(frozen, batch, rngs.streams(seed, "train", state.step))
        example = sharding.constrain(mesh, example)

        # Gradients, optimizer and EMA see only the parameters that train.
        trained, rest = plan.split(state.params)
        stored_ema = move_ema(settings.optimizer, state.ema, jax.memory.Space.Device)
        ema = to_float32(stored_ema)
        total_weight = jnp.maximum(example.weight.sum(), 1.0)
        if parts == 1:
            grads, sums = differentiate(trained, rest, ema, example, total_weight)
        else:

            def accumulate(carry, part):
                part = sharding.constrain(mesh, part)
                return jax.tree.map(jnp.add, carry, differentiate(trained, rest, ema, part, total_weight)), None

            shapes = jax.eval_shape(differentiate, trained, rest, ema, example, total_weight)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(accumulate, zeros, _split(example, parts))
        # Stacked before the update, which XLA would otherwise split by layers on GPUs, and copy the state for it.
        grads = jax.lax.optimization_barrier(grads)
        updates, opt_state = optimizer.update(grads, to_float32(state.opt_state), trained)
        moved, metrics = task.post_update(optax.apply_updates(trained, updates), sums)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])

        def if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        # The EMA reads the selected parameters: reading them before the selection costs TPUs a second pass over them.
        moved = if_finite(moved, trained)
        ema = to_state_dtype(update_ema(ema, moved, decay), stored_ema, seed, "ema", state.step)
        opt_state = to_state_dtype(opt_state, state.opt_state, seed, "optimizer", state.step)
        ema, opt_state = if_finite((ema, opt_state), (stored_ema, state.opt_state))
        metrics |= {"grad_norm": norm, "finite": finite.astype(jnp.float32)}
        ema = move_ema(settings.optimizer, ema, jax.memory.Space.Host)
        return TrainState(state.step + 1, finetune.join(moved, rest), ema, opt_state), metrics

    # The state keeps its layout; metrics are replicated, so that any process can read them.
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(None, sharding.replicated(mesh)),
        compiler_options=COMPILER_OPTIONS.get(mesh.devices.flat[0].device_kind),
    )


def _split(example: Any, parts: int) -> Any:
    """Micro-batches, stacked on a leading dim. Part j takes the rows r with r % parts == j: every device keeps its rows."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), example)
