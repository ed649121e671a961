"""Frozen networks: never differentiated, never checkpointed. Nothing ever falls back silently."""

from lumos_jax.encoders.image_encoder import ImageEncoder, make_encoder
from lumos_jax.encoders.latents import Autoencoder, make_autoencoder

__all__ = ["Autoencoder", "ImageEncoder", "make_autoencoder", "make_encoder"]
