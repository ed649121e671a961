"""Self-distillation without labels (DINO: Caron et al. 2021, arXiv 2104.14294): an encoder trained on images alone.

    teacher = EMA of the student
    head(x) = normalize(MLP(token)) . normalize(prototypes),   [CLS] for the image, the other tokens for patches
    p       = softmax((teacher(global crop) - center) / teacher temperature)
    loss    = mean over pairs of different crops of  - p . log softmax(student(crop) / student temperature)
    center <- m center + (1 - m) mean teacher output,  which keeps the teacher from collapsing to one output

`balance` = sinkhorn: the teacher's assignments are instead normalized so that the batch uses all prototypes equally (Caron et
al. 2020; DINOv2), which needs no center; small batches and short runs then do not collapse to a few clusters.
`mask_weight`: iBOT (Zhou et al. 2022), the student predicts the teacher's output at masked patches of its global crops, so that
patch tokens, and not [CLS] alone, carry where and what they are.
`pixel_weight`: a linear layer predicts from each token the pixels of its patch, masked or not (SimMIM: Xie et al. 2022, for
masked ones), so that features keep what a prior needs to reproduce the image.

Axes: B batch, G crops, S side, N patches, D width, K prototypes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from lumos_jax import config, encoders
from lumos_jax.config.fields import Rule, above, at_least, between, rising
from lumos_jax.encoders.vit import Vit
from lumos_jax.models import layers
from lumos_jax.tasks import augmentation
from lumos_jax.tasks.base import Batch
from lumos_jax.tasks.encoder_training import UNCACHEABLE, EncoderNetwork, EncoderTask, apply_linear, linear, unit

GLOBAL = 2  # crops that the teacher sees
SINKHORN_ROUNDS = 3
STUDENT_TEMPERATURE, CENTER_MOMENTUM = 0.1, 0.9


@dataclasses.dataclass(frozen=True)
class Settings(config.Task):
    """Self-distillation (configs/dino.py). The ViT is the encoder group's, the teacher the EMA."""

    global_scale: Annotated[tuple[float, float], rising(1e-6, 1), "area of the teacher's two crops, as a share"] = (
        0.4,
        1.0,
    )
    local_crops: Annotated[
        int, at_least(0), "smaller crops that only the student sees, 3/7 of the side: 96 of 224 px"
    ] = 6
    local_scale: Annotated[tuple[float, float], rising(1e-6, 1), "their area, as a share"] = (0.05, 0.4)
    mirror: Annotated[bool, "mirror half of the crops; without it features may tell left from right"] = True
    jitter: Annotated[float, between(0, 1), "of brightness, contrast, saturation; half of it for color balance"] = 0.4
    mask_weight: Annotated[float, at_least(0), "iBOT: weight of the teacher's output at masked patches; 0: none"] = 0.0
    mask_share: Annotated[tuple[float, float], rising(0, 1), "share of masked patches in each global crop"] = (0.1, 0.5)
    pixel_weight: Annotated[float, at_least(0), "weight of predicting the pixels of patches; 0: none"] = 0.0
    head: Annotated[
        tuple[int, int, int],
        Rule(lambda sizes: min(sizes) >= 1, "positive"),
        "widths: hidden layers, bottleneck, prototypes",
    ] = (2048, 256, 4096)
    teacher_temperature: Annotated[float, above(0), f"of its softmax; the student's is {STUDENT_TEMPERATURE}"] = 0.04
    balance: Annotated[Literal["center", "sinkhorn"], "how collapse is prevented: DINO's way or DINOv2's"] = "center"


