"""Self-distillation without labels (DINO: Caron et al. 2021, arXiv 2104.14294): an encoder of one's own, from images alone.

    teacher = running average of the student
    p       = softmax((teacher(global crop) - centre) / teacher temperature)
    loss    = mean over pairs of different crops of  - p . log softmax(student(crop) / student temperature)
    centre <- m centre + (1 - m) mean teacher output,  which keeps the teacher from giving the same answer to everything

With `balance` = sinkhorn the teacher's answers are instead made to use all prototypes equally within the batch (Caron et al.
2020; DINOv2), which needs no centre; small batches and short runs then stay clear of few-cluster answers.

With `mask_weight` the student does not see some patches of its global crops, and also tells what the teacher, who does, says
of each of them (iBOT: Zhou et al. 2022): tokens then know their place and what is there, and not [CLS] alone what is shown.

With `pixel_weight` a linear layer tells from each token the pixels of its patch, hidden or not (SimMIM: Xie et al. 2022, for
the hidden ones), so that features keep what a prior needs to reproduce the picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import config, encoders
from lumos_jax.models import layers
from lumos_jax.tasks import crops
from lumos_jax.tasks.dino_network import SelfDistilled
from lumos_jax.tasks.handoffs import Handoff

GLOBAL = 2  # crops that the teacher sees
SINKHORN_ROUNDS = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """Crops of one batch: whole (B, 2, S, S, 3) and local (B, n, s, s, 3), normalised; weight (B,); and which patches of the
    whole ones are hidden, (B, 2, N) bool or None."""

    whole: jax.Array
    local: jax.Array
    hidden: jax.Array | None
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
            return encoders.normalize(crops.jitter(draws[2], crop, s.jitter), encoders.IMAGENET_STATISTICS)

        whole = [view(number, self.side, s.global_scale) for number in range(GLOBAL)]
        local = [view(GLOBAL + number, s.local_side, s.local_scale) for number in range(s.local_crops)]
        nothing = jnp.zeros((image.shape[0], 0, s.local_side, s.local_side, 3))
        local = jnp.stack(local, 1) if local else nothing
        return Views(jnp.stack(whole, 1), local, self._hidden(keys, image), batch["weight"])

    def _hidden(self, keys: Mapping[str, jax.Array], image: jax.Array) -> jax.Array | None:
        """Which patches of the global crops the student does not see, (B, GLOBAL, N) bool."""
        if not self.network.masked:
            return None
        share, each = jax.random.split(jax.random.fold_in(keys["views"], GLOBAL + self.settings.local_crops))
        low, high = self.settings.mask_share
        patches = (self.side // self.network.vit.patch_size) ** 2
        share = jax.random.uniform(share, (image.shape[0], GLOBAL, 1), minval=low, maxval=high)
        return jax.random.uniform(each, (image.shape[0], GLOBAL, patches)) < share

    def losses(self, params: Any, average: Any, example: Views, total: jax.Array, gather: Any) -> dict[str, jax.Array]:
        """`loss`; `patch_loss` and `pixel_loss` where they count; `teacher_entropy` of one answer to a crop and
        `prototype_entropy` of the batch's mean answer, in nats, which would be 0 if the teacher had collapsed; and the mean
        outputs `centre` and `patch_centre` (K,), which `settle` takes."""
        s, size = self.settings, example.weight.shape[0]
        share = example.weight / total

        def tokens(weights, views, hidden=None):
            """(B views, 1 + N, D)."""
            flat = views.reshape(-1, *views.shape[2:])
            return self.network.tokens(weights, flat, None if hidden is None else hidden.reshape(-1, hidden.shape[-1]))

        def scores(weights, tokens):
            """(B, views, 1 + N, K), or (B, views, 1, K) where patches are not asked."""
            found = self.network.scores(weights, tokens if s.mask_weight else tokens[:, :1])
            return found.reshape(size, -1, *found.shape[1:])

        def logs(tokens):
            return jax.nn.log_softmax(scores(params, tokens) / s.student_temperature, axis=-1)

        given = jax.lax.stop_gradient(scores(average, tokens(average, example.whole)))
        answer = self._answers(given[:, :, 0], params["centre"], example.weight)
        told = tokens(params, example.whole, example.hidden)
        whole = logs(told)
        seen = [whole[:, :, 0]] + ([logs(tokens(params, example.local)[:, :1])[:, :, 0]] if s.local_crops else [])
        cross = -jnp.einsum("btk,bsk->bts", answer, jnp.concatenate(seen, axis=1))
        others = 1 - jnp.eye(GLOBAL, cross.shape[2])
        loss = ((cross * others[None]).sum(axis=(1, 2)) / others.sum() * share).sum()
        mean = jnp.einsum("b,btk->k", share, answer) / GLOBAL
        entropy = -(answer * jnp.log(answer + 1e-9)).sum(-1).mean(1)
        sums = {
            "loss": loss,
            "teacher_entropy": (entropy * share).sum(),
            "prototype_entropy": -(mean * jnp.log(mean + 1e-9)).sum(),
            "centre": jnp.einsum("b,btk->k", share, given[:, :, 0]) / GLOBAL,
        }
        if s.mask_weight:
            patches = given[:, :, 1:].reshape(size, -1, given.shape[-1])
            wanted = self._answers(patches, params["patch_centre"], example.weight)
            hidden = example.hidden.reshape(size, -1)
            missed = -(wanted * whole[:, :, 1:].reshape(patches.shape)).sum(-1) * hidden
            sums["patch_loss"] = (missed.sum(-1) / jnp.maximum(hidden.sum(-1), 1) * share).sum()
            sums["loss"] += s.mask_weight * sums["patch_loss"]
            sums["patch_centre"] = jnp.einsum("b,btk->k", share, patches) / patches.shape[1]
        if s.pixel_weight:
            pixels = layers.patchify(example.whole.reshape(-1, *example.whole.shape[2:]), self.network.vit.patch_size)
            errors = jnp.square(self.network.told_pixels(params, told) - pixels)
            sums["pixel_loss"] = (errors.reshape(size, -1).mean(-1) * share).sum()
            sums["loss"] += s.pixel_weight * sums["pixel_loss"]
        return sums

    def _answers(self, given: jax.Array, centre: jax.Array, weight: jax.Array) -> jax.Array:
        """The teacher's answers to its outputs (B, G, K)."""
        if self.settings.balance == "sinkhorn":
            return _balanced(given / self.settings.teacher_temperature, weight)
        centre = jax.lax.stop_gradient(centre)
        return jax.nn.softmax((given - centre[None, None]) / self.settings.teacher_temperature, axis=-1)

    def settle(self, params: Any, sums: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        m = self.settings.center_momentum
        centres = {name: m * params[name] + (1 - m) * sums[name] for name in ("centre", "patch_centre") if name in sums}
        return params | centres, {name: value for name, value in sums.items() if name not in centres}

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
    masked = dino.mask_weight > 0 or dino.pixel_weight > 0
    network = SelfDistilled(vit, dino.hidden, dino.bottleneck, dino.prototypes, masked, dino.pixel_weight > 0)
    return SelfDistillation(network, settings.encoder.image_size, dino), {}
