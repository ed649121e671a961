"""Earlier layouts of the settings, brought to today's: old config.json files, the settings in checkpoints, exports and caches.

One place for resume, hand-off, sample, export and plan, through `io.from_saved`. A field that is gone can be migrated only
while it has the value that this version computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lumos_jax.config.fields import flatten_settings

# Groups that are gone -> the task whose settings they held, which is the group `task` now.
_TASK_GROUPS = {"video": "i2v", "dino": "dino", "nvs": "nvs"}

# Old name -> new name.
RENAMED = {
    "data.record": "data.sample_type", "data.records": "data.scenes.num_scenes",
    "data.view_turn": "data.scenes.max_view_angle", "data.name": "data.tfds.name", "data.split": "data.tfds.split",
    "data.detailed": "data.captions.detailed_caption_prob", "data.clean_captions": "data.captions.clean",
    "data.caption_noise": "data.captions.noise", "data.buckets": "data.buckets.enabled",
    "data.bucket_step": "data.buckets.step", "data.bucket_ratios": "data.buckets.ratios",
    "data.frames": "data.clips.frames", "data.frame_stride": "data.clips.frame_stride",
    "data.picture_share": "data.clips.image_step_fraction", "data.classes": "data.num_classes",
    "autoencoder.scale": "autoencoder.scaling_factor", "model.unroll": "model.scan_unroll",
    "task.first_guidance": "task.min_guidance_scale", "task.sample_noise": "task.noise_aug_strength",
    "task.sample_motion": "task.motion_bucket_id", "task.sample_fps": "task.fps", "task.local_side": "task.local_size",
    "finetune.lora_layers": "finetune.lora_targets", "eval.records": "eval.num_examples",
    "eval.scored": "eval.num_scored", "eval.bank": "eval.knn_bank_size",
}  # fmt: skip

# New name -> the old fields that are part of it now; see `_join`.
_JOINED = {
    "data.aspect_ratios": ("data.buckets.enabled", "data.buckets.ratios"),
    "encoder.size": ("encoder.width", "encoder.depth", "encoder.patch_size"),
    "autoencoder.weights": ("autoencoder.kind",),
    "model.size": ("model.width", "model.depth", "model.heads"),
    "model.dtype": ("encoder.dtype", "autoencoder.dtype"),
    "task.head": ("task.hidden", "task.bottleneck", "task.prototypes"),
    "optimizer.lr_multipliers": ("optimizer.boosted", "optimizer.boost"),
    "optimizer.state_dtype": ("optimizer.ema_dtype", "optimizer.moments_dtype"),
    "eval.sheet": ("eval.rows", "eval.samples"),
}

# Fields that are constants now -> their value.
_CONSTANT: Mapping[str, Any] = {
    "autoencoder.posterior": "sample", "autoencoder.channels": [128, 256, 512, 512], "autoencoder.layers": 2,
    "autoencoder.groups": 32, "model.mlp_ratio": 4.0, "model.position_base": 0, "model.mlp_products": "none",
    "diffusion.steps": 1000, "diffusion.logit_std": 1.0, "optimizer.b1": 0.9, "mesh.tensor": 1,
    "task.noise_log_mean": -3.0, "task.noise_log_std": 0.5, "task.min_guidance_scale": 1.0, "task.noise_aug_strength": 0.02,
    "task.student_temperature": 0.1, "task.centre_momentum": 0.9, "task.dropout": [0.05, 0.10, 0.15],
}  # fmt: skip


def _local_size(flat: Mapping[str, Any]) -> int:
    patch = flat["encoder.patch_size"]
    return max(1, round(flat["encoder.image_size"] * 3 / 7 / patch)) * patch


# Fields that follow from others -> from which, and their value.
_DERIVED: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "encoder.resize": ("it is encoder.image_size", lambda flat: flat["encoder.image_size"]),
    "encoder.heads": ("import the weights with `lumos_jax.convert import --heads`", lambda flat: 0),
    "model.position_scale": ("it follows from data.image_size", lambda flat: max(1.0, flat["data.image_size"] / 512)),
    "data.buckets.step": (
        "it is data.image_size / 16", lambda flat: flat["data.buckets.step"] and max(flat["data.image_size"] // 16, 4)
    ),
    "task.local_size": ("it is 3/7 of encoder.image_size, in whole patches", _local_size),
    "finetune.lora_alpha": (
        "it is finetune.lora_rank", lambda flat: flat["finetune.lora_alpha"] and flat["finetune.lora_rank"]
    ),
}  # fmt: skip

# What there is in place of fields that never changed what is learned -> these fields.
_FREE = {
    "it is constant": (
        "data.prefetch", "train.watchdog_minutes", "train.nonfinite_limit", "train.profile_steps", "train.meeting_seconds",
        "train.silence_seconds", "checkpoint.retries",
    ),
    "the environment variable LUMOS_JAX_CACHE names the directory": (
        "data.index_dir", "data.bucket_index", "data.tar_index", "train.compilation_cache"
    ),
    "it follows from data.workers": ("data.threads",),
    "it follows from the tokenizer": ("encoder.vocabulary",),
    "it follows from diffusion.loss": ("diffusion.learned_variance",),
    "it follows from the devices": ("model.scan_unroll",),
    "large images are decoded in tiles": ("autoencoder.tile",),
    "give `lumos_jax.sample --fps`": ("task.fps",),
    "give `lumos_jax.sample --motion`": ("task.motion_bucket_id",),
    "it is train.batch_size / optimizer.accumulate": ("eval.batch_size",),
    "it is what data.holdout has beside eval.num_examples": ("eval.knn_bank_size",),
    "it takes the devices that mesh.fsdp and mesh.context leave": ("mesh.data",),
    "events are always written": ("log.tensorboard",),
}  # fmt: skip

# Field that is gone -> what there is instead.
_GONE = (
    {name: f"it is {value!r}" for name, value in _CONSTANT.items()}
    | {name: instead for name, (instead, _) in _DERIVED.items()}
    | {name: instead for instead, names in _FREE.items() for name in names}
)

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
    new = {RENAMED.get(name, name): value for name, value in _of_the_task(flat).items()}
    for name, values in _VALUES.items():
        if name in new and isinstance(new[name], (str, bool)):
            new[name] = values.get(new[name], new[name])
    for group in ("model", "encoder"):
        if f"{group}.width" in new:
            _join_size(new, group)
    for name in (_CONSTANT.keys() | _DERIVED.keys()) & new.keys():
        expected = _CONSTANT[name] if name in _CONSTANT else _DERIVED[name][1](new)
        if (list(new[name]) if isinstance(new[name], tuple) else new[name]) != expected:
            raise ValueError(
                f"config.{name}={new[name]!r} of these settings is gone ({_GONE[name]}): only runs with {expected!r} can be "
                "continued"
            )
    return _join({name: value for name, value in new.items() if name not in _GONE})


def _join_size(flat: dict[str, Any], group: str) -> None:
    """Width, depth and heads of size=custom become the size; `heads` of an encoder's weights is checked like what is gone."""
    sizes = [flat.pop(f"{group}.{name}") for name in ("width", "depth", "heads")]
    if flat[f"{group}.size"] == "custom":
        flat[f"{group}.size"] = "x".join(map(str, sizes))
    elif group == "encoder":
        flat[f"{group}.heads"] = sizes[2]


