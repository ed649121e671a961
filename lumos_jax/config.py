"""Settings: every field of a run, named, documented and given its default in one place, and every rule they obey.

`config_io` turns these dataclasses into a `ConfigDict` for `configs/*.py` to edit and back again; `validate` runs before
anything is compiled. This module imports no other room, so every room may read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from, and in which order."""

    source: str = "scenes"  # scenes | folder | arrayrecord | tfds | cached | mixture
    # folder: directory; arrayrecord: directory, file or glob; tfds: data_dir (empty: its default);
    # cached: what `python -m lumos_jax.prepare cache` wrote, latents and features in place of pictures
    path: str = ""
    name: str = ""  # tfds: the data set's name, for example "imagenet2012" or "oxford_flowers102:2.1.1"
    split: str = "train"  # tfds: the split, slicing syntax allowed
    records: int = 1_000_000  # scenes: how many scenes make an epoch
    # mixture: dicts of the fields source, path, name, split and records, and weight
    mixture: tuple[Mapping[str, Any], ...] = ()
    image_size: int = 256  # side in pixels of the square images in a batch
    crop: str = "center"  # center | random; random crops keep the shorter side whole; cached: center
    flip: bool = False  # mirror half of the records, chosen from (seed, position); cached: False
    seed: int = 0  # of the global permutation and of crops and flips
    holdout: int = 0  # records kept out of training, for the held-out loss and the sample sheets
    workers: int = 0  # decoding processes per host; 0 decodes in threads of the main process
    threads: int = 4  # decoding threads per process
    prefetch: int = 4  # batches read ahead
    max_corrupt_rate: float = 0.01  # share of undecodable records, over the run so far, above which it stops


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The frozen encoder, of images (vit) or of captions (t5, clip_text), whose features are the condition."""

    kind: str = "vit"  # vit | t5 (the encoder of T5 v1.1 or Flan-T5) | clip_text
    weights: str = "facebook/dino-vitb16"  # directory; .safetensors, .npz, .pth file; hub id; random:<seed>
    # vit: cls | patch | all | pooled (what its projection head makes of [CLS]: CLIP, MoCo-v3); t5: all; clip_text: all | pooled
    output: str = "cls"
    normalize: bool = True  # vit: L2-normalise each token; features of text are left as they are
    resize: int = 224  # vit: shorter side after resizing (antialiased), pixels
    interpolation: str = "bilinear"  # vit: bilinear (Lumos) | bicubic (as CLIP and DINOv2 were trained)
    image_size: int = 224  # vit: side of the centre crop that the encoder sees, pixels
    max_tokens: int = 120  # t5, clip_text: token ids a caption, padding included; clip_text's weights have 77 at most
    # t5, clip_text: directory, hub id, or "scenes" (comes with us); empty: the files beside the weights
    tokenizer: str = ""
    vocabulary: int = 0  # t5, clip_text of random weights only: how many token ids there are; at least the tokenizer's
    size: str = "B"  # random weights only: Ti | S | B | L | custom
    patch_size: int = 16  # vit of random weights only
    width: int = 0  # size "custom" only
    depth: int = 0  # size "custom" only
    heads: int = 0  # size "custom" only; weights without a config.json: 0 means width / 64
    dtype: str = "bfloat16"  # compute dtype: float32 | bfloat16


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """The frozen map between pixels and latents."""

    kind: str = "kl"  # kl (Stable Diffusion's KL autoencoder) | identity (pixels in [-1, 1] are the latents)
    weights: str = "stabilityai/sd-vae-ft-mse"  # directory (diffusers layout), .safetensors, hub id, or random:<seed>
    scale: float = 0.18215  # multiplies the latents so that their variance is near one
    posterior: str = "sample"  # sample | mode
    tile: int = 0  # decode in tiles of this many latent pixels a side; 0 decodes whole
    channels: tuple[int, ...] = (128, 256, 512, 512)  # random weights only: width of each resolution
    layers: int = 2  # random weights only: residual blocks per resolution
    groups: int = 32  # random weights only: group-norm groups
    dtype: str = "bfloat16"  # compute dtype: float32 | bfloat16


@dataclasses.dataclass(frozen=True)
class Model:
    """The diffusion transformer."""

    size: str = "XL"  # S | B | L | XL (the DiT paper's table) | custom
    patch_size: int = 2
    width: int = 0  # size "custom" only
    depth: int = 0  # size "custom" only
    heads: int = 0  # size "custom" only
    mlp_ratio: float = 4.0
    position_scale: float = 1.0  # 1.0 at 256 and 512 px, 2.0 at 1024 px
    position_base: int = 0  # tokens a side at which positions count in ones; 0: the training grid
    dtype: str = "bfloat16"  # compute dtype: float32 | bfloat16; parameters are float32
    remat: str = "none"  # none | dots (recompute all but matmuls) | full
    unroll: int = 0  # blocks laid out per iteration of the layer scan; 0: 12 on a CPU (faster steps), 1 elsewhere


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """The corruption process, what the network predicts, and its loss."""

    schedule: str = "linear"  # linear | cosine | flow (straight lines, flow matching)
    steps: int = 1000  # discrete timesteps (linear and cosine); network time is scaled to it for flow
    prediction: str = "noise"  # noise | x0 | v | flow
    learned_variance: bool = True  # the network's second half of channels interpolates the log variance
    loss: str = "hybrid"  # hybrid (MSE + VLB with the mean detached) | simple (eq. (1): the MSE alone)
    min_snr_gamma: float = 0.0  # 0: no weighting; 5 is the paper's value (min-SNR)
    timesteps: str = "uniform"  # uniform | logit_normal
    logit_mean: float = 0.0
    logit_std: float = 1.0


@dataclasses.dataclass(frozen=True)
class Task:
    """Which task, and how its condition is dropped."""

    name: str = "i2i"
    condition_dropout: float = 0.1  # probability of the null condition, for classifier-free guidance


@dataclasses.dataclass(frozen=True)
class Dino:
    """Self-distillation (configs/dino.py): crops, head, temperatures. The ViT is the encoder group's, the teacher the EMA."""

    global_scale: tuple[float, float] = (0.4, 1.0)  # share of the picture in the two crops that the teacher sees
    local_crops: int = 6  # smaller crops that only the student sees
    local_side: int = 96  # pixels
    local_scale: tuple[float, float] = (0.05, 0.4)
    jitter: float = 0.4  # of brightness, contrast, saturation; half of it for the balance of colours
    prototypes: int = 4096
    hidden: int = 2048  # width of the head's hidden layers
    bottleneck: int = 256
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    balance: str = "centre"  # centre (DINO) | sinkhorn (DINOv2): what keeps the teacher's answers apart
    centre_momentum: float = 0.9


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW, its schedule, and the running average of the weights."""

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: str = "constant"  # constant | cosine (to zero at train.steps)
    clip_norm: float = 0.0  # global gradient norm; 0: no clipping
    accumulate: int = 1  # gradient accumulation: micro-batches per step
    ema_decay: float = 0.9999


@dataclasses.dataclass(frozen=True)
class Finetune:
    """What trains; the rest stays bit for bit what `init_from` gave. Patterns (fnmatch) are over paths of parameters."""

    trainable: tuple[str, ...] = ()  # as ("final/*", "blocks/attn/*"); empty: everything, or the adapters alone
    lora_rank: int = 0  # of low-rank adapters, W + alpha / rank A B, which train beside `trainable`; 0: none
    lora_alpha: float = 0.0  # 0: equal to the rank
    # the kernels of the blocks that have adapters
    lora_layers: tuple[str, ...] = ("blocks/attn/*_kernel", "blocks/cross/*_kernel", "blocks/mlp/*/kernel")


@dataclasses.dataclass(frozen=True)
class Train:
    """The run."""

    steps: int = 400_000
    batch_size: int = 256  # global
    seed: int = 0  # of initialisation, noise, timesteps and dropout
    nonfinite_limit: int = 10  # stop after this many steps in a row without a finite loss and gradient
    profile_at: int = -1  # first step of a profiler trace; -1: none
    profile_steps: int = 5
    compilation_cache: str = "~/.cache/lumos_jax/xla"  # persistent compilation cache; empty: none


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices per mesh axis; -1 takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 5000  # steps
    keep: int = 3  # newest checkpoints kept
    keep_every: int = 0  # steps whose checkpoints are kept for ever; 0: none
    allow_change: tuple[str, ...] = ()  # fields that may differ from the checkpoint's, as ("train.batch_size",)


@dataclasses.dataclass(frozen=True)
class Log:
    every: int = 50  # steps
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class Eval:
    """The held-out loss and the sample sheet, drawn from `data.holdout` records with the EMA weights."""

    every: int = 0  # steps; 0: never
    records: int = 512  # held-out records whose denoising loss is averaged
    batch_size: int = 64  # global
    bank: int = (
        0  # held-out records among which a task that learns features looks for neighbours of eval.records others
    )
    rows: int = 8  # sources on the sample sheet
    samples: int = 2  # samples a source
    sampler: str = "dpm++"  # ddpm | ddim | dpm++ | euler | heun (the last two need diffusion.schedule = flow)
    steps: int = 20  # of the sampler
    guidance: float = 4.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # share of the time (0 clean, 1 noise) with guidance
    guidance_rescale: float = 0.0  # 0: none; 0.7 is usual (Lin et al. 2023)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run; `config.json` in the run's directory holds them."""

    data: Data = Data()
    encoder: Encoder = Encoder()
    autoencoder: Autoencoder = Autoencoder()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    task: Task = Task()
    dino: Dino = Dino()
    optimizer: Optimizer = Optimizer()
    finetune: Finetune = Finetune()
    train: Train = Train()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    eval: Eval = Eval()
    # Weights to start from: a run's directory (its EMA), an imported prior's, or a released file (.pth, .safetensors, hub id).
    init_from: str = ""


