"""The one place that assembles a run: mesh, task, frozen networks, what trains, optimizer, state and train step.

Training, planning, sampling, caching, benchmarks and tests call `Experiment.build` and assemble none of it themselves. The data
source is opened beside it, as planning and sampling have none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from lumos_jax import config, fileio, tasks
from lumos_jax.train import finetune, sharded_forward, sharding
from lumos_jax.train.optimizer import make_optimizer
from lumos_jax.train.state import TrainState, make_state, move_ema, to_float32, with_shardings
from lumos_jax.train.step import make_train_step


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """A run on a mesh, without its data source and its directory. See `build`."""

    settings: config.Settings  # as the user gave them
    mesh: jax.sharding.Mesh
    task: tasks.Task  # with the sharded forward pass: `task.network.apply` runs on the mesh, inside `jax.jit`
    frozen: Any  # parameters of the frozen networks, on the mesh; shapes with shardings if abstract
    plan: finetune.Plan  # which parameters train
    optimizer: optax.GradientTransformation

    @classmethod
    def build(
        cls,
        settings: config.Settings,
        devices: Sequence[jax.Device] | None = None,
        abstract: bool = False,
        training: bool = True,
    ) -> Experiment:
        """Assembles a run. Loads the frozen networks; makes no state and compiles nothing. From then on, matmuls of float32
        arrays are computed in float32 in this process.

        Args:
          settings: of the run.
          devices: to run on; None takes all of them.
          abstract: load nothing, for devices that need not exist: `frozen` holds shapes with shardings.
          training: whether batches of config.train are to run. If not, config.mesh, config.align and the batch sizes are
            ignored, and rows are split over all devices.

        Raises:
          ValueError: a user's mistake: settings that do not fit the devices, or weights that cannot be loaded.
        """
        # By default GPUs round float32 operands of matmuls to TF32, and TPUs to bfloat16. Other dtypes are not concerned.
        jax.config.update("jax_default_matmul_precision", "highest")
        devices = jax.devices() if devices is None else list(devices)
        mesh = sharding.make_mesh(settings.mesh if training else config.Mesh(), devices)
        if training:
            sharding.check_batches(mesh, settings)
        placement = sharding.Frozen(mesh, shapes_only=abstract)
        # Alignment is of training alone.
        task, frozen = tasks.make_task(
            settings if training else config.replace(settings, {"align.weight": 0.0}), placement
        )
        if not abstract and len({device.process_index for device in mesh.devices.flat}) > 1:
            sharding.barrier("the first collective")
            sharding.check_agreement(task.identity)
        task = sharded_forward.shard(task, mesh)
        plan = finetune.make_plan(settings.finetune, task.network)
        optimizer = make_optimizer(settings.optimizer, settings.train.steps, plan.trainable(task.network))
        return cls(settings, mesh, task, frozen, plan, optimizer)

    def without_encoders(self) -> Experiment:
        """The same run on cached features: without the frozen parameters that only encode records."""
        return dataclasses.replace(self, frozen=self.task.without_encoders(self.frozen))

    def _make_state(self, params: Any = None) -> TrainState:
        return make_state(self.settings, self.task.network, self.plan, self.optimizer, params)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
        shapes = jax.eval_shape(self._make_state)
        return with_shardings(self.settings.optimizer, self.task.network, self.plan, self.mesh, shapes)

    def init_state(self, params: Any = None) -> TrainState:
        """The first state on the mesh: from the seed, but for the network's `params` of a hand-off; see state.make_state."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        init = jax.jit(self._make_state, out_shardings=shardings)
        return init() if params is None else init(params)

    @functools.cached_property
    def train_step(self) -> Callable:
        """The jitted step: (state, frozen, batch) -> (state, metrics). Donates the state. See step.make_train_step."""
        return make_train_step(self.settings, self.task, self.plan, self.optimizer, self.mesh)

    @property
    def gather(self) -> Callable | None:
        """Gathers one layer's weights inside the scanned body; None without an fsdp axis. Argument of `task.network.apply`."""
        return sharding.make_gather(self.mesh, self.settings.model.dtype)

    def ema_weights(self, state: TrainState) -> Any:
        """The network's weights to evaluate and sample with: float32 EMA of what trains, the rest as it is, adapters merged."""
        ema = move_ema(self.settings.optimizer, state.ema, jax.memory.Space.Device)
        return self.plan.ema_weights(state.params, to_float32(ema))

    def local_rows(self, batch_size: int) -> list[int]:
        """The rows of a global batch that this process's devices hold, ascending."""
        return sharding.local_rows(self.mesh, batch_size)

    def device_batch(self, host: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """A global batch on the mesh, from a host batch of this process's rows."""
        arrays = sharding.device_arrays(host) | {"weight": host["weight"]}
        return sharding.global_batch(self.mesh, arrays, batch_size)


def use_compilation_cache() -> None:
    """Keep compiled programs on disk: where JAX_COMPILATION_CACHE_DIR says, or beside our other caches."""
    folder = fileio.cache_directory("xla")
    if folder and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