def _join(flat: dict[str, Any]) -> dict[str, Any]:
    """Fields that are part of others leave for those."""
    if "optimizer.boosted" in flat:
        patterns, factor = flat.pop("optimizer.boosted"), flat.pop("optimizer.boost", 1.0)
        flat["optimizer.lr_multipliers"] = tuple((pattern, factor) for pattern in patterns)
    if "optimizer.ema_dtype" in flat:
        flat["optimizer.state_dtype"] = _same(flat, "optimizer.ema_dtype", "optimizer.moments_dtype")
    if "data.buckets.enabled" in flat:
        ratios = flat.pop("data.buckets.ratios")
        flat["data.aspect_ratios"] = ratios if flat.pop("data.buckets.enabled") else (1.0, 1.0)
    for new, old in (("eval.sheet", _JOINED["eval.sheet"]), ("task.head", _JOINED["task.head"])):
        if old[0] in flat:
            flat[new] = tuple(flat.pop(name) for name in old)
    if "data.mixture" in flat:
        flat["data.mixture"] = tuple(
            {{"records": "num_scenes"}.get(name, name): value for name, value in entry.items()}
            for entry in flat["data.mixture"]
        )
    patch = flat.pop("encoder.patch_size", 16)
    if patch != 16 and flat["encoder.kind"] == "vit":
        flat["encoder.size"] += f"/{patch}"
    if flat.pop("autoencoder.kind", "kl") == "identity":
        flat["autoencoder.weights"] = "identity"
    trained = flat.get("task.name") == "dino"  # has no frozen network, and computes in float32
    if trained or flat.get("autoencoder.weights") == "identity":
        flat.pop("autoencoder.dtype", None)
    if trained:
        flat.pop("encoder.dtype", None)
    if "encoder.dtype" in flat or "autoencoder.dtype" in flat:
        flat["model.dtype"] = _same(flat, "model.dtype", "encoder.dtype", "autoencoder.dtype")
    return flat


def _same(flat: dict[str, Any], *names: str) -> Any:
    """The one value of these fields, which leave."""
    values = {f"config.{name}": flat.pop(name) for name in names if name in flat}
    if len(set(values.values())) > 1:
        raise ValueError(f"{values} of these settings differ, and are one field now: they cannot be continued")
    return next(iter(values.values()))


def advice(old: str) -> str | None:
    """What became of a field that was renamed, joined with others or removed; None of others."""
    group, _, field = old.partition(".")
    moved = f"task.{field}" if group in _TASK_GROUPS else old
    found = RENAMED.get(moved, moved)
    found = next((new for new, names in _JOINED.items() if found in names), found)
    if found in _GONE:
        return f"this field is gone: {_GONE[found]}"
    return f"this field is config.{found} now" if found != old else None


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
