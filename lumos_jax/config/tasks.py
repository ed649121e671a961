"""Settings that every task has. A task with settings of its own derives from `Task`, in its own file."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from lumos_jax.config.fields import between


@dataclasses.dataclass(frozen=True)
class Task:
    """Which task, how its condition is dropped, and the settings of its own."""

    name: Annotated[str, "a module of lumos_jax/tasks, or the import path of another"] = "i2i"
    condition_dropout: Annotated[
        float, between(0, 1), "probability of the null condition, for classifier-free guidance"
    ] = 0.1
