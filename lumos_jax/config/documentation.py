"""The reference of all settings, docs/settings.md, from the annotations beside the fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from lumos_jax import config, tasks
from lumos_jax.config.fields import Field, fields, leaves


def settings() -> dict[str, Field]:
    """Every setting as "group.field", those of single tasks included."""
    found = dict(leaves(config.Settings()))
    for task in _task_groups():
        found |= {f"task.{name}": field for name, field in fields(task).items()}
    return found


def text() -> str:
    """Markdown: each group with its fields, their defaults, what is allowed, and their meaning."""
    head = (
        f"# Settings\n\nAll {len(settings())} settings, written by `python -m lumos_jax.config.documentation`.\n"
        "A file in configs/ sets some of them, as `config.train.steps = 40`; the command line any of them, as "
        "`--config.train.steps=40`.\n"
    )
    groups = "".join(_group(config.Settings(), "config"))
    common = fields(config.Task)
    for task in _task_groups():
        own = [field for name, field in fields(task).items() if name not in common]
        groups += _table(f"config.task of {task.__module__.rpartition('.')[2]}", task, own)
    return head + groups


def _task_groups() -> Iterator[type]:
    """The settings of tasks that have some of their own."""
    for name in tasks.task_names():
        if (group := tasks.task_class(name).settings_class) is not config.Task:
            yield group


def _group(group: Any, where: str) -> Iterator[str]:
    found = fields(type(group))
    inner = {name: getattr(group, name) for name in found if dataclasses.is_dataclass(getattr(group, name))}
    yield _table(where, type(group), [field for name, field in found.items() if name not in inner])
    for name, value in inner.items():
        yield from _group(value, f"{where}.{name}")


def _table(heading: str, group: type, rows: list[Field]) -> str:
    head = f"\n## {heading}\n\n{' '.join((group.__doc__ or '').split())}\n\n"
    head += "| field | default | allowed | meaning |\n| --- | --- | --- | --- |\n"
    return head + "".join(f"| `{f.name}` | `{f.default!r}` | {_allowed(f)} | {f.meaning} |\n" for f in rows)


def _allowed(field: Field) -> str:
    if field.choices:
        return ", ".join(f"`{choice}`" for choice in field.choices)
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    kind = kind.replace("typing.", "").replace("collections.abc.", "")
    return ", ".join([kind, *(rule.text for rule in field.rules)])


if __name__ == "__main__":
    print(text(), end="")
