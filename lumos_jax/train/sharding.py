"""All sharding on one screen: the mesh, the table of rules, and how batches and parameters are laid out.

Parameters carry logical axis names (`Network.logical_axes`); RULES says which mesh axis each may be split over. Gradients,
optimizer state and EMA follow the parameters. Batches are split over (data, fsdp), the frames of clips over context: attention
over frames exchanges them, so that a device has all frames of some positions. Under FSDP each layer's weights are gathered
inside the scanned body, after the cast to the compute dtype: left to the partitioner the same program becomes windowed
collective matmuls, estimated 3.4 times slower on 16 v5e chips. Large parameters of frozen networks are split over all devices,
whatever the mesh's axes are for, and gathered in the same way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lumos_jax import config

AXES = ("data", "fsdp", "context")
BATCH = P(("data", "fsdp"))

# Logical axis -> mesh axis. Names that are absent here are replicated.
RULES: Mapping[str, str] = {"embed": "fsdp", "heads_in": "fsdp", "mlp_in": "fsdp", "modulation": "fsdp"}


def make_mesh(settings: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of AXES over the devices, all of them by default. `data` is split over slices (groups of chips with fast links
    among them) first, so that only gradients go between slices.

    Raises:
      ValueError: the axes do not divide the number of devices, or `data` does not split over TPU slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    fsdp = len(devices) // settings.context if settings.fsdp == -1 else settings.fsdp
    data, rest = divmod(len(devices), max(fsdp, 1) * settings.context)
    if rest or not data:
        raise ValueError(
            f"config.mesh (fsdp={settings.fsdp}, context={settings.context}) does not fit {len(devices)} device(s): "
            "fsdp x context must divide that number; fsdp=-1 takes all that context leaves"
        )
    sizes = (data, fsdp, settings.context)
    kinds = (AxisType.Auto,) * len(AXES)
    grid = over_slices(sizes, devices)
    if grid is not None:
        return jax.sharding.Mesh(grid, AXES, axis_types=kinds)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)


def over_slices(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray | None:
    """The devices as an array of these sizes, slice after slice along its first dim; None where there is one slice.

    GPU hosts count as slices too; where `data` does not split over them, the other axes run across hosts, as configured.
    Raises ValueError as make_mesh.
    """
    count = len({getattr(device, "slice_index", 0) for device in devices})
    split = sizes[0] % count == 0
    if not split and devices[0].platform == "tpu":
        raise ValueError(
            f"config.mesh leaves {sizes[0]} devices to data parallelism, which do not split over {count} slices, and only data "
            f"goes between them: make fsdp x context smaller, so that a multiple of {count} is left"
        )
    if count == 1 or not split:
        return None
    return mesh_utils.create_hybrid_device_mesh((sizes[0] // count, *sizes[1:]), (count, 1, 1), devices)


def check_batches(mesh: jax.sharding.Mesh, settings: config.Settings) -> None:
    """Raises ValueError unless batches, and the frames of clips, split evenly over the mesh."""
    ways, context = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]
    if settings.micro_batch % ways:
        raise ValueError(
            f"config.train.batch_size={settings.micro_batch} does not split over mesh data x fsdp = {ways} devices; use a "
            f"multiple of {ways} or fewer devices"
        )
    if context > 1 and settings.data.clips.frames % context:
        raise ValueError(
            f"config.mesh.context={context} splits the frames of clips evenly, and config.data.sample_type="
            f"{settings.data.sample_type} has {settings.data.clips.frames} frames"
        )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_layout(mesh: jax.sharding.Mesh, dims: int = 1) -> NamedSharding:
    """Of one array of a batch. Those of five dims, (B, F, h, w, c), have frames, which are split too."""
    return NamedSharding(mesh, P(*BATCH, "context") if dims == 5 else BATCH)


def constrain(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """Inside a compiled function: lays out a tree of arrays with leading batch dims as batches are."""
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, batch_layout(mesh, a.ndim)), batch)


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """The rows of the global batch that this process's devices hold, ascending."""
    slices = batch_layout(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (index,) in slices for row in range(*index.indices(batch_size))})


