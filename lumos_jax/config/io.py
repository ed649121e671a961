"""Settings in and out: ConfigDict (what a user edits) <-> frozen dataclasses <-> config.json; what a resume may change."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lumos_jax import config, fileio, tasks
from lumos_jax.config import fields as config_fields
from lumos_jax.config import migration

if TYPE_CHECKING:
    import ml_collections


def to_dict(settings: config.Settings) -> dict[str, Any]:
    """The settings as nested dicts of plain values; `from_dict` is its inverse."""
    return dataclasses.asdict(settings)


def from_dict(tree: Mapping[str, Any]) -> config.Settings:
    """Builds and validates config.Settings from nested mappings.

    Raises:
      ValueError: an unknown field (with the nearest known ones), a value of the wrong type, or an impossible combination.
    """
    settings = config_fields.build(config.Settings, tree, "config", _group, _advice)
    config.validate(settings)
    return settings


def from_saved(tree: Mapping[str, Any]) -> config.Settings:
    """The same for settings that any version saved, in config.json, a checkpoint or an export."""
    return from_dict(migration.upgrade(tree) if isinstance(tree, Mapping) else tree)


def default_config(task: str = "") -> ml_collections.ConfigDict:
    """Every field with its default, for a file in configs/ to edit; `task`: whose settings are the group `task`."""
    import ml_collections  # only what a user edits needs it

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
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"no config.json at {path}: is this the --workdir of a run that has started? `lumos_jax.convert import` makes a "
            "run directory of released weights"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from the run's command line") from None
    return from_saved(tree)


# Fields that may change when a run is resumed: none of them alters a parameter, the noise or the order of the records.
# `train.steps` may too, unless the learning rate decays towards it.
_FREE_GROUPS = ("mesh", "checkpoint", "log", "eval")
_FREE_FIELDS = frozenset(
    {
        "data.path", "data.workers", "data.max_corrupt_rate", "data.max_failed_shards", "init_from", "optimizer.ema_memory",
        "encoder.weights", "autoencoder.weights", "align.encoder.weights", "train.profile_at",
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


def _group(hint: type, value: Any) -> type:
    """The class of a group: the settings of a task are of the task's own class."""
    if hint is config.Task and isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return tasks.task_class(value["name"]).settings_class
    return hint


def _advice(name: str) -> str | None:
    return migration.advice(name.removeprefix("config."))
