"""Tasks by name: `config.task.name` is the name of a module of this package, or the import path of one outside ("mine.toy").

A module with a task in it assigns the task's class to `TASK`; no list is kept. Only this package and configs/ know task names.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from lumos_jax import config
from lumos_jax.encoders import Placement
from lumos_jax.tasks.base import Task


def task_names() -> list[str]:
    """The tasks of this package."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in modules if hasattr(importlib.import_module(f"{__name__}.{name}"), "TASK")]


def task_class(name: str) -> type[Task]:
    """The class of the task that `config.task.name` names. Raises ValueError if there is no such module, or no task in it."""
    path = name if "." in name else f"{__name__}.{name}"
    try:
        return importlib.import_module(path).TASK
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{path}.".startswith(f"{error.name}."):
            raise  # something that the task's own module imports
        raise ValueError(
            f"config.task.name={name!r} is neither one of {', '.join(task_names())} nor the import path of a module that "
            "defines TASK"
        ) from error


def make_task(settings: config.Settings, place: Placement | None = None) -> tuple[Task, Any]:
    """The task that `config.task.name` names, and the parameters of its frozen networks, which `place` puts on devices as they
    are read (train.sharding.Frozen); None keeps them on the host.

    Raises:
      ValueError: an unknown task, settings that do not fit it, or weights that cannot be loaded.
    """
    kind, sample_type = task_class(settings.task.name), settings.data.sample_type
    if kind.sample_type not in ("", sample_type):
        raise ValueError(
            f"config.data.sample_type={sample_type}: config.task.name={settings.task.name} trains on {kind.sample_type} "
            f"samples; set it to {kind.sample_type}"
        )
    task, frozen = kind.build(settings, place)
    if settings.align.weight and getattr(task, "align", None) is None:
        raise ValueError(
            f"config.align.weight={settings.align.weight}: hidden tokens are aligned in diffusion on single images, which "
            f"config.task.name={settings.task.name} is not; set it to 0"
        )
    return task, frozen


__all__ = ["Task", "make_task", "task_class", "task_names"]
