"""Which settings and frozen networks a cache of features depends on; training checks them against the config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lumos_jax import config, tasks
from lumos_jax.config import migration
from lumos_jax.data.sources import cached

# Fields of frozen networks that do not change the content of a cache: where weights are (their content is compared instead),
# and what applies when a record is read, or to samples only.
_FREE = {"encoder.weights", "autoencoder.weights", "autoencoder.scaling_factor"}


def made_by(settings: config.Settings, task: tasks.Task) -> dict[str, Any]:
    """The settings and frozen networks that decide the content of a cache, as "group.field" -> value."""
    found: dict[str, Any] = {"data.image_size": settings.data.image_size}
    for group, identity in task.identity.items():
        if group == "align":  # its targets are not cached
            continue
        found[f"{group}.identity"] = identity
        if identity == "identity":  # a map without parameters
            continue
        found["model.dtype"] = settings.model.dtype
        fields = config.flatten_settings({group: dataclasses.asdict(getattr(settings, group))})
        found |= {name: value for name, value in fields.items() if name not in _FREE}
    kind = settings.data.sample_type
    found |= {"data.sample_type": kind} if kind != "image" else {}
    found |= {"data.captions.clean": settings.data.captions.clean} if kind == "captioned" else {}
    return found | ({"data.num_classes": settings.data.num_classes} if kind == "labeled" else {})


def check(settings: config.Settings, task: tasks.Task) -> None:
    """Raises ValueError unless the cache at config.data.path was made by the networks that the config names."""
    changed = differences(cached.read_manifest(settings.data.path).made_by, made_by(settings, task))
    if changed:
        raise ValueError(
            f"config.data.path={settings.data.path!r} was cached with other networks than the config names:\n{changed}\n"
            "Set them back, or make another cache"
        )


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A line for each field of `now` that a cache has another value of."""
    there = migration.upgrade_flat(there)  # saved by settings whose names may have changed since
    names = [name for name in now if there.get(name) != now[name]]
    return "\n".join(f"  config.{name}: {there.get(name)!r} in the cache, {now[name]!r} now" for name in names)
