"""Settings in and out: ConfigDict (what a user edits) <-> frozen dataclasses <-> config.json; what a resume may change."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from lumos_jax import config, fileio, tasks
from lumos_jax.config import fields as config_fields
from lumos_jax.config import migration


def to_dict(settings: config.Settings) -> dict[str, Any]:
    """The settings as nested dicts of plain values; `from_dict` is its inverse."""
    return dataclasses.asdict(settings)


def from_dict(tree: Mapping[str, Any]) -> config.Settings:
    """Builds and validates config.Settings from nested mappings.

    Raises:
      ValueError: an unknown field (with the nearest known ones), a value of the wrong type, or an impossible combination.
    """
    settings = _build(config.Settings, tree, "config")
    config.validate(settings)
    return settings


def from_saved(tree: Mapping[str, Any]) -> config.Settings:
    """The same for settings that any version saved, in config.json, a checkpoint or an export."""
    return from_dict(migration.upgrade(tree) if isinstance(tree, Mapping) else tree)


def default_config(task: str = "") -> ml_collections.ConfigDict:
    """Every field with its default, for a file in configs/ to edit; `task`: whose settings are the group `task`."""
    settings = config.Settings()
    if task:
        settings = dataclasses.replace(settings, task=tasks.task_class(task).settings_class(name=task))
    return ml_collections.ConfigDict(to_dict(settings), convert_dict=True)


def resolve(config_dict: ml_collections.ConfigDict) -> config.Settings:
    """ConfigDict (as the command line left it) -> validated config.Settings. Raises ValueError as `from_dict` does."""
    return from_dict(config_dict.to_dict())


def save(settings: config.Settings, path) -> None:
    """Writes config.json."""
    fileio.save_json(to_dict(settings), path)


def load(path) -> config.Settings:
    """Reads a config.json written by `save`.

    Raises:
      ValueError: the file is absent, is not JSON, or names fields that this version does not know.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = json.load(file)
    except FileNotFoundError:
        raise ValueError(f"no config.json at {path}: is this the --workdir of a run that has started?") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from the run's command line") from None
    return from_saved(tree)


# Fields that may change when a run is resumed: none of them alters a parameter, the noise or the order of the records.
# `train.steps` may too, unless the learning rate decays towards it.
_FREE_GROUPS = ("mesh", "checkpoint", "log", "eval")
_FREE_FIELDS = frozenset(
    {
        "data.path", "data.workers", "data.max_corrupt_rate", "init_from", "optimizer.ema_memory",
        "encoder.weights", "autoencoder.weights", "train.profile_at",
    }
)  # fmt: skip


def frozen_differences(old: config.Settings, new: config.Settings) -> dict[str, tuple[Any, Any]]:
    """The differences that would break an exact resume (invariant 3), without those in `checkpoint.allow_change`.

    Paths and weight names may change (a data set moves); what they hold may not, and is compared by fingerprint instead.
    """
    before, after = (config.flatten_settings(to_dict(settings)) for settings in (old, new))
    free = {"train.steps"} if new.optimizer.decay == "constant" else set()
    free |= _FREE_FIELDS | set(new.checkpoint.allow_change)
    pairs = {name: (before.get(name), after.get(name)) for name in before | after}  # tasks differ in their fields
    return {
        name: (then, now)
        for name, (then, now) in pairs.items()
        if then != now and name not in free and name.partition(".")[0] not in _FREE_GROUPS
    }


def _build(cls, tree: Mapping[str, Any], where: str):
    """One dataclass from one mapping; absent fields take their defaults."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where} must be a group of fields, not {tree!r}")
    fields, values = config_fields.fields(cls), {}
    for name, value in tree.items():
        if name not in fields:
            raise ValueError(f"unknown field {where}.{name}; {_suggest(f'{where}.{name}', fields)}")
        hint, here = fields[name].type, f"{where}.{name}"
        if hint is config.Task and isinstance(value, Mapping) and isinstance(value.get("name"), str):
            hint = tasks.task_class(value["name"]).settings_class
        values[name] = _build(hint, value, here) if dataclasses.is_dataclass(hint) else _coerce(hint, value, here)
    return cls(**values)


def _suggest(name: str, fields: Mapping[str, Any]) -> str:
    if known := migration.advice(name.removeprefix("config.")):
        return known
    near = difflib.get_close_matches(name.rpartition(".")[2], fields, n=3) or sorted(fields)
    return f"did you mean {' or '.join(near)}?"


def _coerce(hint, value, where: str):
    """Checks a leaf's type; lists (JSON has no tuples) become tuples and whole numbers may stand for floats."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a tuple, not {value!r}")
        kinds = typing.get_args(hint)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(value) != len(kinds):
            raise ValueError(f"{where} must have {len(kinds)} values, not {len(value)}: {value!r}")
        entries = enumerate(zip(kinds, value, strict=True))
        return tuple(_coerce(kind, entry, f"{where}[{i}]") for i, (kind, entry) in entries)
    kind = typing.get_origin(hint) or hint  # Mapping: an entry of data.mixture
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} must be of type {kind.__name__}, not {value!r}")
    return float(value) if kind is float else dict(value) if kind is Mapping else value
