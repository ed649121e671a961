"""Settings: every field of a run, named, documented and given its default in one place.

`config_io` turns these dataclasses into a `ConfigDict` for `configs/*.py` to edit and back again; `config_rules` has the rules
they obey. This module imports no other room, so every room may read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from, and in which order."""

    source: str = "scenes"  # scenes | folder | videos | objaverse | arrayrecord | webdataset | tfds | cached | mixture
    # folder: directory; videos: directory, or WebVid's or OpenVid's csv; objaverse: directory of rendered objects,
    # <object>/000.png + 000.npy ...; arrayrecord, webdataset (.tar): directory, file or glob; tfds: data_dir (empty: its
    # default); cached: what `python -m lumos_jax.prepare cache` wrote, latents and features in place of pictures
    path: str = ""
    name: str = ""  # tfds: the data set's name, for example "imagenet2012" or "oxford_flowers102:2.1.1"
    split: str = "train"  # tfds: the split, slicing syntax allowed
    num_scenes: int = 1_000_000  # scenes: how many scenes make an epoch
    # what one record gives a batch: image | captioned (an image and its caption) | labeled (an image and its class) | clip
    # (scenes, videos) | views (two posed views: scenes, objaverse)
    sample_type: str = "image"
    detailed_caption_prob: float = 0.5  # captioned: probability of the detailed caption; otherwise the raw one
    clean_captions: bool = False  # captioned: clean captions from the web (lower case, no addresses, HTML, odd signs)
    caption_noise: float = 0.0  # captioned: share of training records with another record's caption (paper Fig. 2a)
    # captioned: batches of pictures of one shape each, in sizes around image_size x image_size (lumos_jax/data/aspect.py)
    buckets: bool = False
    bucket_step: int = 0  # pixels of which their sides are multiples; 0: image_size / 16, as PixArt's
    bucket_ratios: tuple[float, float] = (0.25, 4.0)  # smallest and largest height over width
    bucket_index: str = "~/.cache/lumos_jax/sizes"  # where sizes read from headers are kept; empty: nowhere
    tar_index: str = (
        "~/.cache/lumos_jax/tars"  # webdataset: where the places of records in shards are kept; empty: nowhere
    )
    classes: int = 0  # labeled: how many classes there are; compared with what the source has
    # mixture: dicts of the fields source, path, name, split and num_scenes, and weight
    mixture: tuple[Mapping[str, Any], ...] = ()
    image_size: int = 256  # side in pixels of the square images in a batch
    frames: int = 16  # clip: frames a clip
    # clip: frames of the video from one frame of the clip to the next, least and most; drawn in training, the middle otherwise
    frame_stride: tuple[int, int] = (3, 3)
    # clip: share of the steps, evenly spread, that train on pictures: one frame of each record
    image_step_fraction: float = 0.0
    view_turn: float = 180.0  # views of scenes: degrees that two views of a pair may be turned from each other, at most
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
    weights: str = "facebook/dino-vitb16"  # directory; .safetensors, .npz, .pth file; hub id; random:<seed>; "scenes"
    # vit: cls | patch | all | pooled (what its projection head makes of [CLS]: CLIP, MoCo-v3); t5: all; clip_text: all | pooled
    output: str = "cls"
    # vit: unit (each token to length 1: Lumos) | standard (each token to mean 0 and variance 1 over its features: RCG) | none |
    # white (lumos_jax/encoders/whitening.py; of weights that hold its statistics, as "scenes" and other exported encoders do);
    # features of text are left as they are
    normalize: str = "unit"
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
    scaling_factor: float = 0.18215  # multiplies the latents so that their variance is near one
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
    # where the last modulation is from: auto | table (a learned table and the timestep: PixArt, Lumos) | adaln (SiLU and a
    # Linear: DiT); auto is adaln for priors without cross-attention, table for the rest: what starts from the former sets adaln
    final: str = "auto"
    activation: str = "gelu_tanh"  # of the MLPs: gelu_tanh (DiT, Lumos) | gelu (the exact one: RCG)
    position_base: int = 0  # tokens a side at which positions count in ones; 0: the training grid
    dtype: str = "bfloat16"  # compute dtype: float32 | bfloat16; parameters are float32
    remat: str = "none"  # none | dots (recompute all but matmuls) | mlp (all but the MLPs' matmuls) | full
    scan_unroll: int = 0  # blocks laid out per iteration of the layer scan; 0: 12 on a CPU (faster steps), 1 elsewhere


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
class Video:
    """Clips from their first frame (configs/i2v.py). The guidance scale rises over frames, to eval.guidance at the last."""

    min_guidance_scale: float = 1.0  # of the first frame
    noise_log_mean: float = -3.0  # log of the noise added to the first frame in training (pixels in [-1, 1]): mean
    noise_log_std: float = 0.5  # and standard deviation
    noise_aug_strength: float = 0.02  # noise added to the first frame when drawing
    motion_step: float = 1 / 32  # motion score per motion id, of which there are 256
    sample_fps: float = 8.0  # frames a second where `lumos_jax.sample` is not told
    motion_bucket_id: int = 127  # motion id where it is not told


