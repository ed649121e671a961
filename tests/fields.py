"""Settings with fields replaced, named as `group__field`."""

from collections.abc import Mapping
from typing import Any

from lumos_jax import config


def put(tree: Any, fields: Mapping[str, Any]) -> None:
    """Sets fields of a ConfigDict or of nested dicts."""
    for name, value in fields.items():
        *groups, field = name.split("__")
        inner = tree
        for group in groups:
            inner = inner[group]
        inner[field] = value


def replace(group: Any, **fields: Any) -> Any:
    """A copy of a group of settings; fields of its sub-groups are named as `group__field`."""
    return config.replace(group, {name.replace("__", "."): value for name, value in fields.items()})


def data_settings(**fields: Any) -> config.Data:
    """config.Data with fields replaced."""
    return replace(config.Data(), **fields)
