"""Settings of the tasks."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from lumos_jax.config.fields import above, at_least, between, rising


@dataclasses.dataclass(frozen=True)
class Task:
    """Which task, and how its condition is dropped."""

    name: Annotated[str, "of a module in lumos_jax/tasks"] = "i2i"
    condition_dropout: Annotated[
        float, between(0, 1), "probability of the null condition, for classifier-free guidance"
    ] = 0.1


@dataclasses.dataclass(frozen=True)
class Video:
    """Clips from their first frame (configs/i2v.py). The guidance scale rises over frames, to eval.guidance at the last."""

    min_guidance_scale: Annotated[float, at_least(0), "of the first frame"] = 1.0
    noise_log_mean: Annotated[
        float, "mean of the log of the noise on the first frame in training; pixels in [-1, 1]"
    ] = -3.0
    noise_log_std: Annotated[float, at_least(0), "its standard deviation"] = 0.5
    noise_aug_strength: Annotated[float, at_least(0), "noise on the first frame in sampling"] = 0.02
    motion_step: Annotated[float, above(0), "motion score per motion id, of which there are 256"] = 1 / 32
    sample_fps: Annotated[float, above(0), "frames a second of samples, unless `lumos_jax.sample --fps` says"] = 8.0
    motion_bucket_id: Annotated[int, between(0, 255), "of samples, unless `lumos_jax.sample --motion` says"] = 127


@dataclasses.dataclass(frozen=True)
class Dino:
    """Self-distillation (configs/dino.py): crops, head, temperatures. The ViT is the encoder group's, the teacher the EMA."""

    global_scale: Annotated[tuple[float, float], rising(1e-6, 1), "share of the image in the teacher's two crops"] = (
        0.4,
        1.0,
    )
    local_crops: Annotated[int, at_least(0), "smaller crops that only the student sees"] = 6
    local_side: Annotated[int, at_least(1), "their side in pixels"] = 96
    local_scale: Annotated[tuple[float, float], rising(1e-6, 1), "share of the image in them"] = (0.05, 0.4)
    mirror: Annotated[bool, "mirror half of the crops; without it features may tell left from right"] = True
    jitter: Annotated[
        float, between(0, 1), "of brightness, contrast, saturation; half of it for the balance of colors"
    ] = 0.4
    mask_weight: Annotated[float, at_least(0), "iBOT: weight of the teacher's output at masked patches; 0: none"] = 0.0
    mask_share: Annotated[
        tuple[float, float], rising(0, 1), "share of the patches of each global crop that is masked"
    ] = (0.1, 0.5)
    pixel_weight: Annotated[float, at_least(0), "weight of predicting the pixels of patches; 0: none"] = 0.0
    prototypes: Annotated[int, at_least(2), "outputs of the head"] = 4096
    hidden: Annotated[int, at_least(1), "width of the head's hidden layers"] = 2048
    bottleneck: Annotated[int, at_least(1), "width before the prototypes"] = 256
    student_temperature: Annotated[float, above(0), "of the student's softmax"] = 0.1
    teacher_temperature: Annotated[float, above(0), "of the teacher's softmax"] = 0.04
    balance: Annotated[Literal["center", "sinkhorn"], "what keeps the teacher from collapse: DINO's or DINOv2's"] = (
        "center"
    )
    center_momentum: Annotated[float, between(0, 1), "balance=center: of the mean of the teacher's outputs"] = 0.9


@dataclasses.dataclass(frozen=True)
class Nvs:
    """Novel view synthesis (configs/nvs.py)."""

    dropout: Annotated[
        tuple[float, float, float],
        rising(0, 1),
        "one uniform number a record decides what of its condition is dropped: below the first, the input view's feature",
        "alone; below the second, feature and latent; below the third, the latent alone",
    ] = (0.05, 0.10, 0.15)
    camera: Annotated[
        Literal["token", "bilinear"],
        "where the camera's numbers enter. token: beside each token of the feature (Zero-1-to-3); bilinear: they multiply the",
        "tokens as well, each by a learned matrix, and are in the timestep embedding, from which small networks learn left",
        "from right within minutes",
    ] = "token"
