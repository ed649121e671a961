"""The reference of all settings, docs/settings.md, from the annotations beside the fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from lumos_jax import config
from lumos_jax.config.fields import Field, fields, leaves


def text() -> str:
    """Markdown: each group with its fields, their defaults, what is allowed, and their meaning."""
    count = len(list(leaves(config.Settings)))
    head = (
        f"# Settings\n\nAll {count} settings of a run, written by `python -m lumos_jax.config.documentation`.\n"
        "A file in configs/ sets some of them, as `config.train.steps = 40`; the command line any of them, as "
        "`--config.train.steps=40`.\n"
    )
    return head + "".join(_group(config.Settings(), "config"))


def _group(group: Any, where: str) -> Iterator[str]:
    found = fields(type(group))
    inner = {name: getattr(group, name) for name in found if dataclasses.is_dataclass(getattr(group, name))}
    own = [field for name, field in found.items() if name not in inner]
    if own:
        yield f"\n## {where}\n\n{' '.join((type(group).__doc__ or '').split())}\n\n"
        yield "| field | default | allowed | meaning |\n| --- | --- | --- | --- |\n"
        yield from (f"| `{f.name}` | `{f.default!r}` | {_allowed(f)} | {f.meaning} |\n" for f in own)
    for name, value in inner.items():
        yield from _group(value, f"{where}.{name}")


def _allowed(field: Field) -> str:
    if field.choices:
        return ", ".join(f"`{choice}`" for choice in field.choices)
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type).replace("typing.", "")
    return ", ".join([kind.replace("collections.abc.", "").replace("|", "\\|"), *(rule.text for rule in field.rules)])


if __name__ == "__main__":
    print(text(), end="")
