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
    "optimizer.ema_dtype": "optimizer.state_dtype",
    "optimizer.moments_dtype": "optimizer.state_dtype",
    "data.buckets.enabled": "data.aspect_ratios",
    "data.buckets.ratios": "data.aspect_ratios",
    "encoder.patch_size": "encoder.size",
    "encoder.dtype": "model.dtype",
    "autoencoder.kind": "autoencoder.weights",
    "autoencoder.dtype": "model.dtype",
    "eval.rows": "eval.sheet",
    "eval.samples": "eval.sheet",
    "task.hidden": "task.head",
    "task.bottleneck": "task.head",
    "task.prototypes": "task.head",
}

# Fields that are gone -> the only value that this version can continue, and what there is instead. None: any value, because it
# never changed what is learned.
_GONE: dict[str, tuple[Any, str]] = {
    "model.mlp_ratio": (4.0, "it is 4"),
    "model.position_base": (0, "positions are counted from the grid's own size"),
    "model.mlp_products": ("none", "matmuls are XLA's"),
    "model.position_scale": (lambda flat: max(1.0, flat["data.image_size"] / 512), "it follows from data.image_size"),
    "model.scan_unroll": (None, "it follows from the devices"),
    "diffusion.steps": (1000, "it is 1000"),
    "diffusion.logit_std": (1.0, "it is 1"),
    "finetune.lora_alpha": (lambda flat: flat["finetune.lora_alpha"] and flat["finetune.lora_rank"], "it is the rank"),
    "eval.batch_size": (None, "it is train.batch_size / optimizer.accumulate"),
    "eval.knn_bank_size": (None, "the bank is what data.holdout has beside eval.num_examples"),
    "optimizer.b1": (0.9, "it is 0.9"),
    "task.noise_log_mean": (-3.0, "it is -3"),
    "task.noise_log_std": (0.5, "it is 0.5"),
    "task.student_temperature": (0.1, "it is 0.1"),
    "task.centre_momentum": (0.9, "it is 0.9"),
    "task.dropout": ([0.05, 0.10, 0.15], "see lumos_jax/tasks/nvs.py"),
    "task.min_guidance_scale": (1.0, "it is 1, and eval.guidance at the last frame"),
    "task.noise_aug_strength": (0.02, "it is 0.02"),
    "task.fps": (None, "give `lumos_jax.sample --fps`"),
    "task.motion_bucket_id": (None, "give `lumos_jax.sample --motion`"),
    "task.local_size": (lambda flat: _local_size(flat), "it is 3/7 of encoder.image_size, in whole patches"),
    "data.buckets.step": (
        lambda flat: flat["data.buckets.step"] and max(flat["data.image_size"] // 16, 4),
        "it is image_size / 16",
    ),
    "mesh.tensor": (1, "fsdp shards parameters"),
    "mesh.data": (None, "it takes the devices that fsdp and context leave"),
    "data.prefetch": (None, "it is 4"),
    "data.threads": (None, "it follows from data.workers"),
    "data.index_dir": (None, "set the environment variable LUMOS_JAX_CACHE"),
    "data.bucket_index": (None, "set the environment variable LUMOS_JAX_CACHE"),
    "data.tar_index": (None, "set the environment variable LUMOS_JAX_CACHE"),
    "diffusion.learned_variance": (None, "it follows from diffusion.loss"),
    "encoder.resize": (lambda flat: flat["encoder.image_size"], "it is encoder.image_size"),
    "encoder.heads": (0, "import the weights with `lumos_jax.convert import --heads`"),
    "autoencoder.posterior": ("sample", "it is sampled"),
    "autoencoder.tile": (None, "images above 1448 pixels a side are decoded in tiles"),
    "autoencoder.channels": ([128, 256, 512, 512], "random weights have Stable Diffusion's shape"),
    "autoencoder.layers": (2, "random weights have Stable Diffusion's shape"),
    "autoencoder.groups": (32, "random weights have Stable Diffusion's shape"),
    "encoder.vocabulary": (None, "it follows from the tokenizer"),
    "train.compilation_cache": (None, "set the environment variable JAX_COMPILATION_CACHE_DIR or LUMOS_JAX_CACHE"),
    "train.watchdog_minutes": (None, "it is 30"),
    "train.nonfinite_limit": (None, "it is 10"),
    "train.profile_steps": (None, "it is 5"),
    "train.meeting_seconds": (None, "JAX's own service does it"),
    "train.silence_seconds": (None, "JAX's own service does it"),
    "checkpoint.retries": (None, "it is 4"),
    "log.tensorboard": (None, "events are always written"),
}

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
    for name in _GONE.keys() & new.keys():
        continued, instead = _GONE[name]
        expected = continued(new) if callable(continued) else continued
        value = list(new[name]) if isinstance(new[name], tuple) else new[name]
        if expected is not None and value != expected:
            raise ValueError(
                f"config.{name}={value!r} of these settings is gone ({instead}): only runs with {expected!r} can be continued"
            )
    new = {name: value for name, value in new.items() if name not in _GONE}
    if "optimizer.boosted" in new:
        patterns, factor = new.pop("optimizer.boosted"), new.pop("optimizer.boost", 1.0)
        new["optimizer.lr_multipliers"] = tuple((pattern, factor) for pattern in patterns)
    if "optimizer.ema_dtype" in new:
        new["optimizer.state_dtype"] = _same(new, "optimizer.ema_dtype", "optimizer.moments_dtype")
    if "data.buckets.enabled" in new:
        ratios = new.pop("data.buckets.ratios")
        new["data.aspect_ratios"] = ratios if new.pop("data.buckets.enabled") else (1.0, 1.0)
    if "eval.rows" in new:
        new["eval.sheet"] = (new.pop("eval.rows"), new.pop("eval.samples"))
    if "task.prototypes" in new:
        new["task.head"] = tuple(new.pop(f"task.{name}") for name in ("hidden", "bottleneck", "prototypes"))
    if "data.mixture" in new:
        new["data.mixture"] = tuple(_upgrade_entry(entry) for entry in new["data.mixture"])
    _join_frozen(new)
    return new


def _same(flat: dict[str, Any], *names: str) -> Any:
    """The value of fields that are one now, which they leave."""
    values = {name: flat.pop(name) for name in names if name in flat}
    if len(set(values.values())) > 1:
        raise ValueError(f"{values} of these settings differ, and are one field now: they cannot be continued")
    return next(iter(values.values()))


def _join_size(flat: dict[str, Any], group: str) -> None:
    """Width, depth and heads of size=custom become the size; `heads` of an encoder's weights is checked like what is gone."""
    sizes = [flat.pop(f"{group}.{name}") for name in ("width", "depth")] + [flat.pop(f"{group}.heads")]
    if flat[f"{group}.size"] == "custom":
        flat[f"{group}.size"] = "x".join(map(str, sizes))
    elif group == "encoder":
        flat[f"{group}.heads"] = sizes[2]


def _join_frozen(flat: dict[str, Any]) -> None:
    """Settings of the frozen networks that are part of others now."""
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


def _local_size(flat: Mapping[str, Any]) -> int:
    patch = flat["encoder.patch_size"]
    return max(1, round(flat["encoder.image_size"] * 3 / 7 / patch)) * patch


def advice(old: str) -> str | None:
    """What became of a field that was renamed, joined with others or removed; None of others."""
    group, _, field = old.partition(".")
    moved = f"task.{field}" if group in _TASK_GROUPS else old
    found = _JOINED.get(moved) or RENAMED.get(moved, moved)
    if found in _GONE:
        return f"this field is gone: {_GONE[found][1]}"
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