@dataclasses.dataclass(frozen=True)
class Dino:
    """Self-distillation (configs/dino.py): crops, head, temperatures. The ViT is the encoder group's, the teacher the EMA."""

    global_scale: tuple[float, float] = (0.4, 1.0)  # share of the picture in the two crops that the teacher sees
    local_crops: int = 6  # smaller crops that only the student sees
    local_side: int = 96  # pixels
    local_scale: tuple[float, float] = (0.05, 0.4)
    mirror: bool = True  # half of the crops; without it features may tell left from right
    jitter: float = 0.4  # of brightness, contrast, saturation; half of it for the balance of colours
    # The student also tells what the teacher says of patches that are hidden from it (iBOT, DINOv2): how much that counts
    # beside [CLS], 0 for nothing; and the share of patches of each global crop that is hidden, if this or pixel_weight count.
    mask_weight: float = 0.0
    mask_share: tuple[float, float] = (0.1, 0.5)
    pixel_weight: float = 0.0  # how much it counts that tokens tell their patches' pixels, hidden or not; 0 for nothing
    prototypes: int = 4096
    hidden: int = 2048  # width of the head's hidden layers
    bottleneck: int = 256
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    balance: str = "center"  # center (DINO) | sinkhorn (DINOv2): what keeps the teacher's answers apart
    center_momentum: float = 0.9


@dataclasses.dataclass(frozen=True)
class Nvs:
    """Novel view synthesis (configs/nvs.py)."""

    # One uniform number u a record decides what of its condition is dropped: below the first, the input view's feature alone;
    # below the second, feature and latent; below the third, the latent alone.
    dropout: tuple[float, float, float] = (0.05, 0.10, 0.15)
    # Where the camera's numbers enter. token: beside each token of the feature (Zero-1-to-3). bilinear: they multiply the
    # tokens as well, each by a learned matrix, and are in the timestep embedding, from which small networks learn left from
    # right within minutes.
    camera: str = "token"  # token | bilinear


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimiser, its schedule, and the running average of the weights."""

    name: str = "adamw"  # adamw | muon (of the blocks' matrices, momentum 0.95; the rest is AdamW's, after Nesterov)
    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: str = "constant"  # constant | cosine (to zero at train.steps)
    # (pattern, factor) pairs: multiplies the learning rate of parameters whose path matches the pattern (fnmatch)
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    clip_norm: float = 0.0  # global gradient norm; 0: no clipping
    accumulate: int = 1  # gradient accumulation: micro-batches per step
    ema_decay: float = 0.9999
    # How the average and the moments are kept between steps: float32 | bfloat16, which halves their memory. The average and
    # AdamW's second moment are rounded stochastically, as a step adds less than bfloat16 resolves (train/state_dtype.py).
    ema_dtype: str = "float32"
    moments_dtype: str = "float32"  # of AdamW's two moments, and of Muon's momentum
    ema_memory: str = (
        "device"  # device | host (of an accelerator: its memory is free of the average, which travels each step)
    )


@dataclasses.dataclass(frozen=True)
class Finetune:
    """What trains; the rest stays bit for bit what `init_from` gave. Patterns (fnmatch) are over paths of parameters."""

    trainable: tuple[str, ...] = ()  # as ("final/*", "blocks/attn/*"); empty: everything, or the adapters alone
    lora_rank: int = 0  # of low-rank adapters, W + alpha / rank A B, which train beside `trainable`; 0: none
    lora_alpha: float = 0.0  # 0: equal to the rank
    # the kernels of the blocks that have adapters
    lora_targets: tuple[str, ...] = ("blocks/attn/*_kernel", "blocks/cross/*_kernel", "blocks/mlp/*/kernel")


@dataclasses.dataclass(frozen=True)
class Train:
    """The run."""

    steps: int = 400_000
    batch_size: int = 256  # global
    seed: int = 0  # of initialisation, noise, timesteps and dropout
    watchdog_minutes: float = (
        30.0  # without a finished step, after which the stacks of all threads are printed; 0: never
    )
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
    num_examples: int = 512  # held-out records whose denoising loss is averaged
    batch_size: int = 64  # global
    knn_bank_size: int = (
        0  # held-out records among which a task that learns features looks for neighbours of eval.num_examples others
    )
    # held-out records of which a sample each is drawn and scored against the truth, where there is one: the picture of a
    # feature, the true view, the clip, what the caption of a scene says; 0: none
    num_scored: int = 0
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
    video: Video = Video()
    dino: Dino = Dino()
    nvs: Nvs = Nvs()
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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups -> {"group.field": value}, tuples as lists (as JSON gives them back)."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
