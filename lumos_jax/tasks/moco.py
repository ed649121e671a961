"""MoCo v3 (Chen et al. 2021, arXiv 2104.02057): an encoder trained on two views of each image, and a momentum encoder.

    k_v   = normalize(projector'([CLS]' of view v)),   ' the momentum encoder: the EMA
    q_v   = normalize(predictor(projector([CLS] of view v)))
    loss  = 2 t (InfoNCE(q_1, k_2) + InfoNCE(q_2, k_1)),   the temperature t, the negatives those of a micro-batch

Layers of both MLPs have no bias and a batch norm, by the statistics of the micro-batch, and all but the last one a ReLU. The
embedding of patches stays random, which keeps training stable (section 4.2); the momentum is constant, not raised to 1.

Axes: B batch, S side, D width of the ViT, P width of what is compared.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from lumos_jax import config, encoders
from lumos_jax.config.fields import Rule, above, between, rising
from lumos_jax.encoders.vit import BATCH_NORM_EPS, Vit
from lumos_jax.tasks import augmentation
from lumos_jax.tasks.base import Batch
from lumos_jax.tasks.encoder_training import UNCACHEABLE, EncoderNetwork, EncoderTask, info_nce, unit

VIEWS = 2
PROJECTOR_LAYERS, PREDICTOR_LAYERS = 3, 2


@dataclasses.dataclass(frozen=True)
class Settings(config.Task):
    """MoCo v3 (configs/moco.py). The ViT is the encoder group's, the momentum encoder the EMA."""

    crop_scale: Annotated[tuple[float, float], rising(1e-6, 1), "area of a view, as a share of the image's"] = (
        0.08,
        1.0,
    )
    mirror: Annotated[bool, "mirror half of the views"] = True
    jitter: Annotated[float, between(0, 1), "of brightness, contrast, saturation; half of it for color balance"] = 0.4
    temperature: Annotated[float, above(0), "of the contrastive loss"] = 0.2
    head: Annotated[
        tuple[int, int], Rule(lambda sizes: min(sizes) >= 1, "positive"), "widths: hidden layers, output"
    ] = (
        4096,
        256,
    )


@dataclasses.dataclass(frozen=True)
class Momentum(EncoderNetwork):
    """The ViT with its projector and predictor; hashable. hidden, output: widths of the MLPs."""

    vit: Vit
    hidden: int
    output: int

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Float32 parameters {"vit", "projector", "predictor"}."""
        keys = jax.random.split(key, 4)
        vit = self.vit.init(keys[0])
        vit["positions"] = 0.05 * jax.random.normal(keys[1], vit["positions"].shape)  # [CLS] would see nothing else
        projector = (self.vit.width, *[self.hidden] * (PROJECTOR_LAYERS - 1), self.output)
        predictor = (self.output, *[self.hidden] * (PREDICTOR_LAYERS - 1), self.output)
        return {"vit": vit, "projector": _init_mlp(keys[2], projector), "predictor": _init_mlp(keys[3], predictor)}

    def trainable(self) -> dict[str, Any]:
        """A tree like the parameters, of bool: False for the embedding of patches."""
        trainable = super().trainable()
        return trainable | {
            "vit": trainable["vit"] | {"patch": jax.tree.map(lambda _: False, trainable["vit"]["patch"])}
        }

    def project(self, params: dict[str, Any], image: jax.Array, weight: jax.Array) -> jax.Array:
        """Normalized images (B, S, S, 3) and weight (B,) -> the projector's output (B, P)."""
        vit = params["vit"] | {"patch": jax.lax.stop_gradient(params["vit"]["patch"])}
        return _apply_mlp(params["projector"], self.vit.apply(vit, image)[:, 0], weight)

    def predict(self, params: dict[str, Any], projection: jax.Array, weight: jax.Array) -> jax.Array:
        """The predictor's output (B, P) for the projector's."""
        return _apply_mlp(params["predictor"], projection, weight)


def _init_mlp(key: jax.Array, widths: tuple[int, ...]) -> dict[str, Any]:
    layers = {}
    for number, (inner, outer) in enumerate(itertools.pairwise(widths)):
        layer = {"kernel": jax.random.normal(jax.random.fold_in(key, number), (inner, outer)) * inner**-0.5}
        if number < len(widths) - 2:
            layer |= {"scale": jnp.ones(outer), "bias": jnp.zeros(outer)}
        layers[f"layer{number}"] = layer
    return layers


def _apply_mlp(layers: Mapping[str, Any], x: jax.Array, weight: jax.Array) -> jax.Array:
    """(B, inner) -> (B, outer). Rows of weight 0 do not count in the statistics of batch norms."""
    share = (weight / jnp.maximum(weight.sum(), 1.0))[:, None]
    for number in range(len(layers)):
        layer = layers[f"layer{number}"]
        x = x @ layer["kernel"]
        x = x - (x * share).sum(axis=0, keepdims=True)
        x = x * jax.lax.rsqrt((x * x * share).sum(axis=0, keepdims=True) + BATCH_NORM_EPS)
        if "scale" in layer:
            x = jax.nn.relu(x * layer["scale"][None] + layer["bias"][None])
    return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """Views of one batch (B, 2, S, S, 3), normalized; weight (B,)."""

    image: jax.Array
    weight: jax.Array


@dataclasses.dataclass(frozen=True)
class MomentumContrast(EncoderTask):
    """The MoCo task; batches hold `image`. side: of the views, pixels. settings: config.task."""

    name: ClassVar[str] = "moco"
    uncacheable: ClassVar[str] = UNCACHEABLE.format(name)
    settings_class: ClassVar[type[config.Task]] = Settings
    network: Momentum
    side: int
    settings: Settings

    @classmethod
    def build(cls, settings: config.Settings, place: encoders.Placement | None) -> tuple[MomentumContrast, Any]:
        """Nothing is frozen. The ViT is the one that config.encoder describes for random weights."""
        network = Momentum(encoders.vit_of(settings.encoder), *settings.task.head)
        return cls(network, settings.encoder.image_size, settings.task), {}

    def describe(self) -> dict[str, str]:
        return {"views": f"{VIEWS} of {self.side} px, temperature {self.settings.temperature:g}"}

    def example(self, frozen: Any, batch: Batch, keys: Mapping[str, jax.Array]) -> Views:
        s = self.settings
        numbered = [jax.random.fold_in(keys["views"], number) for number in range(VIEWS)]
        views = [augmentation.view(k, batch["image"], self.side, s.crop_scale, s.mirror, s.jitter) for k in numbered]
        return Views(jnp.stack(views, 1), batch["weight"])

    def losses(self, params: Any, ema: Any, example: Views, total: jax.Array, gather: Any) -> dict[str, jax.Array]:
        """`loss`; and `accuracy`, how often the nearest key of a query is that of its own image."""
        weight, temperature = example.weight, self.settings.temperature
        queries, keys = [], []
        for number in range(VIEWS):
            image = example.image[:, number]
            projection = self.network.project(params, image, weight)
            queries.append(unit(self.network.predict(params, projection, weight), -1))
            keys.append(jax.lax.stop_gradient(unit(self.network.project(ema, image, weight), -1)))
        found = [info_nce(q, k, 1 / temperature, weight) for q, k in zip(queries, reversed(keys), strict=True)]
        losses, hits = (sum(each) for each in zip(*found, strict=True))
        share = weight / total
        return {"loss": 2 * temperature * (losses * share).sum(), "accuracy": (hits * share).sum() / VIEWS}


TASK = MomentumContrast
