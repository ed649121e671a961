"""The frozen text encoder: token ids -> condition tokens, on the device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import config
from lumos_jax.encoders import frozen, tokenizer
from lumos_jax.encoders.clip_text import ClipText
from lumos_jax.encoders.placement import Placement, gather_of
from lumos_jax.encoders.t5 import T5Encoder
from lumos_jax.encoders.vit import SIZES

Network = T5Encoder | ClipText


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A text network with its choice of tokens.

    Attributes:
      settings: config.encoder; its dtype is that of the parameters and of the computation.
      identity: where the weights are from and a hash of them.
      place: how its parameters are laid out over devices; None: on one, or whole on each.
    """

    network: Network
    settings: config.Encoder
    identity: str
    place: Placement | None = None

    @property
    def tokens(self) -> int:
        """L, condition tokens a text."""
        return 1 if self.settings.output == "pooled" else self.settings.max_tokens

    @property
    def dim(self) -> int:
        """C, features a token."""
        return self.network.projection if self.settings.output == "pooled" else self.network.width

    def apply(self, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Token ids (B, max_tokens) and mask (nonzero where a token counts) -> (B, L, C) float32.

        Features are not normalized. At masked positions they mean nothing: whoever attends to them needs the mask too.
        """
        gather = gather_of(self.place)
        tokens = self.network.apply(params, ids, mask, gather)
        if self.settings.output == "pooled":
            tokens = self.network.pool(gather({"projection": params["projection"]}), ids, tokens)[:, None]
        return tokens.astype(jnp.float32)


def make_text_encoder(encoder: config.Encoder, place: Placement | None = None) -> tuple[TextEncoder, Any]:
    """The encoder that config.encoder names, and its parameters in the compute dtype.

    Args:
      encoder: config.encoder.
      place: as for `frozen.load`.

    Raises:
      ValueError: weights that cannot be found, read or fitted; an output or a length that they do not have.
    """
    if encoder.kind not in config.TEXT_KINDS:
        raise ValueError(f"config.encoder.kind={encoder.kind!r} reads no text: {' and '.join(config.TEXT_KINDS)} do")
    kind, random = frozen.KIND_OF[encoder.kind], functools.partial(_random_network, encoder)
    made = frozen.load(kind, encoder.weights, random=random, dtype=encoder.dtype, place=place)
    network = made.network
    if encoder.output == "pooled" and not getattr(network, "projection", 0):
        raise ValueError(f"config.encoder.output=pooled: {encoder.weights} has no text_projection; set output=all")
    if isinstance(network, ClipText) and encoder.max_tokens > network.positions:
        raise ValueError(
            f"config.encoder.max_tokens={encoder.max_tokens} exceeds the {network.positions} positions of {encoder.weights}"
        )
    return TextEncoder(network, encoder, made.identity, place), made.params


def _random_network(encoder: config.Encoder) -> Network:
    """Its vocabulary is the tokenizer's, rounded up to a multiple of 64."""
    width, depth, heads = config.custom_size(encoder.size) or SIZES[encoder.size]
    vocabulary = -(-len(tokenizer.load_tokenizer(encoder.tokenizer, "config.encoder.tokenizer")) // 64) * 64
    if encoder.kind == "t5":  # the MLP's share of the width is that of T5 v1.1 XXL
        return T5Encoder(width, depth, heads, width // heads, 5 * width // 2, vocabulary)
    length = encoder.max_tokens
    return ClipText(width, depth, heads, 4 * width, vocabulary, length, width, tokenizer.SCENE_EOS)
