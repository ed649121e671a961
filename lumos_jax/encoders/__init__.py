"""Frozen networks: never differentiated, never checkpointed. Nothing ever falls back silently."""

from lumos_jax.encoders.image_encoder import ImageEncoder, make_encoder, vit_of
from lumos_jax.encoders.latents import Autoencoder, make_autoencoder
from lumos_jax.encoders.preprocess import IMAGENET_STATISTICS, normalise, preprocess
from lumos_jax.encoders.self_distillation import SelfDistilled
from lumos_jax.encoders.text_encoder import TextEncoder, load_tokenizer, make_text_encoder, make_tokenizer, tokenize
from lumos_jax.weights.placement import Placement

__all__ = [
    "IMAGENET_STATISTICS",
    "Autoencoder",
    "ImageEncoder",
    "Placement",
    "SelfDistilled",
    "TextEncoder",
    "load_tokenizer",
    "make_autoencoder",
    "make_encoder",
    "make_text_encoder",
    "make_tokenizer",
    "normalise",
    "preprocess",
    "tokenize",
    "vit_of",
]
