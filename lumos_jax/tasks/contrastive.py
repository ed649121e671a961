"""Contrastive training of an image and a text encoder on captioned images (CLIP: Radford et al. 2021, arXiv 2103.00020).

    u_i   = normalize(W [CLS] of image i),   v_j = normalize(W' end-of-text token of caption j)
    l_ij  = exp(s) u_i . v_j,   s learned, at most ln 100
    loss  = mean over i of  - (log softmax_j(l_ij) + log softmax_i(l_ij)) / 2  at j = i

Images whose captions are equal are no negatives of each other: short captions of scenes often are. Negatives are those of a
micro-batch.

Axes: B batch, S side, L tokens, P width of the text encoder and of what is compared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from lumos_jax import config, encoders
from lumos_jax.config.fields import at_least, rising
from lumos_jax.config.networks import size_of
from lumos_jax.encoders.clip_text import LEGACY_EOS, ClipText
from lumos_jax.encoders.vit import Vit
from lumos_jax.tasks import augmentation, t2i
from lumos_jax.tasks.base import Batch
from lumos_jax.tasks.encoder_training import UNCACHEABLE, EncoderNetwork, EncoderTask, info_nce, unit

FIRST_TEMPERATURE, LARGEST_SCALE = 0.07, 100.0


@dataclasses.dataclass(frozen=True)
class Settings(config.Task):
    """Contrastive image-text training (configs/contrastive.py). The ViT is the encoder group's."""

    crop_scale: Annotated[tuple[float, float], rising(1e-6, 1), "area of the random crop, as a share"] = (0.9, 1.0)
    text_size: Annotated[str, size_of("Ti", "S", "B", "L"), "of the text encoder"] = "512x12x8"
    max_tokens: Annotated[int, at_least(1), "token ids a caption, padding included"] = 77
    tokenizer: Annotated[
        str, 'directory, hub id, or "scenes", which comes with the package'
    ] = "openai/clip-vit-base-patch16"  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TwoTowers(EncoderNetwork):
    """The image encoder, whose head projects [CLS], and the text encoder; hashable."""

    vit: Vit
    text: ClipText

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Float32 parameters {"vit", "text", "log_scale" (1,)}."""
        keys = jax.random.split(key)
        scale = jnp.full(1, -jnp.log(FIRST_TEMPERATURE))
        return {"vit": self.vit.init(keys[0]), "text": self.text.init(keys[1]), "log_scale": scale}

    def embed_images(self, params: dict[str, Any], image: jax.Array) -> jax.Array:
        """Normalized images (B, S, S, 3) -> (B, P) of length 1."""
        return unit(self.vit.project(params["vit"], self.vit.apply(params["vit"], image)), -1)

    def embed_texts(self, params: dict[str, Any], tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Token ids and mask (B, L) -> (B, P) of length 1."""
        features = self.text.apply(params["text"], tokens, mask)
        return unit(self.text.pool(params["text"], tokens, features), -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """A batch: crops (B, S, S, 3), normalized; token ids and mask (B, L); weight (B,)."""

    image: jax.Array
    tokens: jax.Array
    mask: jax.Array
    weight: jax.Array


@dataclasses.dataclass(frozen=True)
class Contrastive(EncoderTask):
    """The contrastive task; batches hold `image` and `caption`. side: of the crops, pixels. settings: config.task."""

    name: ClassVar[str] = "contrastive"
    sample_type: ClassVar[str] = "captioned"
    evaluator: ClassVar[str] = "retrieval"
    uncacheable: ClassVar[str] = UNCACHEABLE.format(name)
    settings_class: ClassVar[type[config.Task]] = Settings
    network: TwoTowers
    side: int
    settings: Settings
    tokenizer: Any = dataclasses.field(compare=False)

    @classmethod
    def build(cls, settings: config.Settings, place: encoders.Placement | None) -> tuple[Contrastive, Any]:
        """Nothing is frozen. The ViT is the one that config.encoder describes for random weights."""
        network, tokenizer = _network(settings)
        return cls(network, settings.encoder.image_size, settings.task, tokenizer), {}

    @classmethod
    def trained_encoders(cls, settings: config.Settings, params: Any) -> dict[str, tuple[Any, Any]]:
        network, _ = _network(settings)
        return {"image-encoder": (network.vit, params["vit"]), "clip-text": (network.text, params["text"])}

    @property
    def host(self) -> Callable:
        return functools.partial(t2i.tokenize, self.tokenizer, self.settings.max_tokens)

    def describe(self) -> dict[str, str]:
        text = self.network.text
        return {"captions": f"{self.settings.max_tokens} tokens, {text.depth} layers of {text.width}"}

    def example(self, frozen: Any, batch: Batch, keys: Mapping[str, jax.Array]) -> Pairs:
        image = augmentation.view(keys["views"], batch["image"], self.side, self.settings.crop_scale)
        return Pairs(image, batch["tokens"], batch["token_mask"], batch["weight"])

    def losses(self, params: Any, ema: Any, example: Pairs, total: jax.Array, gather: Any) -> dict[str, jax.Array]:
        """`loss`; `image_accuracy` and `text_accuracy`, of the nearest caption of each image and of the nearest image of each
        caption in the batch; and `temperature`."""
        images = self.network.embed_images(params, example.image)
        texts = self.network.embed_texts(params, example.tokens, example.mask)
        same = (example.tokens[:, None] == example.tokens[None]).all(axis=-1)
        scale = jnp.exp(jnp.minimum(params["log_scale"][0], jnp.log(LARGEST_SCALE)))
        share = example.weight / total
        of_images, image_hits = info_nce(images, texts, scale, example.weight, same)
        of_texts, text_hits = info_nce(texts, images, scale, example.weight, same)
        return {
            "loss": ((of_images + of_texts) / 2 * share).sum(),
            "image_accuracy": (image_hits * share).sum(),
            "text_accuracy": (text_hits * share).sum(),
            "temperature": (share / scale).sum(),
        }

    def embed(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """A batch -> {"image", "text"} (B, P) of length 1, of uncropped images."""
        pixels = encoders.preprocess(batch["image"], self.side, "bilinear", encoders.IMAGENET_STATISTICS)
        texts = self.network.embed_texts(params, batch["tokens"], batch["token_mask"])
        return {"image": self.network.embed_images(params, pixels), "text": texts}


def _network(settings: config.Settings) -> tuple[TwoTowers, Any]:
    """Shapes of both encoders, and the tokenizer. Raises ValueError: a tokenizer whose texts have no end that is found."""
    task = settings.task
    tokenizer = encoders.load_tokenizer(task.tokenizer, "config.task.tokenizer")
    if tokenizer.eos_token_id in (None, LEGACY_EOS):
        raise ValueError(
            f"config.task.tokenizer={task.tokenizer!r}: the feature of a text is that of its end-of-text token, and this "
            f"tokenizer has none, or id {LEGACY_EOS}, which stands for the largest one; take another"
        )
    text = encoders.clip_text_of(task.text_size, tokenizer, task.max_tokens)
    vit = dataclasses.replace(encoders.vit_of(settings.encoder), head="linear", head_dims=(text.projection,))
    return TwoTowers(vit, text), tokenizer


TASK = Contrastive