def global_batch(mesh: jax.sharding.Mesh, local: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Global arrays, split over the mesh, from `local_rows` of them, or from all rows."""
    return {
        name: jax.make_array_from_process_local_data(
            batch_layout(mesh, array.ndim), array, (batch_size, *array.shape[1:])
        )
        for name, array in local.items()
    }


def device_arrays(host: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a host batch that tasks read on the device: without weights, record numbers and strings."""
    return {k: a for k, a in host.items() if k not in ("weight", "record") and a.dtype.kind not in "UO"}


def param_shardings(mesh: jax.sharding.Mesh, shapes: Any, logical_axes: Any) -> Any:
    """A NamedSharding per parameter: the first dim whose rule names a mesh axis that divides it is split over it."""

    def one(shape, names):
        spec: list[str | None] = [None] * len(names)
        for dim, name in enumerate(names):
            axis = RULES.get(name)
            if axis and axis not in spec and mesh.shape[axis] > 1 and shape.shape[dim] % mesh.shape[axis] == 0:
                spec[dim] = axis
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(one, shapes, logical_axes)


def make_gather(mesh: jax.sharding.Mesh, dtype: str) -> Callable[[Any], Any] | None:
    """A function that casts one layer's shards and gathers them, inside the scanned body; None without an fsdp axis."""
    if mesh.shape["fsdp"] == 1:
        return None

    def gather(block_params):
        cast = jax.tree.map(lambda p: p.astype(jnp.dtype(dtype)), block_params)
        within = not jax.sharding.get_abstract_mesh().empty  # of ShardedForward, whose shard_map has `context`
        return jax.lax.with_sharding_constraint(cast, P() if within else replicated(mesh))

    return gather


# Bytes above which arrays of frozen networks are split: the large ones of T5-XXL; none of ViT-L in bfloat16.
SPLIT_ABOVE = 200 * 2**20


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Places the parameters of frozen networks on the mesh, one by one; see encoders.frozen.

    An array above `split_above` bytes is split along its largest dim that divides, over as many devices as possible. The dim of
    stacked layers stays whole, as the layers are scanned. Every process gives its own devices their parts.
    """

    mesh: jax.sharding.Mesh
    split_above: int = SPLIT_ABOVE
    shapes_only: bool = False  # returns shapes with shardings, for a mesh that does not exist

    def __call__(self, path: str, array: np.ndarray | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
        size = math.prod(array.shape) * array.dtype.itemsize
        layout = NamedSharding(self.mesh, self.spec(path, array.shape, size))
        if self.shapes_only:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=layout)
        # Waits, so that the host can free the array before it reads the next one.
        return jax.block_until_ready(jax.make_array_from_callback(array.shape, layout, lambda index: array[index]))

    def spec(self, path: str, shape: Sequence[int], size: int) -> P:
        """How a parameter of so many bytes is split."""
        first = 1 if "blocks" in path.split("/")[:-1] else 0
        dims = sorted(range(first, len(shape)), key=lambda dim: -shape[dim])
        axes = tuple(axis for axis in AXES if self.mesh.shape[axis] > 1)
        choices = [axes, *((axis,) for axis in sorted(axes, key=lambda axis: -self.mesh.shape[axis]))]
        for chosen in choices if axes and size > self.split_above else ():
            ways = math.prod(self.mesh.shape[axis] for axis in chosen)
            for dim in dims:
                if shape[dim] % ways == 0:
                    return P(*[None] * dim, chosen)
        return P()

    def gather(self, tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, replicated(self.mesh)) if self.mesh.size > 1 else tree


def check_agreement(identity: Mapping[str, str]) -> None:
    """Raises ValueError unless all processes loaded the same frozen networks: each places its own parts of what it read."""
    digest = hashlib.blake2b(repr(sorted(identity.items())).encode(), digest_size=4).digest()
    found = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    if len(np.unique(found)) > 1:
        raise ValueError(
            f"the processes loaded different frozen networks; process {jax.process_index()} has {dict(identity)}: give all of "
            "them the same files"
        )


def barrier(name: str, seconds: int = 600) -> None:
    """Waits for all processes, which use each name once. JAX's coordination service waits where collectives would time out."""
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * seconds)


def all_agree(well: bool) -> bool:
    """Whether it is true in every process."""
    return bool(multihost_utils.process_allgather(np.asarray(well)).all())
