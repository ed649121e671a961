"""Tasks by name. Only this folder and configs/ know task names."""

from __future__ import annotations

from typing import Any

import jax

from lumos_jax import config
from lumos_jax.encoders import Placement
from lumos_jax.tasks.base import Task
from lumos_jax.tasks.class_conditional import make_class_conditional
from lumos_jax.tasks.dino import make_dino
from lumos_jax.tasks.i2i import make_i2i
from lumos_jax.tasks.i2v import make_i2v
from lumos_jax.tasks.nvs import make_nvs
from lumos_jax.tasks.rcg import make_rcg
from lumos_jax.tasks.t2i import make_t2i
from lumos_jax.tasks.unconditional import make_unconditional

_TASKS = {
    "i2i": make_i2i,
    "t2i": make_t2i,
    "i2v": make_i2v,
    "nvs": make_nvs,
    "dino": make_dino,
    "class_conditional": make_class_conditional,
    "unconditional": make_unconditional,
    "rcg": make_rcg,
}


def make_task(settings: config.Settings, place: Placement | None = None) -> tuple[Task, Any]:
    """The task that `config.task.name` names, and the parameters of its frozen networks.

    Args:
      settings: of the run.
      place: puts each of these parameters on devices as it is read (train.sharding.Frozen); None keeps them on the host.
        If it wants shapes alone, nothing is read where they are known without.

    Raises:
      ValueError: an unknown task, or weights that cannot be loaded.
    """
    if settings.task.name not in _TASKS:
        raise ValueError(f"config.task.name={settings.task.name!r} is not one of {', '.join(_TASKS)}")
    task, frozen = _TASKS[settings.task.name](settings, place)
    assert place is None or all(
        isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(frozen)
    ), "something was not placed"
    return task, frozen


__all__ = ["Task", "make_task"]
