"""The forward and backward pass of a network on a mesh, written by hand where the partitioner would do worse.

Rows: each device runs the network on its own rows of the batch (`jax.shard_map` over data and fsdp). Under FSDP it gathers a
layer's weights inside the scanned body, cast to the compute dtype on the shard; the transpose of that gather is a
reduce-scatter of the gradient, half the bytes of the partitioner's all-reduce. TPU kernels, which the partitioner cannot
split, see their own rows alone; cuDNN's attention it splits into rows and heads that divide evenly.

Frames: a clip's frames are split over `context` by hand too. Rows and frames are one dim in most layers, so that the
partitioner cannot keep frames apart when a device has several rows.

What does not divide so (adapters, fewer rows than devices) is left to the partitioner.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lumos_jax.models import Network, fused_attention, layers
from lumos_jax.train.sharding import AXES, BATCH, param_shardings

ROWS = ("data", "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedForward(Network):
    """A network whose forward pass is split over the devices of a mesh; the rest is the network's."""

    mesh: jax.sharding.Mesh

    def apply(
        self, params: Any, x: jax.Array, t: jax.Array, condition: Any, *, gather: Callable | None = None,
        aligned: bool = False,
    ) -> Any:  # fmt: skip
        """As `Network.apply`, of all rows and frames. Only inside `jax.jit`."""
        axes, context = self.logical_axes(), self.mesh.shape["context"]
        plain = jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=lambda a: isinstance(a, tuple))
        even = x.shape[0] % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]) == 0 and context == 1
        if plain and even:
            single = condition.tokens is not None and condition.tokens.shape[1] == 1
            forward = self._split_rows(functools.partial(super().apply, aligned=aligned), params, axes, single)
        elif x.ndim == 5 and context > 1:
            forward = self._split_frames(functools.partial(super().apply, gather=gather, over_frames=self.over_frames))
        else:
            hardware = "cuda" if even and self.hardware == "cuda" else ""
            forward = functools.partial(super().apply, gather=gather, hardware=hardware, aligned=aligned)
        return forward(params, x, t, condition)

    @property
    def hardware(self) -> str:
        """As of models.attention.kernel_for."""
        return hardware_of(self.mesh.devices.flat[0])

    def _split_rows(self, apply: Callable, params: Any, axes: Any, single: bool) -> Callable:
        """`apply`, each device with its own rows of (x, t, condition). single: whether there is one condition token."""
        specs = jax.tree.map(lambda layout: layout.spec, param_shardings(self.mesh, params, axes))
        # Only the blocks' kernels come as shards: other layers, and vectors of all layers, are few and replicated.
        kernels = jax.tree.map(lambda a, spec: spec if a.ndim > 2 else P(), params["blocks"], specs["blocks"])
        specs = {name: jax.tree.map(lambda _: P(), part) for name, part in specs.items()} | {"blocks": kernels}
        # The dim of one layer's array that is split over fsdp; `layers` is the first of the stacked one. -1: none.
        dims = jax.tree.map(lambda spec: spec.index("fsdp") - 1 if "fsdp" in spec else -1, kernels)
        apart = dims["modulation"]["kernel"] >= 0

        def gather(layer):
            layer = jax.tree.map(lambda a: a.astype(self.dtype), layer)
            if single:  # keys have no effect (CrossAttention): zeros take their place
                layer["cross"]["kv_kernel"] = layer["cross"]["kv_kernel"][:, 1:]
            split = {name: dims[name] for name in layer}
            layer = jax.tree.map(lambda a, dim: a if dim < 0 else _gather(a, dim), layer, split)
            if single:
                values = layer["cross"]["kv_kernel"]
                layer["cross"]["kv_kernel"] = jnp.concatenate([jnp.zeros_like(values), values], axis=1)
            return layer

        def own_rows(params, *inputs):
            # Each device's copy counts as its own: gradients of shared parameters are summed here, once, behind the layers.
            params = jax.tree.map(
                lambda a, spec: jax.lax.pcast(a, tuple(n for n in ROWS if n not in spec), to="varying"), params, specs
            )
            inside = {"hardware": self.hardware, "gather": gather if self.mesh.shape["fsdp"] > 1 else None}
            if apart:
                blocks = dict(params["blocks"])
                inside["modulate"] = functools.partial(_modulate, **blocks.pop("modulation"))
                params |= {"blocks": blocks}
            return apply(params, *inputs, **inside)

        return jax.shard_map(own_rows, mesh=self.mesh, in_specs=(specs, BATCH, BATCH, BATCH), out_specs=BATCH)

    def _split_frames(self, apply: Callable) -> Callable:
        """`apply`, each device with its own frames of x and of the condition's latent; the partitioner splits their rows."""

        def spec(a):
            return P(None, "context") if a.ndim == 5 else P()

        def own_frames(params, *inputs):
            # As in `_split_rows`.
            params = jax.tree.map(lambda a: jax.lax.pcast(a, "context", to="varying"), params)
            inputs = jax.tree.map(lambda a: a if a.ndim == 5 else jax.lax.pcast(a, "context", to="varying"), inputs)
            return apply(params, *inputs)

        def split(params, *inputs):
            specs = (P(), *jax.tree.map(spec, inputs))
            return jax.shard_map(
                own_frames, mesh=self.mesh, in_specs=specs, out_specs=spec(inputs[0]), axis_names={"context"}
            )(params, *inputs)

        return split

    def over_frames(self, attend: Callable, h: jax.Array) -> jax.Array:
        """attend(h) over all frames, for h (B, F, N, D) of the device's own; see `Network.apply`."""
        ways, own = self.mesh.shape["context"], h.shape[1]
        if ways == 1:
            return attend(h)
        if h.shape[2] % ways == 0:  # all frames of a share of the positions
            return self._exchange(attend(self._exchange(h, 2, 1)), 1, 2)
        h = attend(jax.lax.all_gather(h, "context", axis=1, tiled=True))
        return jax.lax.dynamic_slice_in_dim(h, jax.lax.axis_index("context") * own, own, axis=1)

    def _exchange(self, h: jax.Array, split: int, joined: int) -> jax.Array:
        """All-to-all over `context` that splits dim `split` and joins dim `joined`; each device keeps its rows of the batch."""

        def exchange(h):
            return jax.lax.all_to_all(h, "context", split, joined, tiled=True)

        if h.shape[0] % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]):
            return exchange(h)
        # The partitioner, left with the other axes, would gather all rows around the exchange.
        return jax.shard_map(exchange, in_specs=BATCH, out_specs=BATCH, axis_names=set(AXES) - {"context"})(h)


