"""A run as shapes, on devices that need not exist: the programs to compile, and what shapes alone tell.

The run is Experiment's, as training assembles it; only the batch, which training reads from a source, is made here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, data
from lumos_jax.planning import flops
from lumos_jax.train import evaluator, rngs, sharded_forward, sharding
from lumos_jax.train.experiment import Experiment
from lumos_jax.train.state import HOST_MEMORY, TrainState, to_float32

CACHE_DTYPE = jnp.float16  # what `lumos_jax.prepare cache` stores by default


@dataclasses.dataclass(frozen=True)
class Job:
    """A run on a target. See `make_job`."""

    experiment: Experiment  # abstract, on the target's devices
    batch: Mapping[str, jax.ShapeDtypeStruct]  # of the train step, with shardings
    cached: bool  # whether batches hold cached features, so that no frozen encoder runs in the step

    @property
    def settings(self) -> config.Settings:
        return self.experiment.settings

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.experiment.mesh

    @property
    def state(self) -> TrainState:
        return self.experiment.abstract_state

    def lower(self) -> Any:
        """The train step, traced for the mesh."""
        return self.experiment.train_step.lower(self.state, self.experiment.frozen, self.batch)

    def lower_sampler(self) -> Any | None:
        """The sampler of the evaluation's sheet, traced for the mesh; None for a task without samples."""
        if self.experiment.task.sampling is None:
            return None
        (count, samples), layout = self.settings.eval.sheet, sharding.replicated(self.mesh)
        rows = {
            name: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype, sharding=layout)
            for name, a in self.batch.items()
            if name != "weight"
        }
        sampler = evaluator.make_sampler(self.experiment, "sheet", samples)
        return sampler.lower(self.state.params, self.experiment.frozen, rows)

    def model_flops(self) -> tuple[float, float]:
        """FLOPs of one step of the global batch: of the trained network, forward and backward, and of the frozen networks."""
        task = sharded_forward.unshard(self.experiment.task)  # whole layers, as on one device
        plan, seed = self.experiment.plan, self.settings.train.seed
        frozen, batch, params, ema = _without_shardings(
            (self.experiment.frozen, dict(self.batch), self.state.params, self.state.ema)
        )

        def example(frozen, batch):
            return task.example(frozen, batch, rngs.streams(seed, "train", 0))

        def losses(params, ema, example):
            params, gather = plan.for_apply(params, None)
            return task.losses(params, to_float32(ema), example, jnp.float32(1), gather)

        forward = flops.count(losses, params, ema, jax.eval_shape(example, frozen, batch))
        return 3 * forward, flops.count(example, frozen, batch)

    def resident_bytes(self) -> dict[str, int]:
        """Bytes on each chip between steps: parameters, ema, optimizer, frozen, batch."""
        state = self.state
        parts = {"parameters": state.params, "ema": state.ema, "optimizer": state.opt_state}
        parts |= {"frozen": self.experiment.frozen, "batch": dict(self.batch)}
        return {name: _bytes(part, on_host=False) for name, part in parts.items()}

    @property
    def held(self) -> int:
        """Bytes on each chip between steps, in all."""
        return sum(self.resident_bytes().values())

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory of each chip's part of the state."""
        return _bytes(self.state, on_host=True)


def _bytes(tree: Any, on_host: bool) -> int:
    """Bytes of one chip's part of the leaves in that memory."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if (leaf.sharding.memory_kind == HOST_MEMORY) == on_host
    )


def _without_shardings(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def make_job(settings: config.Settings, devices: Sequence[Any], cached: bool) -> Job:
    """The run that the settings describe, on devices that need not exist; `cached`: on features from a cache.

    Raises ValueError for settings that do not fit the devices, or records that cannot be cached.
    """
    config.validate(settings)
    experiment = Experiment.build(settings, devices, abstract=True)
    rows = _record(settings)
    if cached:
        rows = _cached_record(experiment, rows)
        experiment = experiment.without_encoders()
    rows["weight"] = jax.ShapeDtypeStruct((), jnp.float32)

    def batched(row):
        shape = (settings.train.batch_size, *row.shape)
        layout = sharding.batch_layout(experiment.mesh, len(shape))
        return jax.ShapeDtypeStruct(shape, row.dtype, sharding=layout)

    return Job(experiment, jax.tree.map(batched, rows), cached)


def _record(settings: config.Settings) -> dict[str, jax.ShapeDtypeStruct]:
    """What the step takes of one record, as its source and the host's tokenizer make it."""
    arrays = {name: (shape, dtype) for name, (dtype, shape) in data.describe_row(settings.data).items()}
    if settings.data.sample_type == "captioned":
        length = (settings.encoder.max_tokens,)
        arrays |= {"tokens": (length, np.dtype(np.int32)), "token_mask": (length, np.dtype(bool))}
    return {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items() if not array[1].hasobject}


def _cached_record(experiment: Experiment, row: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """What the step takes of one record of a cache. Raises ValueError if the task's records cannot be cached."""
    task = experiment.task
    if task.uncacheable:
        raise ValueError(task.uncacheable)
    encoded = dict(row)
    if "tokens" in row:  # a cache holds both captions, of which a batch takes one
        encoded |= {f"{name}_detailed": row[name] for name in ("tokens", "token_mask")}
    one = {name: jax.ShapeDtypeStruct((1, *a.shape), a.dtype) for name, a in encoded.items()}
    made = jax.eval_shape(task.encode, _without_shardings(experiment.frozen), one)
    made.pop("feature_detailed", None)

    def stored(a):
        return jax.ShapeDtypeStruct(a.shape[1:], CACHE_DTYPE if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype)

    unencoded = [name for name in ("token_mask", "size") if name in row and (name == "size" or task.ragged)]
    return jax.tree.map(stored, made) | {name: row[name] for name in unencoded}
