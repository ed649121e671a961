"""How each size of model is laid out on a mesh, held against tests/goldens/shardings: a dim that quietly stays whole costs
memory on every chip of a pod.

`python -m tests.train.test_sharding` writes the files anew; what changed in them belongs in the commit.
"""

import dataclasses
import os
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import i2i
from lumos_jax.config import io as config_io
from lumos_jax.planning import job
from lumos_jax.train import sharding

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens" / "shardings"
SIZES = ("S", "B", "L", "XL")


def layout(size):
    """A line for each array of the train state: path, dtype, shape, and the mesh axes of its dims."""
    config = i2i.get_config()
    config.data.path = "/nowhere"  # only shapes are asked for
    settings = config_io.resolve(config)
    settings = dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, size=size),
        mesh=dataclasses.replace(settings.mesh, fsdp=4),
    )
    state = job.make_job(settings, jax.devices(), cached=True).state
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        spec = [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]
        dims = ", ".join(f"{n} {axis}" if axis else str(n) for n, axis in zip(leaf.shape, spec, strict=True))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        lines.append(f"{name}  {leaf.dtype}  ({dims})\n")
    return lines


@pytest.mark.parametrize("size", SIZES)
def test_each_size_is_laid_out_as_before(size):
    assert layout(size) == (GOLDENS / f"{size}.txt").read_text().splitlines(keepends=True)


def devices(slices, each, platform="tpu"):
    return [
        SimpleNamespace(id=i, slice_index=i // each, platform=platform, device_kind="x", process_index=0)
        for i in range(slices * each)
    ]


def test_only_data_goes_between_slices():
    def slices_of(grid):
        return np.vectorize(lambda device: device.slice_index)(grid)

    grid = sharding.over_slices((4, 2, 1), devices(2, 4, "gpu"))
    np.testing.assert_array_equal(slices_of(grid)[:, :, 0], [[0, 0], [0, 0], [1, 1], [1, 1]])
    assert sorted(device.id for device in grid.ravel()) == list(range(8))
    assert sharding.over_slices((4, 2, 1), devices(1, 8)) is None
    assert sharding.over_slices((1, 8, 1), devices(2, 4, "gpu")) is None  # hosts of GPUs: as the user says
    with pytest.raises(ValueError, match=r"config\.mesh leaves 1 devices to data parallelism"):
        sharding.over_slices((1, 8, 1), devices(2, 4))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    GOLDENS.mkdir(exist_ok=True)
    for each in SIZES:
        (GOLDENS / f"{each}.txt").write_text("".join(layout(each)))
