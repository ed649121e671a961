"""Settings of training: optimizer, what trains, the run, its mesh, checkpoints, logs and evaluation."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

from lumos_jax.config.fields import Dtype, Rule, at_least, between, rising


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer, its schedule, and the EMA of the weights."""

    name: Annotated[
        Literal["adamw", "muon"], "muon: of the blocks' matrices, momentum 0.95; the rest is AdamW's, after Nesterov"
    ] = "adamw"
    learning_rate: Annotated[float, at_least(0), "its peak"] = 1e-4
    b1: ClassVar[float] = 0.9
    b2: Annotated[float, between(0, 1), "decay of Adam's second moment; the first's is 0.9"] = 0.999
    eps: Annotated[float, at_least(0), "Adam's"] = 1e-8
    weight_decay: Annotated[float, at_least(0), "of every trainable parameter"] = 0.0
    warmup_steps: Annotated[int, at_least(0), "linear warm-up from 0"] = 0
    decay: Annotated[Literal["constant", "cosine"], "cosine: to zero at train.steps"] = "constant"
    lr_multipliers: Annotated[
        tuple[tuple[str, float], ...],
        Rule(lambda pairs: all(factor > 0 for _, factor in pairs), "pairs whose factors are above 0"),
        "(pattern, factor) pairs: multiplies the learning rate of parameters whose path matches the pattern (fnmatch)",
    ] = ()
    clip_norm: Annotated[float, at_least(0), "global gradient norm; 0: no clipping"] = 0.0
    accumulate: Annotated[int, at_least(1), "gradient accumulation: micro-batches per step"] = 1
    ema_decay: Annotated[float, between(0, 1), "of the EMA of the weights"] = 0.9999
    state_dtype: Annotated[
        Dtype,
        "EMA, AdamW's two moments and Muon's momentum between steps; bfloat16 halves their memory, rounded stochastically",
        "(lumos_jax/train/state.py)",
    ] = "float32"
    ema_memory: Annotated[Literal["device", "host"], "host: EMA in host memory, copied every step"] = "device"


_TARGETS = ("blocks/attn/*_kernel", "blocks/cross/*_kernel", "blocks/mlp/*/kernel")


@dataclasses.dataclass(frozen=True)
class Finetune:
    """What trains; frozen parameters stay bit-identical to `init_from`. Patterns (fnmatch) are over paths of parameters."""

    trainable: Annotated[
        tuple[str, ...], 'as ("final/*", "blocks/attn/*"); empty: everything, or the adapters alone'
    ] = ()
    lora_rank: Annotated[int, at_least(0), "of low-rank adapters, W + A B, which train beside `trainable`; 0: none"] = 0
    lora_targets: Annotated[tuple[str, ...], "the kernels of the blocks that have adapters"] = _TARGETS

    def check(self) -> dict[str, bool]:
        return {
            "config.finetune.lora_targets needs config.finetune.lora_rank of 1 or more":
                self.lora_rank == 0 and self.lora_targets != _TARGETS,
            "config.finetune.lora_targets is empty: name kernels, or set lora_rank=0": not self.lora_targets,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Train:
    """The run."""

    steps: Annotated[int, at_least(1), "of the run"] = 400_000
    batch_size: Annotated[int, at_least(1), "global"] = 256
    seed: Annotated[int, "of initialization, noise, timesteps and dropout"] = 0
    nonfinite_limit: ClassVar[int] = 10
    profile_at: Annotated[int, "first of 5 steps of a profiler trace; -1: none"] = -1
    profile_steps: ClassVar[int] = 5


_SIZE = Rule(lambda size: size >= 1 or size == -1, "at least 1, or -1")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices per mesh axis. Data parallelism has the rest."""

    fsdp: Annotated[
        int, _SIZE, "data parallel, with parameters, gradients and optimizer state sharded as well; -1: all devices"
    ] = 1
    context: Annotated[int, at_least(1), "frames of clips sharded"] = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are written, and which are kept."""

    every: Annotated[int, at_least(1), "steps"] = 5000
    keep: Annotated[int, at_least(1), "newest checkpoints kept"] = 3
    keep_every: Annotated[int, at_least(0), "steps whose checkpoints are kept for ever; 0: none"] = 0
    allow_change: Annotated[
        tuple[str, ...], 'fields that may differ from the checkpoint\'s, as ("train.batch_size",)'
    ] = ()


@dataclasses.dataclass(frozen=True)
class Log:
    """What is reported while training."""

    every: Annotated[int, at_least(1), "steps"] = 50


@dataclasses.dataclass(frozen=True)
class Eval:
    """The held-out loss and the sample sheet, of `data.holdout` records with the EMA weights."""

    every: Annotated[int, at_least(0), "steps; 0: never"] = 0
    num_examples: Annotated[
        int,
        at_least(1),
        "held-out records whose denoising loss is averaged; of self-distillation: whose nearest neighbors among the rest of",
        "data.holdout are looked up",
    ] = 512
    num_scored: Annotated[
        int,
        at_least(0),
        "held-out records of which one sample each is scored against the truth, where there is one: the image of a feature,",
        "the true view, the clip, what the caption of a scene says; 0: none",
    ] = 0
    sheet: Annotated[
        tuple[int, int],
        Rule(lambda sheet: min(sheet) >= 1, "positive"),
        "of the sample sheet: held-out records, a row each, and samples of each",
    ] = (8, 2)
    suite: Annotated[
        tuple[str, ...],
        'metrics of `lumos_jax.evaluate score` and their numbers of samples, as ("fd_vgg16@2k", "lpips@64"); see',
        "docs/evaluation.md",
    ] = ()
    suite_every: Annotated[int, at_least(0), "steps between evaluations of `suite`, which is also the last step's"] = 0
    network_weights: Annotated[
        tuple[str, ...],
        'of `suite`: files of networks that no package carries, as ("inception=PATH",); see docs/evaluation.md',
    ] = ()
    network_protocol: Annotated[
        tuple[str, ...], 'of `suite`: how a network\'s input is prepared, as ("inception=clean",)'
    ] = ()
    sampler: Annotated[
        Literal["ddpm", "ddim", "dpm++", "euler", "heun"],
        "euler and heun solve diffusion.schedule=flow, the others the rest",
    ] = "dpm++"
    steps: Annotated[int, at_least(1), "of the sampler"] = 20
    guidance: Annotated[float, at_least(0), "scale of classifier-free guidance; 1: none"] = 4.5
    guidance_interval: Annotated[
        tuple[float, float], rising(0, 1), "share of the time (0 clean, 1 noise) with guidance"
    ] = (0.0, 1.0)
    guidance_rescale: Annotated[float, between(0, 1), "0: none; 0.7 is usual (Lin et al. 2023)"] = 0.0

    def check(self) -> dict[str, bool]:
        together = (
            f"config.eval.suite={self.suite} and suite_every={self.suite_every} belong together: set both, or neither"
        )
        return {together: bool(self.suite) != bool(self.suite_every)}
