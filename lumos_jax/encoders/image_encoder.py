"""The frozen image encoder: uint8 images -> resized (antialiased), center crop, normalized -> condition tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config
from lumos_jax.encoders import frozen, whitening
from lumos_jax.encoders.frozen import ON_HOST, Placement
from lumos_jax.encoders.vit import SIZES, Vit

# Mean and standard deviation of each channel, of values in [0, 1].
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

_METHODS = {"bilinear": "linear", "bicubic": "cubic"}


NORMALIZE = {  # "white", besides, is done by the encoder's parameters
    "none": lambda x: x,
    "unit": lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12),
    # The deviation with C - 1 in the denominator, as RCG (Li et al. 2024) standardizes MoCo-v3's features.
    "standard": lambda x: (x - x.mean(-1, keepdims=True)) / jnp.maximum(x.std(-1, ddof=1, keepdims=True), 1e-6),
}


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """A ViT with its preprocessing and its choice of tokens.

    Attributes:
      settings: config.encoder.
      identity: where the weights are from and a hash of them.
      place: how its parameters are laid out over devices.
    """

    vit: Vit
    settings: config.Encoder
    identity: str
    place: Placement = ON_HOST
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        """L, condition tokens an image."""
        patches = (self.settings.image_size // self.vit.patch_size) ** 2
        return {"cls": 1, "patch": patches, "all": 1 + patches, "pooled": 1}[self.settings.output]

    @property
    def dim(self) -> int:
        """C, features a token."""
        return self.vit.head_dims[-1] if self.settings.output == "pooled" else self.vit.width

    def apply(self, params: Any, image: jax.Array) -> jax.Array:
        """uint8 (B, H, W, 3) -> (B, L, C) float32, each token as `normalize` says."""
        statistics = CLIP_STATISTICS if self.vit.input_norm else IMAGENET_STATISTICS
        settings, gather = self.settings, self.place.gather
        x = preprocess(image, settings.image_size, settings.interpolation, statistics)
        x = self.vit.apply(params, x.astype(self.dtype), gather)
        if settings.output == "pooled":
            head = gather({name: part for name, part in params.items() if name in ("head", "norm")})
            x = self.vit.project(head, x)[:, None]
        x = {"cls": x[:, :1], "patch": x[:, 1:]}.get(settings.output, x).astype(jnp.float32)
        if settings.normalize == "white":
            return whitening.apply(gather({"whitening": params["whitening"]})["whitening"], x)
        return NORMALIZE[settings.normalize](x)


def make_encoder(
    encoder: config.Encoder, place: Placement | None = None, dtype: str = "float32"
) -> tuple[ImageEncoder, Any]:
    """The encoder that config.encoder or config.align.encoder names, and its parameters; place, dtype: as for `frozen.load`.
    Raises ValueError: an encoder of text; weights that cannot be found, read or fitted; sizes that do not divide."""
    if encoder.kind in config.TEXT_KINDS:
        raise ValueError(f"{encoder.group}.kind={encoder.kind} reads text, and this task conditions on images: set vit")
    options = {"random": lambda: vit_of(encoder), "dtype": dtype, "place": place, "field": f"{encoder.group}.weights"}
    vit, params, identity = frozen.load("image-encoder", encoder.weights, **options)
    if encoder.output == "pooled" and not vit.head:
        raise ValueError(
            f"{encoder.group}.output=pooled needs a network with a projection head (CLIP, MoCo-v3), which {encoder.weights} "
            "has not; choose cls, patch or all"
        )
    if encoder.normalize == "white" and (encoder.output == "pooled" or not vit.whitened):
        raise ValueError(
            f"{encoder.group}.normalize=white needs weights that say how their tokens are whitened, and output cls, patch or "
            f"all: {encoder.weights}, output {encoder.output}, does not suit. `convert export --format=encoder` writes such "
            "weights; or choose unit, standard or none"
        )
    if encoder.image_size % vit.patch_size:
        raise ValueError(
            f"{encoder.group}.image_size={encoder.image_size} is not divisible by the patch size {vit.patch_size} of "
            f"{encoder.weights}"
        )
    return ImageEncoder(vit, encoder, identity, place or ON_HOST, dtype), params


def vit_of(encoder: config.Encoder) -> Vit:
    """The ViT that config.encoder describes. Raises ValueError if weights that are not random say what it looks like."""
    if not encoder.weights.startswith("random:"):
        raise ValueError(
            f"config.encoder.weights={encoder.weights!r}: a network that is to be trained is random:<seed> at first"
        )
    width, depth, heads = config.custom_size(encoder.size) or SIZES[encoder.size.partition("/")[0]]
    return Vit(width, depth, heads, encoder.patch_size, encoder.image_size)


def preprocess(image: jax.Array, side: int, interpolation: str, statistics) -> jax.Array:
    """uint8 (B, H, W, 3) -> float32 (B, side, side, 3), normalized.

    Agrees with Pillow's antialiased resize to one gray level (Pillow rounds between its two passes).

    Args:
      side: pixels to which the shorter side is resized, and of the center crop.
      interpolation: bilinear | bicubic.
      statistics: (mean, standard deviation) of the channels in [0, 1].
    """
    x, short = image.astype(jnp.float32), min(image.shape[1:3])
    height, width = (int(length * side / short) for length in image.shape[1:3])
    for shape in ((x.shape[0], x.shape[1], width, 3), (x.shape[0], height, width, 3)):
        if x.shape != shape:  # columns first, and clipped in between (a cubic kernel overshoots), as Pillow does it
            x = jnp.clip(jax.image.resize(x, shape, _METHODS[interpolation], antialias=True), 0, 255)
    top, left = round((height - side) / 2), round((width - side) / 2)
    return normalize(x[:, top : top + side, left : left + side], statistics)


def normalize(x: jax.Array, statistics) -> jax.Array:
    """float32 (B, H, W, 3) in [0, 255] -> zero mean and unit deviation by `statistics`, as for `preprocess`."""
    mean, std = 255 * np.array(statistics, np.float32)
    return (x - mean[None, None, None]) / std[None, None, None]