TEXT_KINDS = ("t5", "clip_text")  # of encoder.kind
ENCODER_OUTPUTS = {"vit": ("cls", "patch", "all", "pooled"), "t5": ("all",), "clip_text": ("all", "pooled")}

_CHOICES = {
    "data.source": ("scenes", "folder", "arrayrecord", "tfds", "cached", "mixture"),
    "data.crop": ("center", "random"),
    "encoder.kind": ("vit", *TEXT_KINDS),
    "encoder.output": ("cls", "patch", "all", "pooled"),
    "encoder.interpolation": ("bilinear", "bicubic"),
    "encoder.size": ("Ti", "S", "B", "L", "custom"),
    "encoder.dtype": ("float32", "bfloat16"),
    "autoencoder.kind": ("kl", "identity"),
    "autoencoder.posterior": ("sample", "mode"),
    "autoencoder.dtype": ("float32", "bfloat16"),
    "model.size": ("S", "B", "L", "XL", "custom"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "dino.balance": ("centre", "sinkhorn"),
    "diffusion.schedule": ("linear", "cosine", "flow"),
    "diffusion.prediction": ("noise", "x0", "v", "flow"),
    "diffusion.loss": ("hybrid", "simple"),
    "diffusion.timesteps": ("uniform", "logit_normal"),
    "optimizer.decay": ("constant", "cosine"),
    "eval.sampler": ("ddpm", "ddim", "dpm++", "euler", "heun"),
}

# Smallest value allowed, for the fields where zero or less would only fail later, and less clearly.
_AT_LEAST = {
    "data.image_size": 1, "data.records": 1, "data.holdout": 0, "data.workers": 0, "data.threads": 1, "data.prefetch": 1,
    "data.max_corrupt_rate": 0, "encoder.image_size": 1, "encoder.patch_size": 1,
    "encoder.max_tokens": 1, "encoder.vocabulary": 0, "autoencoder.tile": 0,
    "autoencoder.layers": 1, "autoencoder.groups": 1, "model.patch_size": 1, "model.position_base": 0, "diffusion.steps": 1,
    "diffusion.min_snr_gamma": 0, "task.condition_dropout": 0, "optimizer.learning_rate": 0, "optimizer.warmup_steps": 0,
    "optimizer.clip_norm": 0, "optimizer.accumulate": 1, "optimizer.weight_decay": 0, "optimizer.ema_decay": 0,
    "model.unroll": 0, "finetune.lora_rank": 0, "finetune.lora_alpha": 0,
    "dino.local_crops": 0, "dino.local_side": 1, "dino.jitter": 0, "dino.prototypes": 2, "dino.hidden": 1,
    "dino.bottleneck": 1, "dino.centre_momentum": 0, "eval.bank": 0,
    "train.steps": 1, "train.batch_size": 1, "train.nonfinite_limit": 1, "train.profile_steps": 1, "checkpoint.every": 1,
    "checkpoint.keep": 1, "checkpoint.keep_every": 0, "log.every": 1, "eval.every": 0, "eval.records": 1,
    "eval.batch_size": 1, "eval.rows": 1, "eval.samples": 1, "eval.steps": 1, "eval.guidance": 0,
    "eval.guidance_rescale": 0,
}  # fmt: skip
_AT_MOST = {
    "data.max_corrupt_rate": 1, "task.condition_dropout": 1, "optimizer.ema_decay": 1, "dino.jitter": 1, "dino.centre_momentum": 1, "eval.guidance_rescale": 1,
}  # fmt: skip


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups -> {"group.field": value}, tuples as lists (as JSON gives them back)."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


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
    _check_data(settings)
    _check_networks(settings)
    _check_diffusion(settings)
    _check_eval(settings)
    _check_train(settings)


def _check_data(s: Settings) -> None:
    data = s.data
    if data.source in ("folder", "arrayrecord", "cached"):
        _require(bool(data.path), f"config.data.source={data.source} needs config.data.path")
    _require(
        data.source != "cached" or (data.crop == "center" and not data.flip),
        f"config.data.crop={data.crop}, flip={data.flip} do not go with config.data.source=cached, which holds one centre crop "
        "of each picture, not mirrored: set config.data.crop=center and config.data.flip=False",
    )
    if data.source == "tfds":
        _require(bool(data.name), "config.data.source=tfds needs config.data.name, the name of a TFDS data set")
    _require(
        (data.source == "mixture") == bool(data.mixture),
        "config.data.mixture, a tuple of dicts (source, path, ..., weight), goes with config.data.source=mixture",
    )
    if data.source == "scenes":
        _require(data.records < 2**32, f"config.data.records={data.records}: an epoch has fewer than 2^32 records")


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
    for name in ("student_temperature", "teacher_temperature"):
        _require(getattr(s.dino, name) > 0, f"config.dino.{name}={getattr(s.dino, name)} must be above 0")
    if s.eval.every:
        _require(
            s.eval.bank % s.eval.batch_size == 0,
            f"config.eval.bank={s.eval.bank} must be a multiple of eval.batch_size={s.eval.batch_size}",
        )
        _require(
            s.eval.records % s.eval.batch_size == 0,
            f"config.eval.records={s.eval.records} must be a multiple of eval.batch_size={s.eval.batch_size}",
        )
        needed = max(s.eval.rows, s.eval.records) + s.eval.bank
        _require(
            s.data.holdout >= needed,
            f"config.data.holdout={s.data.holdout} must be at least {needed} (eval.records, eval.rows, eval.bank); "
            "set config.eval.every=0 to train without a held-out set",
        )


def _check_train(s: Settings) -> None:
    train, optimizer, finetune = s.train, s.optimizer, s.finetune
    _require(
        finetune.lora_rank > 0 or (finetune.lora_alpha, finetune.lora_layers) == (0, Finetune().lora_layers),
        "config.finetune.lora_alpha and lora_layers need config.finetune.lora_rank of 1 or more",
    )
    _require(bool(finetune.lora_layers), "config.finetune.lora_layers is empty: name kernels, or set lora_rank=0")
    _require(
        train.batch_size % optimizer.accumulate == 0,
        f"config.train.batch_size={train.batch_size} is not divisible by optimizer.accumulate={optimizer.accumulate}",
    )
    _require(
        optimizer.decay != "cosine" or optimizer.warmup_steps < train.steps,
        f"config.optimizer.warmup_steps={optimizer.warmup_steps} leaves no step of train.steps={train.steps} to decay",
    )
    axes = dataclasses.asdict(s.mesh)
    _require(list(axes.values()).count(-1) <= 1, f"config.mesh: only one axis may be -1, not {axes}")
    _require(all(n >= 1 or n == -1 for n in axes.values()), f"config.mesh: axis sizes are positive or -1, not {axes}")
    _require(
        s.mesh.tensor == 1 and s.mesh.context == 1,
        f"config.mesh.tensor={s.mesh.tensor}, context={s.mesh.context}: images are sharded over data and fsdp; "
        "leave the other axes at 1",
    )
