"""The frozen image encoder: uint8 images -> condition tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import config
from lumos_jax.encoders import frozen, whitening
from lumos_jax.encoders.placement import Placement, gather_of
from lumos_jax.encoders.preprocess import CLIP_STATISTICS, IMAGENET_STATISTICS, preprocess
from lumos_jax.encoders.vit import SIZES, Vit


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _standard(x: jax.Array) -> jax.Array:
    """The deviation with C - 1 in the denominator, as RCG (Li et al. 2024) standardizes MoCo-v3's features."""
    return (x - x.mean(-1, keepdims=True)) / jnp.maximum(x.std(-1, ddof=1, keepdims=True), 1e-6)


NORMALIZE = {"none": lambda x: x, "unit": _unit, "standard": _standard}  # what a token needs nothing else for
WHITE = "white"  # by the encoder's parameters


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """A ViT with its preprocessing and its choice of tokens; other fields as in config.Encoder.

    Attributes:
      identity: where the weights are from and a hash of them.
      place: how its parameters are laid out over devices; None: on one, or whole on each.
    """

    vit: Vit
    output: str
    normalize: str
    resize: int
    interpolation: str
    image_size: int
    dtype: str
    identity: str
    place: Placement | None = None

    @property
    def tokens(self) -> int:
        """L, condition tokens an image."""
        patches = (self.image_size // self.vit.patch_size) ** 2
        return {"cls": 1, "patch": patches, "all": 1 + patches, "pooled": 1}[self.output]

    @property
    def dim(self) -> int:
        """C, features a token."""
        return self.vit.head_dims[-1] if self.output == "pooled" else self.vit.width

    def apply(self, params: Any, image: jax.Array) -> jax.Array:
        """uint8 (B, H, W, 3) -> (B, L, C) float32, each token as `normalize` says."""
        statistics = CLIP_STATISTICS if self.vit.input_norm else IMAGENET_STATISTICS
        x = preprocess(image, self.resize, self.image_size, self.interpolation, statistics).astype(self.dtype)
        gather = gather_of(self.place)
        x = self.vit.apply(params, x, gather)
        if self.output == "pooled":
            head = gather({name: part for name, part in params.items() if name in ("head", "norm")})
            x = self.vit.project(head, x)[:, None]
        x = {"cls": x[:, :1], "patch": x[:, 1:]}.get(self.output, x).astype(jnp.float32)
        if self.normalize == WHITE:
            return whitening.apply(gather({"whitening": params["whitening"]})["whitening"], x)
        return NORMALIZE[self.normalize](x)


def make_encoder(encoder: config.Encoder, place: Placement | None = None) -> tuple[ImageEncoder, Any]:
    """The encoder that config.encoder names, and its parameters in the compute dtype.

    Args:
      encoder: config.encoder.
      place: as for `frozen.load`.

    Raises:
      ValueError: an encoder of text; weights that cannot be found, read or fitted; sizes that do not divide.
    """
    if encoder.kind in config.TEXT_KINDS:
        raise ValueError(
            f"config.encoder.kind={encoder.kind!r} reads text, and this task conditions on images: set vit"
        )
    vit, params, identity = frozen.load(
        "image-encoder",
        encoder.weights,
        random=lambda: vit_of(encoder),
        heads=encoder.heads,
        dtype=encoder.dtype,
        place=place,
    )
    if encoder.output == "pooled" and not vit.head:
        raise ValueError(
            f"config.encoder.output=pooled needs a network with a projection head (CLIP, MoCo-v3), which {encoder.weights} "
            "has not; choose cls, patch or all"
        )
    if encoder.normalize == WHITE and (encoder.output == "pooled" or not vit.whitened):
        raise ValueError(
            f"config.encoder.normalize=white needs weights that say how their tokens are whitened, and output cls, patch or "
            f"all: {encoder.weights}, output {encoder.output}, does not suit. `convert export --format=encoder` writes such "
            "weights; or choose unit, standard or none"
        )
    if encoder.image_size % vit.patch_size:
        raise ValueError(
            f"config.encoder.image_size={encoder.image_size} is not divisible by the patch size {vit.patch_size} of "
            f"{encoder.weights}"
        )
    made = ImageEncoder(
        vit,
        encoder.output,
        encoder.normalize,
        encoder.resize,
        encoder.interpolation,
        encoder.image_size,
        encoder.dtype,
        identity,
        place,
    )
    return made, params


def vit_of(encoder: config.Encoder) -> Vit:
    """The ViT that config.encoder describes.

    Raises:
      ValueError: its weights are not random, so that they and not the settings say what it looks like.
    """
    if not encoder.weights.startswith("random:"):
        raise ValueError(
            f"config.encoder.weights={encoder.weights!r}: a network that is to be trained is random:<seed> at first"
        )
    width, depth, heads = config.custom_size(encoder.size) or SIZES[encoder.size]
    return Vit(width, depth, heads, encoder.patch_size, encoder.image_size)
