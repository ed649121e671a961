"""CLIP's text tower (Radford et al. 2021): a causal pre-norm transformer; one token's feature stands for the whole text.

Axes: B batch, L tokens, D width, H heads, K head dim, P projected width, V vocabulary. Layers are stacked and scanned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lumos_jax.encoders.vit import ACTIVATIONS, apply_blocks, init_blocks, keep

# Configs written before transformers 4.31 all say 2, whatever the tokenizer; there the end of text is the largest id.
LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class ClipText:
    """Shape of the network.

    Attributes:
      vocabulary: V, rows of the embedding table.
      positions: rows of the position table, the most tokens that a text can have.
      projection: P, width of the pooled feature; 0 if the weights have no projection.
      eos: id of the end-of-text token; 2 (legacy configs) stands for the largest id of each text.
      activation: "quick_gelu" (OpenAI's weights) or "gelu".
      eps: of the layer norms.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    vocabulary: int
    positions: int
    projection: int
    eos: int
    activation: str = "quick_gelu"
    eps: float = 1e-5

    @property
    def _block(self) -> _Block:
        return _Block(self.heads, self.mlp_width, self.activation, self.eps)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random float32 parameters: Flax's defaults; positions as strong as the words, so that tokens say where they are."""
        keys = jax.random.split(key, 4)
        x, mask = jnp.zeros((1, 1, self.width)), jnp.ones((1, 1, 1, 1), bool)
        params = {
            "embedding": 0.7 * jax.random.normal(keys[0], (self.vocabulary, self.width)),
            "positions": 0.7 * jax.random.normal(keys[1], (self.positions, self.width)),
            "blocks": init_blocks(self._block, keys[2], self.depth, x, mask),
            "norm": {"scale": jnp.ones(self.width), "bias": jnp.zeros(self.width)},
        }
        if self.projection:
            kernel = self.width**-0.5 * jax.random.normal(keys[3], (self.width, self.projection))
            params["projection"] = {"kernel": kernel}
        return params

    def apply(self, params: dict[str, Any], ids: jax.Array, mask: jax.Array, gather: Callable = keep) -> jax.Array:
        """Token ids (B, L) int32 in [0, V) and mask (B, L), nonzero where a token counts -> (B, L, D) after the last norm.

        The compute dtype is that of the parameters. A token attends to itself and to unmasked tokens before it.
        `gather` gathers parameters that are split over devices, a layer at a time.

        Raises:
          ValueError: more tokens than the position table has rows.
        """
        length = ids.shape[1]
        if length > self.positions:
            raise ValueError(f"{length} tokens, but this CLIP text encoder has {self.positions} positions")
        ends = gather({name: part for name, part in params.items() if name != "blocks"})
        x_BLD = jnp.asarray(ends["embedding"])[ids] + jnp.asarray(ends["positions"])[None, :length]
        x_BLD = apply_blocks(self._block, params["blocks"], gather, x_BLD, (mask != 0)[:, None, None, :])
        return nn.LayerNorm(epsilon=self.eps, dtype=x_BLD.dtype).apply({"params": ends["norm"]}, x_BLD)

    def pool(self, params: dict[str, Any], ids: jax.Array, tokens: jax.Array) -> jax.Array:
        """Ids (B, L) and what `apply` made of them (B, L, D) -> (B, P): the end-of-text token's feature, projected."""
        at = jnp.argmax(ids if self.eos == LEGACY_EOS else ids == self.eos, axis=1)  # the first of equals
        end_BD = jnp.take_along_axis(tokens, at[:, None, None], axis=1)[:, 0]
        return end_BD @ params["projection"]["kernel"]


class _Block(nn.Module):
    heads: int
    mlp_width: int
    activation: str
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        size, length, width = x.shape
        dtype = x.dtype
        # Two dims before every matmul with weights: the gradient of a three-dim one is slow on CPUs.
        x = x.reshape(size * length, width)
        h = nn.LayerNorm(epsilon=self.eps, dtype=dtype, name="norm1")(x)
        heads = (size, length, self.heads, width // self.heads)
        q, k, v = (nn.Dense(width, dtype=dtype, name=name)(h).reshape(heads) for name in "qkv")
        h = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True).reshape(size * length, width)
        x = x + nn.Dense(width, dtype=dtype, name="o")(h)
        h = nn.LayerNorm(epsilon=self.eps, dtype=dtype, name="norm2")(x)
        h = ACTIVATIONS[self.activation](nn.Dense(self.mlp_width, dtype=dtype, name="fc1")(h))
        x = x + nn.Dense(width, dtype=dtype, name="fc2")(h)
        return x.reshape(size, length, width)
