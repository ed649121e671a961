"""The reference of all settings, docs/settings.md, from the annotations beside the fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from lumos_jax import config, tasks
from lumos_jax.config.fields import Field, fields
from lumos_jax.preparation.settings import Prepare, Source


def settings() -> dict[str, Field]:
    """Every setting as "group.field", those of single tasks included."""
    groups = [*_groups(), *_groups_of_preparation()]
    rows = ((f"{heading.partition(' ')[0]}.{field.name}", field) for heading, _, own in groups for field in own)
    return {name.removeprefix("config."): field for name, field in rows}


def text() -> str:
    """Markdown: each group with its fields, their defaults, what is allowed, and their meaning."""
    number = sum(len(own) for *_, own in _groups())
    lines = [
        f"# Settings\n\nAll {number} settings of a run, written by `python -m lumos_jax.config.documentation`.",
        "A file in configs/ sets some of them, as `config.train.steps = 40`; the command line any of them, as "
        "`--config.train.steps=40`.",
    ]
    lines += _tables(_groups(), "##")
    lines.append(
        "\n## Settings of `lumos_jax.prepare`\n\nOf files in configs/prepare/, for the other verbs than `cache`."
    )
    lines += _tables(_groups_of_preparation(), "###")
    return "\n".join([*lines, ""])


def _tables(groups: Iterable[tuple[str, type, list[Field]]], mark: str) -> Iterator[str]:
    for heading, group, own in groups:
        yield f"\n{mark} {heading}\n\n{' '.join((group.__doc__ or '').split())}\n"
        yield "| field | default | allowed | meaning |\n| --- | --- | --- | --- |"
        yield from (f"| `{f.name}` | `{f.default!r}` | {_allowed(f)} | {f.meaning} |" for f in own)


def _groups_of_preparation() -> Iterator[tuple[str, type, list[Field]]]:
    yield from _group(Prepare(), "config")
    yield "config.sources, of each entry", Source, list(fields(Source).values())


def _groups() -> Iterator[tuple[str, type, list[Field]]]:
    """Heading, class and own fields of every group; last those of tasks that have settings of their own."""
    yield from _group(config.Settings(), "config")
    common = fields(config.Task)
    for name in tasks.task_names():
        group = tasks.task_class(name).settings_class
        if own := [field for field in fields(group).values() if field.name not in common]:
            yield f"config.task of {name}", group, own


def _group(group: Any, where: str) -> Iterator[tuple[str, type, list[Field]]]:
    inner = [field for field in fields(type(group)).values() if dataclasses.is_dataclass(field.default)]
    yield where, type(group), [field for field in fields(type(group)).values() if field not in inner]
    for field in inner:
        yield from _group(field.default, f"{where}.{field.name}")


def _allowed(field: Field) -> str:
    if field.choices:
        return ", ".join(f"`{choice}`" for choice in field.choices)
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    kind = kind.replace("typing.", "").replace("collections.abc.", "")
    return ", ".join([kind, *(rule.text for rule in field.rules)])


if __name__ == "__main__":
    print(text(), end="")
