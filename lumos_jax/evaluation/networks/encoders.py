"""Features of the frozen encoders: DINOv2, CLIP's image tower and the ViT that comes with the package; and the CLIP score.

dinov2     [CLS] of ViT-L/14 after the last norm, of images squashed to 224 (Stein et al. 2023, dgm-eval; EDM2)
clip       projected feature of unit length, of the center square at the network's side (CMMD, Jayasumana et al. 2024)
scene_vit  [CLS] of the shipped ViT, of images squashed to 32
CLIP score 100 cosine(image, "A photo depicts " + caption), shorter side to 224 (Hessel et al. 2021, without its 2.5)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config
from lumos_jax.encoders.image_encoder import CLIP_STATISTICS, IMAGENET_STATISTICS, NORMALIZE, normalize
from lumos_jax.encoders.text_encoder import make_text_encoder, make_tokenizer, tokenize
from lumos_jax.encoders.vit import Vit
from lumos_jax.evaluation.networks.resize import center_square, resize, shorter_side
from lumos_jax.evaluation.networks.weights import FLAG, Loaded, Weights, image_encoder, naming

DINOV2_SIDE = 224
CAPTION_PREFIX = "A photo depicts "


def load_dinov2(weights: Weights, protocol: str) -> Loaded:
    """uint8 (B, H, W, 3) -> [CLS] (B, 1024 of ViT-L/14). Raises ValueError for weights that are no DINOv2's."""
    vit, params = image_encoder("dinov2", weights)
    if not vit.layer_scale or vit.input_norm:
        raise ValueError(f"{FLAG}=dinov2={weights} is no DINOv2: its blocks have no layer scale")
    described = {"resize": f"squash {DINOV2_SIDE} bicubic antialiased", "scale": "imagenet", "layer": "cls"}
    return _cls(vit, params, DINOV2_SIDE, described)


def load_scene_vit(weights: str, protocol: str) -> Loaded:
    """uint8 (B, H, W, 3) -> [CLS] (B, 128). weights: empty takes those that come with the package."""
    vit, params = image_encoder("scene_vit", weights or "scenes")
    side = vit.trained_side
    return _cls(
        vit, params, side, {"resize": f"squash {side} bicubic antialiased", "scale": "imagenet", "layer": "cls"}
    )


def _cls(vit: Vit, params: Any, side: int, described: dict[str, Any]) -> Loaded:
    def apply(params, pixels):
        x = resize(pixels.astype(jnp.float32), side, side, "bicubic")
        return vit.apply(params, normalize(x, IMAGENET_STATISTICS))[:, 0]

    return Loaded(apply, params, vit.width, described)


def load_clip(weights: Weights, protocol: str) -> Loaded:
    """uint8 (B, H, W, 3) -> projected features (B, 768 of ViT-L/14) of unit length. Raises ValueError for weights without the
    projection."""
    vit, params = _clip_vision("clip", weights)

    def apply(params, pixels):
        x = resize(center_square(pixels).astype(jnp.float32), vit.trained_side, vit.trained_side, "bicubic", True)
        return _clip_embedding(vit, params, x)

    described = {
        "crop": "center square", "resize": f"{vit.trained_side} bicubic antialiased uint8", "scale": "clip",
        "layer": "projection", "normalize": "unit",
    }  # fmt: skip
    return Loaded(apply, params, vit.head_dims[-1], described)


def _clip_embedding(vit: Vit, params: Any, x: jax.Array) -> jax.Array:
    """Images (B, side, side, 3) in [0, 255] -> CLIP's projected features (B, P) of unit length."""
    return NORMALIZE["unit"](vit.project(params, vit.apply(params, normalize(x, CLIP_STATISTICS))))


def _clip_vision(network: str, weights: Weights) -> tuple[Vit, Any]:
    vit, params = image_encoder(network, weights)
    if not vit.input_norm or not vit.head:
        raise ValueError(f"{FLAG}={network}={weights} is no CLIP with its projection")
    return vit, params


class ClipScorer:
    """CLIP's two towers and tokenizer, of one Hugging Face directory or hub id.

    Attributes:
      params: {"image", "text"}.
    """

    def __init__(self, weights: str):
        self._vit, image = _clip_vision("clip_score", weights)
        settings = config.Encoder(kind="clip_text", weights=weights, output="pooled", max_tokens=1)
        with naming("clip_score"):
            self._text, text = make_text_encoder(settings)
            self._tokenizer = make_tokenizer(settings, self._text)
        self.params = {"image": image, "text": text}

    def tokens(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Prefixed captions as ids, cut to the text tower's positions with the end-of-text token kept."""
        captions = [CAPTION_PREFIX + caption for caption in captions]
        return tokenize(self._tokenizer, captions, self._text.network.positions)

    def apply(self, params: Any, pixels: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """uint8 (B, H, W, 3), ids and mask (B, L) -> 100 cosine, (B,)."""
        x = center_square(shorter_side(pixels.astype(jnp.float32), self._vit.trained_side))
        image = _clip_embedding(self._vit, params["image"], x)
        text = NORMALIZE["unit"](self._text.apply(params["text"], tokens, mask)[:, 0])
        return 100 * (image * text).sum(-1)
