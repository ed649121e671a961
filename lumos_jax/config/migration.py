"""Earlier layouts of the settings, brought to today's: old config.json files, the settings in checkpoints, exports and caches.

One place for resume, hand-off, sample, export and plan, through `io.from_saved`. A field that is gone can be migrated only
while it has its old default: what another value did, this version does not do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumos_jax.config.fields import flatten_settings

# Groups that are gone -> the task whose settings they held, which is the group `task` now.
_TASK_GROUPS = {"video": "i2v", "dino": "dino", "nvs": "nvs"}

# Old name -> new name.
RENAMED = {
    "data.record": "data.sample_type",
    "data.records": "data.scenes.num_scenes",
    "data.view_turn": "data.scenes.max_view_angle",
    "data.name": "data.tfds.name",
    "data.split": "data.tfds.split",
    "data.detailed": "data.captions.detailed_caption_prob",
    "data.clean_captions": "data.captions.clean",
    "data.caption_noise": "data.captions.noise",
    "data.buckets": "data.buckets.enabled",
    "data.bucket_step": "data.buckets.step",
    "data.bucket_ratios": "data.buckets.ratios",
    "data.frames": "data.clips.frames",
    "data.frame_stride": "data.clips.frame_stride",
    "data.picture_share": "data.clips.image_step_fraction",
    "data.classes": "data.num_classes",
    "autoencoder.scale": "autoencoder.scaling_factor",
    "model.unroll": "model.scan_unroll",
    "task.first_guidance": "task.min_guidance_scale",
    "task.sample_noise": "task.noise_aug_strength",
    "task.sample_motion": "task.motion_bucket_id",
    "task.sample_fps": "task.fps",
    "task.local_side": "task.local_size",
    "finetune.lora_layers": "finetune.lora_targets",
    "eval.records": "eval.num_examples",
    "eval.scored": "eval.num_scored",
    "eval.bank": "eval.knn_bank_size",
}

# Old names of which several are one field now -> that field.
_JOINED = {
    "model.width": "model.size",
    "model.depth": "model.size",
    "model.heads": "model.size",
    "encoder.width": "encoder.size",
    "encoder.depth": "encoder.size",
    "optimizer.boosted": "optimizer.lr_multipliers",
    "optimizer.boost": "optimizer.lr_multipliers",
    "task.hidden": "task.head",
    "task.bottleneck": "task.head",
    "task.prototypes": "task.head",
}

# Fields that are gone -> the only value that this version can continue, their old default.
_DELETED = {
    "model.mlp_ratio": 4.0,
    "model.position_base": 0,
    "model.mlp_products": "none",
    "optimizer.b1": 0.9,
    "task.noise_log_mean": -3.0,
    "task.noise_log_std": 0.5,
    "task.student_temperature": 0.1,
    "task.centre_momentum": 0.9,
    "task.dropout": [0.05, 0.10, 0.15],
    "mesh.tensor": 1,
}

# Fields that are gone and did not change what is learned, or follow from others.
_DROPPED = frozenset(
    (
        "data.prefetch", "data.bucket_index", "data.tar_index", "diffusion.learned_variance", "encoder.vocabulary",
        "train.nonfinite_limit", "train.profile_steps", "train.meeting_seconds", "train.silence_seconds", "checkpoint.retries",
    )
)  # fmt: skip

# Today's name -> old value -> new value.
_VALUES = {
    "data.sample_type": {"labelled": "labeled"},
    "encoder.normalize": {True: "unit", False: "none"},
    "task.camera": {"turned": "bilinear"},
    "task.balance": {"centre": "center"},
}


def upgrade(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings of any earlier layout -> today's; those of today are unchanged."""
    return unflatten(upgrade_flat(flatten_settings(tree)))


def upgrade_flat(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The same for {"group.field": value}, of which some may be absent and others no settings.

    Raises:
      ValueError: a field that is gone has a value that this version cannot continue; names it.
    """
    flat = _of_the_task(flat)
    new = {RENAMED.get(name, name): value for name, value in flat.items() if name not in _DROPPED}
    for name, default in _DELETED.items():
        value = new.pop(name, default)
        if (list(value) if isinstance(value, tuple) else value) != default:
            raise ValueError(
                f"config.{name}={value!r} of these settings is gone: only runs with {default!r} can be continued"
            )
    for name, values in _VALUES.items():
        if name in new and isinstance(new[name], (str, bool)):
            new[name] = values.get(new[name], new[name])
    if "optimizer.boosted" in new:
        patterns, factor = new.pop("optimizer.boosted"), new.pop("optimizer.boost", 1.0)
        new["optimizer.lr_multipliers"] = tuple((pattern, factor) for pattern in patterns)
    for group in ("model", "encoder"):
        if f"{group}.width" in new:
            _join_size(new, group)
    if "task.prototypes" in new:
        new["task.head"] = tuple(new.pop(f"task.{name}") for name in ("hidden", "bottleneck", "prototypes"))
    if "data.mixture" in new:
        new["data.mixture"] = tuple(_upgrade_entry(entry) for entry in new["data.mixture"])
    return new


def _join_size(flat: dict[str, Any], group: str) -> None:
    """Width, depth and heads of size=custom become the size; `heads` of an encoder's weights stays a field."""
    sizes = [flat.pop(f"{group}.{name}") for name in ("width", "depth")] + [flat.pop(f"{group}.heads")]
    if flat[f"{group}.size"] == "custom":
        flat[f"{group}.size"] = "x".join(map(str, sizes))
    elif group == "encoder":
        flat[f"{group}.heads"] = sizes[2]


def new_name(old: str) -> str | None:
    """Today's name of a field that was renamed or joined with others; None of others."""
    group, _, field = old.partition(".")
    moved = f"task.{field}" if group in _TASK_GROUPS else old
    found = _JOINED.get(moved) or RENAMED.get(moved, moved)
    return found if found != old else None


def _of_the_task(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of single tasks become the group `task`; those of other tasks had no use."""
    moved = {}
    for name, value in flat.items():
        group, _, field = name.partition(".")
        if group not in _TASK_GROUPS:
            moved[name] = value
        elif _TASK_GROUPS[group] == flat.get("task.name"):
            moved[f"task.{field}"] = value
    return moved


def _upgrade_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {{"records": "num_scenes"}.get(name, name): value for name, value in entry.items()}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"group.field": value} -> nested groups."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, field = name.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[field] = value
    return tree
