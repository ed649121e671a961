"""The programs that a run is made of, as shapes on a mesh that need not be there: the train step and the sampler.

They are put together from the functions that training calls, in its order (train.loop.prepare, train.evaluator); only arrays
are missing, and the sources and weights that they would come from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import config, data, tasks
from lumos_jax.planning import flops
from lumos_jax.train import rngs, sharded_forward, sharding, state_dtype
from lumos_jax.train.experiment import Experiment
from lumos_jax.train.state import TrainState

CACHE_DTYPE = jnp.float16  # what `lumos_jax.prepare cache` stores by default


@dataclasses.dataclass(frozen=True)
class Job:
    """A run on a mesh, as shapes.

    Attributes:
      experiment: abstract, on the target's devices.
      batch: of the train step, shapes with their layouts.
      cached: whether batches hold what the frozen encoders made of records.
    """

    experiment: Experiment
    batch: Mapping[str, jax.ShapeDtypeStruct]
    cached: bool

    @property
    def settings(self) -> config.Settings:
        return self.experiment.settings

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.experiment.mesh

    @property
    def task(self) -> tasks.Task:
        return self.experiment.task

    @property
    def frozen(self) -> Any:
        return self.experiment.frozen

    @property
    def state(self) -> TrainState:
        return self.experiment.abstract_state

    @property
    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    @property
    def frozen_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.frozen))

    def lower(self) -> Any:
        """The train step, traced for the mesh."""
        return self.experiment.train_step.lower(self.state, self.frozen, self.batch)

    def lower_sampler(self) -> Any | None:
        """The sheet of samples that a run draws as it trains, traced for the mesh; None for a task that draws nothing."""
        sampling = self.task.sampling
        if sampling is None:
            return None
        settings, everywhere = self.settings.eval, sharding.replicated(self.mesh)
        gather = self.experiment.gather
        keys = (rngs.key(0, "sheet/noise"), rngs.key(0, "sheet/sampler"))

        def draw(params, frozen, batch):
            return sampling.generate_batch(params, frozen, batch, keys, settings.samples, settings, gather)

        shown = {name: _shape((settings.rows, *a.shape[1:]), a.dtype, everywhere) for name, a in self.batch.items()}
        del shown["weight"]
        weights = jax.tree.map(lambda a: a, self.state.params)
        return jax.jit(draw, out_shardings=everywhere).lower(weights, self.frozen, shown)

    def model_flops(self) -> tuple[float, float]:
        """FLOPs of one step of the global batch: of the network that trains, forward and backward; of the frozen ones."""
        # Traced for one device, where no shard is cut out of a layer.
        task = sharded_forward.unshard(self.task)
        keys = functools.partial(rngs.streams, self.settings.train.seed, "train", 0)
        plain = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype))
        frozen, batch, params = plain(self.frozen), plain(dict(self.batch)), plain(self.state.params)
        plan = self.experiment.plan

        def example(frozen, batch):
            return task.example(frozen, batch, keys())

        def losses(params, average, example):
            params, gather = plan.for_apply(params, None)
            return task.losses(params, state_dtype.to_float32(average), example, jnp.float32(1), gather)

        made = jax.eval_shape(example, frozen, batch)
        forward = flops.count(losses, params, plain(self.state.ema), made)
        return 3 * forward, flops.count(example, frozen, batch)

    def resident_bytes(self) -> dict[str, int]:
        """Bytes on each chip of what is there between steps: parameters, ema, optimizer, frozen, batch."""
        parts = {
            "parameters": self.state.params,
            "ema": self.state.ema,
            "optimizer": self.state.opt_state,
            "frozen": self.frozen,
            "batch": dict(self.batch),
        }
        return {name: sum(map(_bytes_per_chip, jax.tree.leaves(part))) for name, part in parts.items()}

    @property
    def host_bytes(self) -> int:
        """Of each chip's part of the state that is kept in the memory of its host."""
        return sum(_size(leaf) for leaf in jax.tree.leaves(self.state) if _on_host(leaf))


def _on_host(leaf: jax.ShapeDtypeStruct) -> bool:
    return leaf.sharding.memory_kind == state_dtype.MEMORY_KINDS["host"]


def _bytes_per_chip(leaf: jax.ShapeDtypeStruct) -> int:
    return 0 if _on_host(leaf) else _size(leaf)


def _size(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a chip's part."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _shape(shape, dtype, layout) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=layout)


def make_job(settings: config.Settings, devices: list[Any], cached: bool) -> Job:
    """The run that the settings describe, on these devices.

    Args:
      settings: of the run.
      devices: of the target; they need not be there.
      cached: whether batches hold what the frozen encoders made of records, as a cache gives them.

    Raises:
      ValueError: settings that do not fit the devices, or records that are not cached.
    """
    config.validate(settings)
    experiment = Experiment.build(settings, devices, abstract=True)
    rows = _rows(settings, experiment.task, experiment.frozen, cached)
    if cached:
        experiment = experiment.without_encoders()
    size = settings.train.batch_size
    batch = {
        name: _shape((size, *row.shape), row.dtype, sharding.batch_layout(experiment.mesh, 1 + len(row.shape)))
        for name, row in rows.items()
    }
    return Job(experiment, batch, cached)


def _rows(settings: config.Settings, task: Any, frozen: Any, cached: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """One row of each array that the step takes."""
    rows = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape) in data.describe_row(settings.data).items()
            if not dtype.hasobject}  # fmt: skip
    kinds = ("", "_detailed") if cached else ("",)
    if settings.data.sample_type == "captioned":
        for kind in kinds:
            rows[f"tokens{kind}"] = jax.ShapeDtypeStruct((settings.encoder.max_tokens,), jnp.int32)
            rows[f"token_mask{kind}"] = jax.ShapeDtypeStruct((settings.encoder.max_tokens,), jnp.bool_)
    weight = {"weight": jax.ShapeDtypeStruct((), jnp.float32)}
    if not cached:
        return rows | weight
    if task.uncacheable:
        raise ValueError(task.uncacheable)
    one = {name: jax.ShapeDtypeStruct((1, *row.shape), row.dtype) for name, row in rows.items()}
    plain = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), frozen)
    made = jax.eval_shape(task.encode, plain, one)
    kept = {name: jax.ShapeDtypeStruct(a.shape[1:], _stored(a.dtype)) for name, a in made.items()}
    kept.pop("feature_detailed", None)
    if "token_mask" in rows and task.ragged:
        kept["token_mask"] = rows["token_mask"]
    if "size" in rows:  # of buckets
        kept["size"] = rows["size"]
    return kept | weight


def _stored(dtype: Any) -> Any:
    return CACHE_DTYPE if jnp.issubdtype(dtype, jnp.floating) else dtype
