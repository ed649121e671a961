"""Tasks by name. Only this folder and configs/ know task names."""

from __future__ import annotations

from typing import Any

from lumos_jax import config
from lumos_jax.tasks.base import Task
from lumos_jax.tasks.dino import make_dino
from lumos_jax.tasks.i2i import make_i2i
from lumos_jax.tasks.t2i import make_t2i

_TASKS = {"i2i": make_i2i, "dino": make_dino, "t2i": make_t2i}


def make_task(settings: config.Settings) -> tuple[Task, Any]:
    """The task that `config.task.name` names, and the parameters of its frozen networks.

    Raises:
      ValueError: an unknown task, or weights that cannot be loaded.
    """
    if settings.task.name not in _TASKS:
        raise ValueError(f"config.task.name={settings.task.name!r} is not one of {', '.join(_TASKS)}")
    return _TASKS[settings.task.name](settings)


__all__ = ["Task", "make_task"]
