"""Self-distillation without labels (DINO: Caron et al. 2021, arXiv 2104.14294): an encoder of one's own, from images alone.

    teacher = running average of the student
    p       = softmax((teacher(global crop) - centre) / teacher temperature)
    loss    = mean over pairs of different crops of  - p . log softmax(student(crop) / student temperature)
    centre <- m centre + (1 - m) mean teacher output,  which keeps the teacher from giving the same answer to everything

With `balance` = sinkhorn the teacher's answers are instead made to use all prototypes equally within the batch (Caron et al.
2020; DINOv2), which needs no centre; small batches and short runs then stay clear of few-cluster answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import config, encoders
from lumos_jax.encoders import SelfDistilled
from lumos_jax.tasks import crops
from lumos_jax.tasks.handoffs import Handoff

GLOBAL = 2  # crops that the teacher sees
SINKHORN_ROUNDS = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """Crops of one batch: whole (B, 2, S, S, 3) and local (B, n, s, s, 3), normalised; weight (B,)."""

    whole: jax.Array
    local: jax.Array
    weight: jax.Array


@dataclasses.dataclass(frozen=True)
class SelfDistillation:
    """The DINO task; see tasks.base.Task for the interface. Other fields as in config.Dino."""

    network: SelfDistilled
    side: int
    settings: config.Dino
    name: str = "dino"

    @property
    def host(self) -> None:
        return None

    def handoff(self) -> Handoff:
        return Handoff()

    @property
    def identity(self) -> dict[str, str]:
        return {}

    def describe(self) -> dict[str, str]:
        s = self.settings
        return {"crops": f"{GLOBAL} of {self.side} px, {s.local_crops} of {s.local_side} px, {s.prototypes} prototypes"}

    def example(self, frozen: Any, batch: Mapping[str, jax.Array], keys: Mapping[str, jax.Array]) -> Views:
        s, image = self.settings, batch["image"]

        def view(number: int, side: int, scale: tuple[float, float]) -> jax.Array:
            draws = jax.random.split(jax.random.fold_in(keys["views"], number), 3)
            crop = crops.random_crop(draws[0], image, side, scale)
            crop = crops.mirror(draws[1], crop) if s.mirror else crop
            return encoders.normalise(crops.jitter(draws[2], crop, s.jitter), encoders.IMAGENET_STATISTICS)

        whole = [view(number, self.side, s.global_scale) for number in range(GLOBAL)]
        local = [view(GLOBAL + number, s.local_side, s.local_scale) for number in range(s.local_crops)]
        nothing = jnp.zeros((image.shape[0], 0, s.local_side, s.local_side, 3))
        return Views(jnp.stack(whole, 1), jnp.stack(local, 1) if local else nothing, batch["weight"])

    def losses(self, params: Any, average: Any, example: Views, total: jax.Array, gather: Any) -> dict[str, jax.Array]:
        """`loss`; `teacher_entropy` of one answer and `prototype_entropy` of the batch's mean answer, in nats, which would be 0
        if the teacher had collapsed; and `centre`, the mean output (K,), which `settle` takes."""
        s, size = self.settings, example.weight.shape[0]
        share = example.weight / total

        def scores(weights, views):
            flat = views.reshape(-1, *views.shape[2:])
            return self.network.scores(weights, flat).reshape(size, views.shape[1], -1)

        given = jax.lax.stop_gradient(scores(average, example.whole))
        if s.balance == "sinkhorn":
            answer = _balanced(given / s.teacher_temperature, example.weight)
        else:
            centre = jax.lax.stop_gradient(params["centre"])
            answer = jax.nn.softmax((given - centre[None, None]) / s.teacher_temperature, axis=-1)
        logs = [jax.nn.log_softmax(scores(params, example.whole) / s.student_temperature, axis=-1)]
        if s.local_crops:
            logs.append(jax.nn.log_softmax(scores(params, example.local) / s.student_temperature, axis=-1))
        cross = -jnp.einsum("btk,bsk->bts", answer, jnp.concatenate(logs, axis=1))
        others = 1 - jnp.eye(GLOBAL, cross.shape[2])
        loss = (cross * others[None]).sum(axis=(1, 2)) / others.sum()
        mean = jnp.einsum("b,btk->k", share, answer) / GLOBAL
        entropy = -(answer * jnp.log(answer + 1e-9)).sum(-1).mean(1)
        return {
            "loss": (loss * share).sum(),
            "teacher_entropy": (entropy * share).sum(),
            "prototype_entropy": -(mean * jnp.log(mean + 1e-9)).sum(),
            "centre": jnp.einsum("b,btk->k", share, given) / GLOBAL,
        }

    def settle(self, params: Any, sums: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        m = self.settings.centre_momentum
        centre = m * params["centre"] + (1 - m) * sums["centre"]
        return params | {"centre": centre}, {name: value for name, value in sums.items() if name != "centre"}

    def features(self, params: Any, image: jax.Array) -> jax.Array:
        """uint8 (B, H, W, 3) -> [CLS] (B, D) of the whole picture."""
        pixels = encoders.preprocess(image, self.side, self.side, "bilinear", encoders.IMAGENET_STATISTICS)
        return self.network.vit.apply(params["vit"], pixels)[:, 0]


def _balanced(logits: jax.Array, weight: jax.Array) -> jax.Array:
    """Answers (B, G, K) that use every prototype equally over the batch (Sinkhorn-Knopp); rows of weight 0 do not count."""
    size, views, prototypes = logits.shape
    share = jnp.repeat(weight, views)[:, None]
    plan = jnp.exp(logits - logits.max()).reshape(size * views, prototypes) * share
    for _ in range(SINKHORN_ROUNDS):
        plan = plan / (plan.sum(axis=0, keepdims=True) * prototypes + 1e-12)
        plan = plan / (plan.sum(axis=1, keepdims=True) + 1e-12)
    return plan.reshape(size, views, prototypes)


def make_dino(
    settings: config.Settings, place: encoders.Placement | None = None
) -> tuple[SelfDistillation, dict[str, Any]]:
    """The task; nothing is frozen. The ViT is the one that config.encoder describes for random weights.

    Raises:
      ValueError: crops that do not divide into patches, or encoder settings that name weights.
    """
    vit = encoders.vit_of(settings.encoder)
    dino = settings.dino
    if dino.local_side % vit.patch_size:
        raise ValueError(
            f"config.dino.local_side={dino.local_side} is not divisible by config.encoder.patch_size={vit.patch_size}"
        )
    network = SelfDistilled(vit, dino.hidden, dino.bottleneck, dino.prototypes)
    return SelfDistillation(network, settings.encoder.image_size, dino), {}
