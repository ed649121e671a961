"""What stands beside a field of the settings: its rule and its meaning, as `Annotated[int, at_least(1), "meaning"]`.

Values are checked, and documented, from these annotations alone; choices are Literals. Rules between the fields of a group are
its method `check`: what is wrong, as a message -> whether it is.
"""

from __future__ import annotations

import dataclasses
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
        elif field.choices and value not in field.choices:
            raise ValueError(f"{where}.{name}={value!r} is not one of {', '.join(map(str, field.choices))}")
        elif broken := [rule.text for rule in field.rules if not rule.allows(value)]:
            raise ValueError(f"{where}.{name}={value!r} must be {broken[0]}")
    wrong = [message for message, wrong in getattr(group, "check", dict)().items() if wrong]
    if wrong:
        raise ValueError(wrong[0])


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
