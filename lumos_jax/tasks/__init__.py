"""Tasks by name. Only this folder and configs/ know task names."""

from __future__ import annotations

from typing import Any

from lumos_jax import config
from lumos_jax.tasks.base import Task
from lumos_jax.tasks.class_conditional import make_class_conditional
from lumos_jax.tasks.dino import make_dino
from lumos_jax.tasks.i2i import make_i2i
from lumos_jax.tasks.rcg import make_rcg
from lumos_jax.tasks.unconditional import make_unconditional

_TASKS = {
    "i2i": make_i2i,
    "dino": make_dino,
    "class_conditional": make_class_conditional,
    "unconditional": make_unconditional,
    "rcg": make_rcg,
}


def make_task(settings: config.Settings) -> tuple[Task, Any]:
    """The task that `config.task.name` names, and the parameters of its frozen networks.

    Raises:
      ValueError: an unknown task, or weights that cannot be loaded.
    """
    if settings.task.name not in _TASKS:
        raise ValueError(f"config.task.name={settings.task.name!r} is not one of {', '.join(_TASKS)}")
    return _TASKS[settings.task.name](settings)


__all__ = ["Task", "make_task"]