def _modulate(s_BD: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The modulation of all layers, (layers, B, 6 D) float32, from shards of the kernel (layers, D, 6 D / fsdp).

    It depends on the timestep alone, a vector a row. So vectors are exchanged in place of the kernels, which are three tenths
    of a block's parameters: each device computes its share of the features for the rows of all.
    """
    rows = jax.lax.all_gather(s_BD, "fsdp", axis=0, tiled=True)
    shares = jax.vmap(layers.matmul, (None, 0, None))(rows, kernel, jnp.float32)
    return jax.lax.all_to_all(shares, "fsdp", 1, 2, tiled=True) + bias[:, None]


def _gather(a: jax.Array, dim: int) -> jax.Array:
    """The whole array of shards along `dim`, the first or the last. Other dims are merged meanwhile, so that they fill a TPU's
    lanes; the gradient of other shapes would be all-reduced instead of reduce-scattered."""
    assert dim in (0, a.ndim - 1), dim
    if dim:
        flat = jax.lax.all_gather(a.reshape(-1, a.shape[-1]), "fsdp", axis=1, tiled=True)
        return flat.reshape(*a.shape[:-1], -1)
    # The last dim stays where it fills them itself, or few rows would leave sublanes empty.
    flat = a.reshape(-1, a.shape[-1]) if a.shape[-1] >= fused_attention.LANES else a.reshape(a.shape[0], -1)
    flat = jax.lax.all_gather(flat, "fsdp", axis=0, tiled=True)
    return flat.reshape(-1, *a.shape[1:])


def hardware_of(device: Any) -> str:
    """Which attention kernels a device has: "tpu", "cuda" for NVIDIA GPUs since Ampere (compute capability 8.0), or ""."""
    if device.platform == "tpu":
        return "tpu"
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]  # AMD's say gfx942
    return "cuda" if generation.isdecimal() and int(generation) >= 8 else ""


def shard(task: Any, mesh: jax.sharding.Mesh) -> Any:
    """The task with a sharded forward pass of its network; a plain one for one device that has no attention kernel."""
    first = mesh.devices.flat[0]
    if not isinstance(task.network, Network):
        return task
    if first.platform != "cpu":  # the network is as the default backend has it, which need not be the mesh's
        # GPUs copy what each scanned layer saves into arrays of all layers, and out of them, at memory speed.
        unroll = 1 if first.platform == "tpu" else task.network.depth
        task = dataclasses.replace(task, network=dataclasses.replace(task.network, unroll=unroll))
    if mesh.size == 1 and not hardware_of(first):
        return task
    return dataclasses.replace(task, network=ShardedForward(**vars(task.network), mesh=mesh))


def unshard(task: Any) -> Any:
    """The task with the plain forward pass of its network, on one device."""
    if not isinstance(task.network, ShardedForward):
        return task
    fields = {name: value for name, value in vars(task.network).items() if name != "mesh"}
    return dataclasses.replace(task, network=Network(**fields))
