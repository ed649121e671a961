# ruff: noqa: E501
"""Every rule that settings obey: allowed values, ranges, and rules between fields. `validate` runs before anything is compiled.

Beside `config`, which names the fields, and like it importing no room.
"""

from __future__ import annotations

import dataclasses

from lumos_jax.config.settings import TEXT_KINDS, Data, Encoder, Finetune, Settings, flatten
from lumos_jax.data import aspect

ENCODER_OUTPUTS = {"vit": ("cls", "patch", "all", "pooled"), "t5": ("all",), "clip_text": ("all", "pooled")}

_CHOICES = {
    "data.source": ("scenes", "folder", "videos", "objaverse", "arrayrecord", "tfds", "cached", "mixture"),
    "data.sample_type": ("image", "captioned", "labeled", "clip", "views"),
    "data.crop": ("center", "random"),
    "nvs.camera": ("token", "bilinear"),
    "encoder.kind": ("vit", *TEXT_KINDS),
    "encoder.output": ("cls", "patch", "all", "pooled"),
    "encoder.normalize": ("none", "unit", "standard", "white"),
    "encoder.interpolation": ("bilinear", "bicubic"),
    "encoder.size": ("Ti", "S", "B", "L", "custom"),
    "encoder.dtype": ("float32", "bfloat16"),
    "autoencoder.kind": ("kl", "identity"),
    "autoencoder.posterior": ("sample", "mode"),
    "autoencoder.dtype": ("float32", "bfloat16"),
    "model.size": ("S", "B", "L", "XL", "custom"),
    "model.final": ("auto", "table", "adaln"),
    "model.activation": ("gelu_tanh", "gelu"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "mlp", "full"),
    "dino.balance": ("center", "sinkhorn"),
    "diffusion.schedule": ("linear", "cosine", "flow"),
    "diffusion.prediction": ("noise", "x0", "v", "flow"),
    "diffusion.loss": ("hybrid", "simple"),
    "diffusion.timesteps": ("uniform", "logit_normal"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.decay": ("constant", "cosine"),
    "optimizer.ema_dtype": ("float32", "bfloat16"),
    "optimizer.moments_dtype": ("float32", "bfloat16"),
    "optimizer.ema_memory": ("device", "host"),
    "eval.sampler": ("ddpm", "ddim", "dpm++", "euler", "heun"),
}

# Smallest value allowed, for the fields where zero or less would only fail later, and less clearly.
_AT_LEAST = {
    "data.image_size": 1, "data.frames": 1, "data.num_scenes": 1, "data.classes": 0,
    "data.holdout": 0, "data.workers": 0, "data.threads": 1, "data.prefetch": 1,
    "data.max_corrupt_rate": 0, "data.view_turn": 0, "data.detailed_caption_prob": 0, "data.caption_noise": 0, "data.bucket_step": 0,
    "encoder.image_size": 1, "encoder.patch_size": 1,
    "encoder.max_tokens": 1, "encoder.vocabulary": 0, "autoencoder.tile": 0,
    "autoencoder.layers": 1, "autoencoder.groups": 1, "model.patch_size": 1, "model.position_base": 0, "diffusion.steps": 1,
    "diffusion.min_snr_gamma": 0, "task.condition_dropout": 0, "optimizer.learning_rate": 0, "optimizer.warmup_steps": 0,
    "optimizer.clip_norm": 0, "optimizer.accumulate": 1, "optimizer.weight_decay": 0, "optimizer.ema_decay": 0,
    "model.scan_unroll": 0, "finetune.lora_rank": 0, "finetune.lora_alpha": 0,
    "data.image_step_fraction": 0, "video.min_guidance_scale": 0, "video.noise_log_std": 0, "video.noise_aug_strength": 0,
    "video.motion_bucket_id": 0,
    "dino.local_crops": 0, "dino.local_side": 1, "dino.jitter": 0, "dino.prototypes": 2, "dino.hidden": 1,
    "dino.bottleneck": 1, "dino.mask_weight": 0, "dino.pixel_weight": 0, "dino.center_momentum": 0, "eval.knn_bank_size": 0,
    "train.steps": 1, "train.batch_size": 1, "train.nonfinite_limit": 1,
    "train.watchdog_minutes": 0,
    "train.profile_steps": 1, "checkpoint.every": 1,
    "checkpoint.keep": 1, "checkpoint.keep_every": 0, "log.every": 1, "eval.every": 0, "eval.num_examples": 1, "eval.num_scored": 0,
    "eval.batch_size": 1, "eval.rows": 1, "eval.samples": 1, "eval.steps": 1, "eval.guidance": 0,
    "eval.guidance_rescale": 0,
}  # fmt: skip
_AT_MOST = {
    "data.max_corrupt_rate": 1, "data.view_turn": 180, "data.detailed_caption_prob": 1, "data.caption_noise": 1,
    "task.condition_dropout": 1, "optimizer.ema_decay": 1, "dino.jitter": 1,
    "dino.center_momentum": 1, "eval.guidance_rescale": 1, "video.motion_bucket_id": 255,
}  # fmt: skip


def _require(rule: bool, message: str) -> None:
    if not rule:
        raise ValueError(message)


def validate(settings: Settings) -> None:
    """Checks every value and every rule between fields.

    Raises:
      ValueError: names the field, its value and what is allowed.
    """
    flat = flatten(dataclasses.asdict(settings))
    for name, allowed in _CHOICES.items():
        _require(flat[name] in allowed, f"config.{name}={flat[name]!r} is not one of {', '.join(allowed)}")
    for name, least in _AT_LEAST.items():
        _require(flat[name] >= least, f"config.{name}={flat[name]} must be at least {least}")
    for name, most in _AT_MOST.items():
        _require(flat[name] <= most, f"config.{name}={flat[name]} must be at most {most}")
    for name in settings.checkpoint.allow_change:
        known = name in flat or name.endswith(".fingerprint")
        _require(known, f"config.checkpoint.allow_change names {name!r}, which is no field")
        kept = not name.startswith("finetune.")
        _require(kept, f"config.checkpoint.allow_change names {name!r}: what trains may change with init_from only")
        _require(
            name not in ("optimizer.ema_dtype", "optimizer.moments_dtype"),
            f"config.checkpoint.allow_change names {name!r}: a checkpoint holds that dtype; change it with init_from only",
        )
    _check_data(settings)
    _check_networks(settings)
    _check_diffusion(settings)
    _check_eval(settings)
    _check_train(settings)


def _check_data(s: Settings) -> None:
    data = s.data
    if data.source in ("folder", "videos", "objaverse", "arrayrecord", "webdataset", "cached"):
        _require(bool(data.path), f"config.data.source={data.source} needs config.data.path")
    _require(
        data.source != "cached" or (data.crop == "center" and not data.flip),
        f"config.data.crop={data.crop}, flip={data.flip} do not go with config.data.source=cached, which holds one centre crop "
        "of each picture, not mirrored: set config.data.crop=center and config.data.flip=False",
    )
    least, most = data.frame_stride
    _require(1 <= least <= most, f"config.data.frame_stride={data.frame_stride} must satisfy 1 <= least <= most")
    _require(s.video.motion_step > 0, f"config.video.motion_step={s.video.motion_step} must be above 0")
    _require(s.video.sample_fps > 0, f"config.video.sample_fps={s.video.sample_fps} must be above 0")
    _require(
        data.image_step_fraction == 0 or (data.sample_type == "clip" and data.image_step_fraction < 1),
        f"config.data.image_step_fraction={data.image_step_fraction} must be below 1, and 0 unless config.data.sample_type=clip",
    )
    _require(
        data.sample_type != "clip" or data.source in ("scenes", "videos", "mixture"),
        f"config.data.source={data.source} has no clips; config.data.sample_type=clip goes with scenes, videos and mixtures of them",
    )
    _require(
        data.sample_type != "views" or (data.crop == "center" and not data.flip),
        f"config.data.crop={data.crop}, flip={data.flip} do not go with config.data.sample_type=views, whose cameras say where the "
        "centre of a picture is and which side is left: set config.data.crop=center and config.data.flip=False",
    )
    _require(
        data.sample_type != "views" or data.source != "cached",
        "config.data.source=cached holds no pairs of views (config.data.sample_type=views), which are drawn anew in each epoch",
    )
    if data.source == "tfds":
        _require(bool(data.name), "config.data.source=tfds needs config.data.name, the name of a TFDS data set")
    _require(
        (data.source == "mixture") == bool(data.mixture),
        "config.data.mixture, a tuple of dicts (source, path, ..., weight), goes with config.data.source=mixture",
    )
    given = (data.detailed_caption_prob, data.clean_captions, data.caption_noise)
    _require(
        data.sample_type == "captioned" or given == (Data().detailed_caption_prob, False, 0),
        f"config.data.detailed_caption_prob, clean_captions, caption_noise={given} need config.data.sample_type=captioned",
    )
    _require(
        not data.buckets or (data.sample_type == "captioned" and data.crop == "center" and data.source != "cached"),
        f"config.data.buckets goes with sample_type=captioned and crop=center, and not with a cache, which holds squares; not with "
        f"sample_type={data.sample_type}, crop={data.crop}, source={data.source}",
    )
    _require(
        data.buckets or (data.bucket_step, data.bucket_ratios) == (Data().bucket_step, Data().bucket_ratios),
        "config.data.bucket_step and bucket_ratios need config.data.buckets=True",
    )
    if data.buckets:
        aspect.make_buckets(data.image_size, data.bucket_step, data.bucket_ratios)
    _require(
        (data.sample_type == "labeled") == (data.classes > 0),
        f"config.data.sample_type={data.sample_type} does not go with data.classes={data.classes}: labeled records need the number of "
        "classes, others have none",
    )
    if data.source == "scenes":
        _require(
            data.num_scenes < 2**32, f"config.data.num_scenes={data.num_scenes}: an epoch has fewer than 2^32 records"
        )


def _check_networks(s: Settings) -> None:
    for group, net in (("encoder", s.encoder), ("model", s.model)):
        here = f"config.{group}"
        if net.size == "custom":
            sizes = (net.width, net.depth, net.heads)
            _require(min(sizes) >= 1, f"{here}.size=custom needs {here}.width, depth and heads, not {sizes}")
            _require(net.width % net.heads == 0, f"{here}.width={net.width} is not divisible by heads={net.heads}")
            _require(net.width % 4 == 0, f"{here}.width={net.width}: sin-cos positions need a multiple of 4")
        else:
            fixed = net.width or net.depth or (net.heads and group == "model")
            _require(
                not fixed, f"{here}.size={net.size} fixes width, depth and heads; set {here}.size=custom to choose"
            )
    _check_encoder(s.encoder)
    for group, weights in (("encoder", s.encoder.weights), ("autoencoder", s.autoencoder.weights)):
        needed = group == "encoder" or s.autoencoder.kind != "identity"
        _require(
            bool(weights) or not needed,
            f"config.{group}.weights is empty: give a directory, a .safetensors file, a hub id or random:<seed>",
        )
        seed = weights.removeprefix("random:")
        _require(
            seed == weights or seed.isdecimal(),
            f"config.{group}.weights={weights!r}: write random:<seed> with a whole number, as random:0",
        )


def _check_encoder(enc: Encoder) -> None:
    random = enc.weights.startswith("random:")
    wrong = []
    if enc.output not in ENCODER_OUTPUTS[enc.kind]:
        wrong.append(f"config.encoder.output={enc.output} ({' or '.join(ENCODER_OUTPUTS[enc.kind])} allowed)")
    if enc.kind == "vit" and enc.tokenizer:
        wrong.append(f"config.encoder.tokenizer={enc.tokenizer!r} (images have none)")
    if enc.vocabulary and (enc.kind == "vit" or not random):
        wrong.append(f"config.encoder.vocabulary={enc.vocabulary} (only for text encoders of random weights)")
    if enc.kind in TEXT_KINDS and random and not enc.vocabulary:
        wrong.append("config.encoder.vocabulary=0 (random weights do not say how many token ids there are)")
    if enc.kind in TEXT_KINDS and random and not enc.tokenizer:
        wrong.append("config.encoder.tokenizer='' (random weights have none beside them; \"scenes\" comes with us)")
    _require(
        not wrong, f"config.encoder.kind={enc.kind} with weights={enc.weights} does not go with {'; '.join(wrong)}"
    )
    if enc.kind != "vit":
        return
    _require(
        enc.resize >= enc.image_size,
        f"config.encoder.resize={enc.resize} is smaller than the crop, encoder.image_size={enc.image_size}",
    )
    _require(
        not random or enc.image_size % enc.patch_size == 0,
        f"config.encoder.image_size={enc.image_size} is not divisible by encoder.patch_size={enc.patch_size}",
    )


def _check_diffusion(s: Settings) -> None:
    diffusion = s.diffusion
    flow = diffusion.schedule == "flow"
    _require(
        flow == (diffusion.prediction == "flow"),
        f"config.diffusion.schedule={diffusion.schedule} does not go with prediction={diffusion.prediction}: "
        "flow goes with flow; linear and cosine go with noise, x0 and v",
    )
    _require(
        diffusion.learned_variance == (diffusion.loss == "hybrid"),
        f"config.diffusion.learned_variance={diffusion.learned_variance} does not go with loss={diffusion.loss}: "
        "the hybrid loss is what trains the variance; set both or neither",
    )
    _require(
        not (flow and diffusion.learned_variance),
        "config.diffusion.learned_variance is for schedules linear and cosine",
    )
    _require(
        not (flow and diffusion.min_snr_gamma > 0), "config.diffusion.min_snr_gamma is for schedules linear and cosine"
    )
    _require(diffusion.logit_std > 0, f"config.diffusion.logit_std={diffusion.logit_std} must be above 0")
    _require(
        flow == (s.eval.sampler in ("euler", "heun")),
        f"config.eval.sampler={s.eval.sampler} does not solve diffusion.schedule={diffusion.schedule}: "
        "euler and heun are for flow; ddpm, ddim and dpm++ for linear and cosine",
    )
    _require(
        flow or s.eval.steps <= diffusion.steps,
        f"config.eval.steps={s.eval.steps} exceeds diffusion.steps={diffusion.steps}",
    )


def _check_eval(s: Settings) -> None:
    low, high = s.eval.guidance_interval
    _require(0 <= low <= high <= 1, f"config.eval.guidance_interval={(low, high)} must satisfy 0 <= low <= high <= 1")
    for name in ("global_scale", "local_scale"):
        least, most = getattr(s.dino, name)
        _require(0 < least <= most <= 1, f"config.dino.{name}={(least, most)} must satisfy 0 < least <= most <= 1")
    low, high = s.dino.mask_share
    _require(0 <= low <= high <= 1, f"config.dino.mask_share={(low, high)} must satisfy 0 <= least <= most <= 1")
    for name in ("student_temperature", "teacher_temperature"):
        _require(getattr(s.dino, name) > 0, f"config.dino.{name}={getattr(s.dino, name)} must be above 0")
    drop = s.nvs.dropout
    _require(
        0 <= drop[0] <= drop[1] <= drop[2] <= 1,
        f"config.nvs.dropout={drop} must rise within 0 and 1, as (0.05, 0.1, 0.15)",
    )
    if s.eval.every:
        _require(
            s.eval.knn_bank_size % s.eval.batch_size == 0,
            f"config.eval.knn_bank_size={s.eval.knn_bank_size} must be a multiple of eval.batch_size={s.eval.batch_size}",
        )
        _require(
            s.eval.num_examples % s.eval.batch_size == 0,
            f"config.eval.num_examples={s.eval.num_examples} must be a multiple of eval.batch_size={s.eval.batch_size}",
        )
        _require(
            s.eval.num_scored % s.eval.batch_size == 0,
            f"config.eval.num_scored={s.eval.num_scored} must be a multiple of eval.batch_size={s.eval.batch_size}",
        )
        needed = max(s.eval.rows, s.eval.num_examples, s.eval.num_scored) + s.eval.knn_bank_size
        _require(
            s.data.holdout >= needed,
            f"config.data.holdout={s.data.holdout} must be at least {needed} (eval.num_examples, num_scored, rows and knn_bank_size); "
            "set config.eval.every=0 to train without a held-out set",
        )


def _check_train(s: Settings) -> None:
    train, optimizer, finetune = s.train, s.optimizer, s.finetune
    _require(
        finetune.lora_rank > 0 or (finetune.lora_alpha, finetune.lora_targets) == (0, Finetune().lora_targets),
        "config.finetune.lora_alpha and lora_targets need config.finetune.lora_rank of 1 or more",
    )
    _require(bool(finetune.lora_targets), "config.finetune.lora_targets is empty: name kernels, or set lora_rank=0")
    _require(
        train.batch_size % optimizer.accumulate == 0,
        f"config.train.batch_size={train.batch_size} is not divisible by optimizer.accumulate={optimizer.accumulate}",
    )
    _require(
        optimizer.decay != "cosine" or optimizer.warmup_steps < train.steps,
        f"config.optimizer.warmup_steps={optimizer.warmup_steps} leaves no step of train.steps={train.steps} to decay",
    )
    wrong = [pair for pair in optimizer.lr_multipliers if pair[1] <= 0]
    _require(not wrong, f"config.optimizer.lr_multipliers has {wrong}: factors must be above 0")
    axes = dataclasses.asdict(s.mesh)
    _require(list(axes.values()).count(-1) <= 1, f"config.mesh: only one axis may be -1, not {axes}")
    _require(all(n >= 1 or n == -1 for n in axes.values()), f"config.mesh: axis sizes are positive or -1, not {axes}")
    _require(s.mesh.tensor == 1, f"config.mesh.tensor={s.mesh.tensor}: nothing is sharded over it; leave it at 1")
    _require(
        s.mesh.context == 1 or s.data.sample_type == "clip",
        f"config.mesh.context={s.mesh.context}: frames of clips are sharded over it, and the records of config.task.name="
        f"{s.task.name} with config.data.sample_type={s.data.sample_type} have none; leave it at 1",
    )
