"""How a network's forward and backward pass are spread over the chips, written out where the partitioner would do worse.

Each chip runs the network on its own rows of the batch (`jax.shard_map` over data and fsdp). Under FSDP it gathers a layer's
weights inside the scanned body, cast to the compute dtype on the shard; the transpose of that gather is a reduce-scatter of
the gradient, of half the bytes of the all-reduce that the partitioner makes of the same sum. Kernels written for a TPU, which
the partitioner cannot cut, see their own rows alone; cuDNN's attention it cuts into rows and heads that split evenly.

What does not divide so (a tensor axis, adapters, rows fewer than chips) is left to the partitioner. The frames of clips are
split over `context` by hand too: rows and frames are one dim in most layers, which leaves the partitioner no way to keep
frames apart when a device has several rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from lumos_jax.models import Network
from lumos_jax.train.sharding import AXES, BATCH, param_shardings

ROWS = ("data", "fsdp")
LANES = 128  # of a TPU's registers and memory tiles


@dataclasses.dataclass(frozen=True)
class ShardedForward(Network):
    """A network whose forward pass is split over the devices of a mesh; all else is as the network's."""

    mesh: jax.sharding.Mesh

    def apply(
        self, params: Any, x: jax.Array, t: jax.Array, condition: Any, *, gather: Callable | None = None
    ) -> jax.Array:
        """As `Network.apply`, of all rows and frames."""
        forward, given = super().apply, (x, t, condition)
        axes, ways = self.logical_axes(), self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        plain = jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=lambda a: isinstance(a, tuple))
        even = x.shape[0] % ways == 0 and self.mesh.shape["context"] == 1
        if plain and even and self.mesh.shape["tensor"] == 1:
            return self._by_rows(forward, axes, params, given)
        forward = functools.partial(forward, gather=gather, over_frames=self.over_frames)
        if x.ndim == 5 and self.mesh.shape["context"] > 1:
            return self._by_frames(forward, params, given)
        return forward(params, *given, hardware="cuda" if even and self.hardware == "cuda" else "")

    @property
    def hardware(self) -> str:
        """As of models.attention.kernel_for."""
        return hardware_of(self.mesh.devices.flat[0])

    def _by_rows(self, forward: Callable, axes: Any, params: Any, given: tuple) -> jax.Array:
        specs = jax.tree.map(lambda layout: layout.spec, param_shardings(self.mesh, params, axes))
        # Only the blocks' kernels come as shards: other layers, and vectors of all layers, are few and whole on every chip.
        kernels = jax.tree.map(lambda a, spec: spec if a.ndim > 2 else P(), params["blocks"], specs["blocks"])
        specs = {name: jax.tree.map(lambda _: P(), part) for name, part in specs.items()} | {"blocks": kernels}
        # The dim of one layer's array that is split over fsdp; `layers` is the first of the stacked one. -1: none.
        dims = jax.tree.map(lambda spec: spec.index("fsdp") - 1 if "fsdp" in spec else -1, kernels)

        def whole(layer):
            return jax.tree.map(
                lambda a, dim: a.astype(self.dtype) if dim < 0 else _gather(a.astype(self.dtype), dim), layer, dims
            )

        def own(params, *given):
            # Each chip's copy counts as its own: gradients of what is shared add up here, once, behind the layers.
            params = jax.tree.map(
                lambda a, spec: jax.lax.pcast(a, tuple(n for n in ROWS if n not in spec), to="varying"), params, specs
            )
            fsdp = self.mesh.shape["fsdp"] > 1
            return forward(params, *given, gather=whole if fsdp else None, hardware=self.hardware)

        rows = jax.tree.map(lambda _: BATCH, given)
        return jax.shard_map(own, mesh=self.mesh, in_specs=(specs, *rows), out_specs=BATCH)(params, *given)

    def _by_frames(self, forward: Callable, params: Any, given: tuple) -> jax.Array:
        def spec(a):
            return P(None, "context") if a.ndim == 5 else P()

        def own(params, *given):
            # As in `_by_rows`.
            params = jax.tree.map(lambda a: jax.lax.pcast(a, "context", to="varying"), params)
            return forward(
                params, *jax.tree.map(lambda a: a if a.ndim == 5 else jax.lax.pcast(a, "context", to="varying"), given)
            )

        specs = (P(), *jax.tree.map(spec, given))
        split = jax.shard_map(own, mesh=self.mesh, in_specs=specs, out_specs=spec(given[0]), axis_names={"context"})
        return split(params, *given)

    def over_frames(self, attend: Callable, h: jax.Array) -> jax.Array:
        ways, own = self.mesh.shape["context"], h.shape[1]
        if ways == 1:
            return attend(h)
        if h.shape[2] % ways == 0:  # all frames of one's share of the places
            return self._exchange(attend(self._exchange(h, 2, 1)), 1, 2)
        h = attend(jax.lax.all_gather(h, "context", axis=1, tiled=True))
        return jax.lax.dynamic_slice_in_dim(h, jax.lax.axis_index("context") * own, own, axis=1)

    def _exchange(self, h: jax.Array, split: int, joined: int) -> jax.Array:
        """Dim `joined` is brought together and dim `split` split, each device keeping its rows of the batch."""

        def exchange(h):
            return jax.lax.all_to_all(h, "context", split, joined, tiled=True)

        if h.shape[0] % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]):
            return exchange(h)
        # The partitioner, left with the other axes, would bring all rows together around the exchange.
        return jax.shard_map(exchange, in_specs=BATCH, out_specs=BATCH, axis_names=set(AXES) - {"context"})(h)


def _gather(a: jax.Array, dim: int) -> jax.Array:
    """The whole array of shards along `dim`. Trailing dims that do not fill a TPU's lanes are merged on the way."""
    if dim or a.shape[-1] % LANES == 0:
        return jax.lax.all_gather(a, "fsdp", axis=dim, tiled=True)
    return jax.lax.all_gather(a.reshape(a.shape[0], -1), "fsdp", axis=0, tiled=True).reshape(-1, *a.shape[1:])


def hardware_of(device: Any) -> str:
    """ "tpu", "cuda" for a GPU with flash attention, which NVIDIA's have since Ampere (compute capability 8.0), or ""."""
    if device.platform == "tpu":
        return "tpu"
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]  # AMD's say gfx942
    return "cuda" if generation.isdecimal() and int(generation) >= 8 else ""


def on_mesh(task: Any, mesh: jax.sharding.Mesh) -> Any:
    """The task with a sharded forward pass of its network; the same task for one device that has no attention kernel."""
    if not hasattr(task, "dit") or (mesh.size == 1 and not hardware_of(mesh.devices.flat[0])):
        return task
    return dataclasses.replace(task, dit=ShardedForward(**vars(task.dit), mesh=mesh))


def off_mesh(task: Any) -> Any:
    """The task with the plain forward pass of its network, on one device."""
    if not isinstance(getattr(task, "dit", None), ShardedForward):
        return task
    fields = {name: value for name, value in vars(task.dit).items() if name != "mesh"}
    return dataclasses.replace(task, dit=Network(**fields))
