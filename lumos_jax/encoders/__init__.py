"""Frozen networks: never differentiated, never checkpointed. Nothing ever falls back silently."""

from lumos_jax.encoders.autoencoder import Autoencoder, make_autoencoder
from lumos_jax.encoders.frozen import Placement, same_content, with_moved_weights
from lumos_jax.encoders.image_encoder import (
    IMAGENET_STATISTICS,
    ImageEncoder,
    make_encoder,
    normalize,
    preprocess,
    vit_of,
)
from lumos_jax.encoders.text_encoder import (
    TextEncoder,
    clip_text_of,
    load_tokenizer,
    make_text_encoder,
    make_tokenizer,
    tokenize,
)

__all__ = [
    "IMAGENET_STATISTICS",
    "Autoencoder",
    "ImageEncoder",
    "Placement",
    "TextEncoder",
    "clip_text_of",
    "load_tokenizer",
    "make_autoencoder",
    "make_encoder",
    "make_text_encoder",
    "make_tokenizer",
    "normalize",
    "preprocess",
    "same_content",
    "tokenize",
    "vit_of",
    "with_moved_weights",
]
