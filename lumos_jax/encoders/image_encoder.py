"""The frozen image encoder: uint8 images -> condition tokens."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, name_rules
from lumos_jax.encoders import files, names
from lumos_jax.encoders.preprocess import preprocess
from lumos_jax.encoders.vit import SIZES, Vit

HEAD_DIM = 64  # of every DINO ViT: official files do not say how many heads there are


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """A ViT with its preprocessing and its choice of tokens.

    Attributes:
      identity: where the weights are from and a hash of them.
    """

    vit: Vit
    output: str
    normalize: bool
    resize: int
    image_size: int
    dtype: str
    identity: str

    @property
    def tokens(self) -> int:
        """L, condition tokens an image."""
        patches = (self.image_size // self.vit.patch_size) ** 2
        return {"cls": 1, "patch": patches, "all": 1 + patches}[self.output]

    @property
    def dim(self) -> int:
        """C, features a token."""
        return self.vit.width

    def apply(self, params: Any, image: jax.Array) -> jax.Array:
        """uint8 (B, H, W, 3) -> (B, L, C) float32; unit length a token if `normalize`."""
        x = preprocess(image, resize=self.resize, crop=self.image_size).astype(self.dtype)
        x = self.vit.apply(params, x).astype(jnp.float32)
        x = {"cls": x[:, :1], "patch": x[:, 1:], "all": x}[self.output]
        if self.normalize:
            x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return x


def make_encoder(encoder: config.Encoder) -> tuple[ImageEncoder, Any]:
    """The encoder that config.encoder names, and its parameters in the compute dtype.

    Raises:
      ValueError: weights that cannot be found, read or fitted; sizes that do not divide.
    """
    if encoder.weights.startswith("random:"):
        vit, params = _random(encoder)
        identity = encoder.weights
    else:
        vit, params = load_vit(encoder.weights, encoder.heads)
        identity = encoder.weights
    if encoder.image_size % vit.patch_size:
        raise ValueError(
            f"config.encoder.image_size={encoder.image_size} is not divisible by the patch size {vit.patch_size} of "
            f"{encoder.weights}"
        )
    flat = name_rules.flatten(params)
    made = ImageEncoder(
        vit,
        encoder.output,
        encoder.normalize,
        encoder.resize,
        encoder.image_size,
        encoder.dtype,
        f"{identity.rstrip('/').rsplit('/', 1)[-1]}@{files.content_hash(flat)}",
    )
    return made, jax.tree.map(lambda a: np.asarray(a).astype(jnp.dtype(encoder.dtype)), params)


def _random(encoder: config.Encoder) -> tuple[Vit, Any]:
    sizes = (encoder.width, encoder.depth, encoder.heads)
    width, depth, heads = sizes if encoder.size == "custom" else SIZES[encoder.size]
    vit = Vit(width, depth, heads, encoder.patch_size, encoder.image_size)
    seed = int(encoder.weights.removeprefix("random:"))
    return vit, jax.tree.map(np.asarray, jax.jit(vit.init)(jax.random.key(seed)))


def load_vit(weights: str, heads: int = 0) -> tuple[Vit, Any]:
    """A pre-trained ViT with official DINO names or Hugging Face names.

    Args:
      weights: directory, file or hub id.
      heads: only for files without a config; 0 takes width / 64.

    Raises:
      ValueError: as `files.locate`, `files.read` and `name_rules.convert` do.
    """
    state, told = files.read(files.locate(weights, "config.encoder.weights"), "model")
    state = names.bare_vit_names(state, weights)
    vit = vit_of({name: value.shape for name, value in state.items()}, told, heads, weights)
    shapes = name_rules.flatten(jax.eval_shape(vit.init, jax.random.key(0)))
    target = {path: leaf.shape for path, leaf in shapes.items()}
    flat, account = name_rules.convert(state, names.vit_rules(state), target, origin=weights)
    logging.getLogger(__name__).info("%s\n%s", weights, account.table())
    return vit, name_rules.unflatten(flat)


def vit_of(shapes: dict[str, tuple[int, ...]], told: dict[str, Any] | None, heads: int, origin: str) -> Vit:
    """The network's shape, from a Hugging Face config or, for official names, from the shapes of its arrays.

    Raises:
      ValueError: neither tells.
    """
    if told is not None:
        if told.get("model_type") != "vit":
            raise ValueError(
                f"{origin}: config.json says model_type={told.get('model_type')!r}; this encoder is a plain vit"
            )
        return Vit(
            told["hidden_size"],
            told["num_hidden_layers"],
            told["num_attention_heads"],
            told["patch_size"],
            told["image_size"],
            told["layer_norm_eps"],
            position_offset=0.0,
        )
    try:
        width, _, patch, _ = shapes["patch_embed.proj.weight"]
        side = math.isqrt(shapes["pos_embed"][1] - 1) * patch
    except (KeyError, ValueError, IndexError):
        raise ValueError(
            f"{origin} has neither a config.json nor official DINO names (patch_embed.proj.weight, pos_embed); it holds "
            f"{', '.join(list(shapes)[:5])} ..."
        ) from None
    depth = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")), default=-1)
    return Vit(width, depth, heads or max(width // HEAD_DIM, 1), patch, side)