@dataclasses.dataclass(frozen=True)
class SelfDistilled(EncoderNetwork):
    """Shapes of the ViT and of the head; hashable.

    hidden: width of the head's two hidden layers. bottleneck: features that are compared with the K prototypes. masked: whether
    patches may be masked; they have a center of their own. pixels: whether a layer predicts the pixels of each patch.
    """

    vit: Vit
    hidden: int
    bottleneck: int
    prototypes: int
    masked: bool = False
    pixels: bool = False

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Float32 parameters {"vit", "head", "centre"}, of masked networks {"mask", "patch_centre"}, and {"pixels"}."""
        keys, vit, width = jax.random.split(key, 5), self.vit, self.vit.width
        params = {"vit": vit.init(keys[0]), "centre": jnp.zeros(self.prototypes)}
        if not self.masked:  # large positions would be all that [CLS] sees; a masked patch has nothing else
            table = params["vit"]["positions"]
            params["vit"]["positions"] = 0.05 * jax.random.normal(keys[1], table.shape)
        sizes = enumerate(itertools.pairwise((width, self.hidden, self.hidden, self.bottleneck)))
        params["head"] = {f"layer{n}": linear(jax.random.fold_in(keys[2], n), *sides) for n, sides in sizes}
        params["head"]["prototypes"] = jax.random.normal(keys[3], (self.bottleneck, self.prototypes))
        if self.masked:
            params["mask"] = 0.02 * jax.random.normal(keys[4], (width,))
            params["patch_centre"] = jnp.zeros(self.prototypes)
        if self.pixels:
            params["pixels"] = linear(jax.random.fold_in(keys[4], 1), width, 3 * vit.patch_size**2)
        return params

    def trainable(self) -> dict[str, Any]:
        """A tree like the parameters, of bool: False for the centers, which follow the teacher's outputs."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree_util.tree_map_with_path(lambda path, _: "centre" not in path[0].key, shapes)

    def tokens(self, params: dict[str, Any], image: jax.Array, masked: jax.Array | None = None) -> jax.Array:
        """The ViT's tokens of images (B, S, S, 3), normalized: (B, 1 + N, D), [CLS] first. masked: (B, N) bool, patches in
        whose place a learned vector stands."""

        def hide(patches):
            return jnp.where(masked[..., None], params["mask"][None, None].astype(patches.dtype), patches)

        return self.vit.apply(params["vit"], image, hide=None if masked is None else hide)

    def scores(self, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """Cosines of the projections of tokens (B, T, D) with the prototypes, (B, T, K)."""
        x, head = tokens.reshape(-1, tokens.shape[-1]), params["head"]
        for name in ("layer0", "layer1"):
            x = jax.nn.gelu(apply_linear(head[name], x), approximate=False)
        x = unit(apply_linear(head["layer2"], x), -1) @ unit(head["prototypes"], 0)
        return x.reshape(*tokens.shape[:2], -1)

    def predict_pixels(self, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """Normalized pixels of each patch from its token: (B, 1 + N, D) -> (B, N, p p 3)."""
        size, count, width = tokens[:, 1:].shape
        return apply_linear(params["pixels"], tokens[:, 1:].reshape(-1, width)).reshape(size, count, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Crops:
    """Crops of one batch, normalized: large (B, 2, S, S, 3), local (B, n, s, s, 3) or None; masked: (B, 2, N) bool, patches of
    the large ones that the student does not see, or None; weight (B,)."""

    large: jax.Array
    local: jax.Array | None
    masked: jax.Array | None
    weight: jax.Array


@dataclasses.dataclass(frozen=True)
class SelfDistillation(EncoderTask):
    """The DINO task; batches hold `image`. side: of the global crops, pixels. settings: config.task."""

    name: ClassVar[str] = "dino"
    uncacheable: ClassVar[str] = UNCACHEABLE.format(name)
    network: SelfDistilled
    side: int
    settings_class: ClassVar[type[config.Task]] = Settings
    settings: Settings

    @classmethod
    def build(cls, settings: config.Settings, place: encoders.Placement | None) -> tuple[SelfDistillation, Any]:
        """Nothing is frozen. The ViT is the one that config.encoder describes for random weights."""
        vit, dino = encoders.vit_of(settings.encoder), settings.task
        masked = dino.mask_weight > 0 or dino.pixel_weight > 0
        network = SelfDistilled(vit, *dino.head, masked, dino.pixel_weight > 0)
        return cls(network, settings.encoder.image_size, dino), {}

    @property
    def local_side(self) -> int:
        """Side of the local crops in pixels: 3/7 of the global crops', rounded to whole patches."""
        patch = self.network.vit.patch_size
        return max(1, round(self.side * 3 / 7 / patch)) * patch

    def describe(self) -> dict[str, str]:
        s = self.settings
        return {
            "crops": f"{GLOBAL} of {self.side} px, {s.local_crops} of {self.local_side} px, {s.head[-1]} prototypes"
        }

    def example(self, frozen: Any, batch: Batch, keys: Mapping[str, jax.Array]) -> Crops:
        s, image = self.settings, batch["image"]

        def crop(number: int, side: int, scale: tuple[float, float]) -> jax.Array:
            key = jax.random.fold_in(keys["views"], number)
            return augmentation.view(key, image, side, scale, s.mirror, s.jitter)

        large = [crop(number, self.side, s.global_scale) for number in range(GLOBAL)]
        local = [crop(GLOBAL + number, self.local_side, s.local_scale) for number in range(s.local_crops)]
        local = jnp.stack(local, 1) if local else None
        return Crops(jnp.stack(large, 1), local, self._masks(keys, image.shape[0]), batch["weight"])

    def _masks(self, keys: Mapping[str, jax.Array], size: int) -> jax.Array | None:
        """Which patches of the global crops the student does not see, (B, GLOBAL, N) bool."""
        if not self.network.masked:
            return None
        share, each = jax.random.split(jax.random.fold_in(keys["views"], GLOBAL + self.settings.local_crops))
        low, high = self.settings.mask_share
        patches = (self.side // self.network.vit.patch_size) ** 2
        share = jax.random.uniform(share, (size, GLOBAL, 1), minval=low, maxval=high)
        return jax.random.uniform(each, (size, GLOBAL, patches)) < share

    def losses(self, params: Any, ema: Any, example: Crops, total: jax.Array, gather: Any) -> dict[str, jax.Array]:
        """`loss`; `patch_loss` and `pixel_loss` where their weights are set; `teacher_entropy` of the assignment of one crop
        and `prototype_entropy` of the batch's mean assignment, in nats, which is 0 if the teacher has collapsed; and the mean
        outputs `centre` and `patch_centre` (K,), which `post_update` takes."""
        s, size = self.settings, example.weight.shape[0]
        share = example.weight / total

        def tokens(weights, crops, masked=None):
            """(B G, 1 + N, D)."""
            flat = crops.reshape(-1, *crops.shape[2:])
            return self.network.tokens(weights, flat, None if masked is None else masked.reshape(-1, masked.shape[-1]))

        def scores(weights, tokens):
            """(B, G, 1 + N, K), or (B, G, 1, K) without the loss of patches."""
            found = self.network.scores(weights, tokens if s.mask_weight else tokens[:, :1])
            return found.reshape(size, -1, *found.shape[1:])

        def log_probabilities(tokens):
            return jax.nn.log_softmax(scores(params, tokens) / STUDENT_TEMPERATURE, axis=-1)

        # The teacher sees every patch, the student only those that are not masked.
        teacher = jax.lax.stop_gradient(scores(ema, tokens(ema, example.large)))
        assigned = self._assign(teacher[:, :, 0], params["centre"], example.weight)
        student_tokens = tokens(params, example.large, example.masked)
        student = log_probabilities(student_tokens)
        crops = [student[:, :, 0]]
        if s.local_crops:
            crops.append(log_probabilities(tokens(params, example.local)[:, :1])[:, :, 0])
        cross = -jnp.einsum("btk,bsk->bts", assigned, jnp.concatenate(crops, axis=1))
        pairs = 1 - jnp.eye(GLOBAL, cross.shape[2])  # of different crops
        loss = ((cross * pairs[None]).sum(axis=(1, 2)) / pairs.sum() * share).sum()
        mean = jnp.einsum("b,btk->k", share, assigned) / GLOBAL
        entropy = -(assigned * jnp.log(assigned + 1e-9)).sum(-1).mean(1)
        sums = {
            "loss": loss,
            "teacher_entropy": (entropy * share).sum(),
            "prototype_entropy": -(mean * jnp.log(mean + 1e-9)).sum(),
            "centre": jnp.einsum("b,btk->k", share, teacher[:, :, 0]) / GLOBAL,
        }
        if s.mask_weight:
            patches = teacher[:, :, 1:].reshape(size, -1, teacher.shape[-1])
            assigned = self._assign(patches, params["patch_centre"], example.weight)
            masked = example.masked.reshape(size, -1)
            cross = -(assigned * student[:, :, 1:].reshape(patches.shape)).sum(-1) * masked
            sums["patch_loss"] = (cross.sum(-1) / jnp.maximum(masked.sum(-1), 1) * share).sum()
            sums["loss"] += s.mask_weight * sums["patch_loss"]
            sums["patch_centre"] = jnp.einsum("b,btk->k", share, patches) / patches.shape[1]
        if s.pixel_weight:
            pixels = layers.patchify(example.large.reshape(-1, *example.large.shape[2:]), self.network.vit.patch_size)
            errors = jnp.square(self.network.predict_pixels(params, student_tokens) - pixels)
            sums["pixel_loss"] = (errors.reshape(size, -1).mean(-1) * share).sum()
            sums["loss"] += s.pixel_weight * sums["pixel_loss"]
        return sums

    def _assign(self, output: jax.Array, center: jax.Array, weight: jax.Array) -> jax.Array:
        """The teacher's probabilities of prototypes from its outputs (B, G, K)."""
        if self.settings.balance == "sinkhorn":
            return _sinkhorn(output / self.settings.teacher_temperature, weight)
        center = jax.lax.stop_gradient(center)[None, None]
        return jax.nn.softmax((output - center) / self.settings.teacher_temperature, axis=-1)

    def post_update(self, params: Any, sums: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        m = CENTER_MOMENTUM
        centers = {name: m * params[name] + (1 - m) * sums[name] for name in ("centre", "patch_centre") if name in sums}
        return params | centers, {name: value for name, value in sums.items() if name not in centers}


def _sinkhorn(logits: jax.Array, weight: jax.Array) -> jax.Array:
    """Probabilities (B, G, K) that use every prototype equally over the batch (Sinkhorn-Knopp); rows of weight 0 do not
    count."""
    prototypes = logits.shape[-1]
    plan = jnp.exp(logits - logits.max()).reshape(-1, prototypes) * jnp.repeat(weight, logits.shape[1])[:, None]
    for _ in range(SINKHORN_ROUNDS):
        plan = plan / (plan.sum(axis=0, keepdims=True) * prototypes + 1e-12)
        plan = plan / (plan.sum(axis=1, keepdims=True) + 1e-12)
    return plan.reshape(logits.shape)


TASK = SelfDistillation
