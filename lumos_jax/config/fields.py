"""What stands beside a field of the settings: its rule and its meaning, as `Annotated[int, at_least(1), "meaning"]`.

Values are checked, and documented, from these annotations alone; choices are Literals. Rules between the fields of a group are
its method `check`: what is wrong, as a message -> whether it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What values a field may have. text: what they must be, for messages."""

    allows: Callable[[Any], bool]
    text: str


def at_least(low: float) -> Rule:
    return Rule(lambda value: value >= low, f"at least {low}")


def above(low: float) -> Rule:
    return Rule(lambda value: value > low, f"above {low}")


def between(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value <= high, f"at least {low} and at most {high}")


def rising(low: float, high: float) -> Rule:
    """Of a tuple: its values do not fall, and are within the bounds."""

    def allows(values: tuple[float, ...]) -> bool:
        return low <= values[0] and values[-1] <= high and all(a <= b for a, b in itertools.pairwise(values))

    return Rule(allows, f"rising within {low} and {high}")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a group: its type without annotations, its choices if it has any, its rules, meaning and default."""

    name: str
    type: Any
    choices: tuple[Any, ...]
    rules: tuple[Rule, ...]
    meaning: str
    default: Any


@functools.cache
def fields(group: type) -> dict[str, Field]:
    """The fields of a dataclass of settings by name, sub-groups included."""
    hints, found = typing.get_type_hints(group, include_extras=True), {}
    for field in dataclasses.fields(group):
        kind, *extras = (
            typing.get_args(hints[field.name]) if hasattr(hints[field.name], "__metadata__") else (hints[field.name],)
        )
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        rules = tuple(extra for extra in extras if isinstance(extra, Rule))
        meaning = " ".join(extra for extra in extras if isinstance(extra, str))
        found[field.name] = Field(field.name, str if choices else kind, choices, rules, meaning, field.default)
    return found


def validate(group: Any, where: str = "config") -> None:
    """Checks the values of a group and of its sub-groups, then the rules between them.

    Raises:
      ValueError: names the field, its value and what is allowed.
    """
    for name, field in fields(type(group)).items():
        value = getattr(group, name)
        if dataclasses.is_dataclass(value):
            validate(value, f"{where}.{name}")
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            for number, entry in enumerate(value):
                validate(entry, f"{where}.{name}[{number}]")
        elif field.choices and value not in field.choices:
            raise ValueError(f"{where}.{name}={value!r} is not one of {', '.join(map(str, field.choices))}")
        elif broken := [rule.text for rule in field.rules if not rule.allows(value)]:
            raise ValueError(f"{where}.{name}={value!r} must be {broken[0]}")
    refuse(getattr(group, "check", dict)())


def refuse(problems: Mapping[str, bool]) -> None:
    """Raises ValueError: the first message that holds."""
    for message, holds in problems.items():
        if holds:
            raise ValueError(message)


def build(
    cls: type,
    tree: Mapping[str, Any],
    where: str = "config",
    group: Callable[[type, Any], type] = lambda hint, _: hint,
    advice: Callable[[str], str | None] = lambda _: None,
) -> Any:
    """A dataclass of settings from nested mappings; absent fields take their defaults. `validate` is a step of its own.

    Args:
      where: how messages name it.
      group: (the class of a sub-group, its values) -> the class to build.
      advice: what to do about a field that is unknown, given its whole name.

    Raises:
      ValueError: an unknown field (with the nearest known ones), or a value of the wrong type.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where} must be a group of fields, not {tree!r}")
    known, values = fields(cls), {}

    def leaf(hint: Any, value: Any, here: str) -> Any:
        if dataclasses.is_dataclass(hint):
            return build(group(hint, value), value, here, group, advice)
        return _coerce(hint, value, here, leaf)

    for name, value in tree.items():
        here = f"{where}.{name}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)
            hint = advice(here) or f"did you mean {' or '.join(near)}?"
            raise ValueError(f"unknown field {here}; {hint}")
        values[name] = leaf(known[name].type, value, here)
    return cls(**values)


def _coerce(hint: Any, value: Any, where: str, leaf: Callable[[Any, Any, str], Any]) -> Any:
    """Checks a leaf's type; lists (JSON has no tuples) become tuples and whole numbers may stand for floats."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a tuple, not {value!r}")
        kinds = typing.get_args(hint)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(value) != len(kinds):
            raise ValueError(f"{where} must have {len(kinds)} values, not {len(value)}: {value!r}")
        return tuple(
            leaf(kind, entry, f"{where}[{i}]") for i, (kind, entry) in enumerate(zip(kinds, value, strict=True))
        )
    kind = typing.get_origin(hint) or hint  # Mapping: an entry of data.mixture
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} must be of type {kind.__name__}, not {value!r}")
    return float(value) if kind is float else dict(value) if kind is Mapping else value


def replace(group: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of a group with fields replaced; "group.field" names one of a sub-group."""
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        group = dataclasses.replace(group, **{head: replace(getattr(group, head), {rest: value}) if rest else value})
    return group


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups -> {"group.field": value}, tuples as lists (as JSON gives them back)."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten_settings(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
