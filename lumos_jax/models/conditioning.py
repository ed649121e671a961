"""What the transformer is conditioned on, and the embedders of timestep and condition tokens.

Axis letters: B batch, L condition tokens, C their features, V features of the vector, h w c latent, D width.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lumos_jax.models.layers import Dense, sinusoid, small


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """Every part is optional; a task fills those that it has.

    tokens: (B, L, C), seen through cross-attention.
    token_mask: (B, L) bool, True for tokens that are seen; None for all.
    vector: (B, V), projected and added to the timestep embedding.
    latent: (B, h, w, c), concatenated to the noisy latent on channels.
    """

    tokens: jax.Array | None = None
    token_mask: jax.Array | None = None
    vector: jax.Array | None = None
    latent: jax.Array | None = None


class TimestepEmbedder(nn.Module):
    """Network time (B,) in [0, 1000) -> (B, D) float32: sinusoid, Linear, SiLU, Linear.

    float32 throughout: it works on B rows only, and every layer's modulation hangs on it.
    """

    width: int

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        hidden = nn.silu(Dense(self.width, (None, "embed"), small, name="fc1")(sinusoid(t)))
        return Dense(self.width, ("embed", None), small, name="fc2")(hidden)


class SizeEmbedder(nn.Module):
    """An image's (height, width, height / width), in pixels, (B, 3) -> (B, D) float32, as the multi-scale network has it.

    Each number through a sinusoid and an MLP to D / 3 features; height and width share theirs.
    """

    width: int

    @nn.compact
    def __call__(self, size: jax.Array) -> jax.Array:
        sides, ratio = TimestepEmbedder(self.width // 3, name="side"), TimestepEmbedder(self.width // 3, name="ratio")
        return jnp.concatenate([sides(size[:, 0]), sides(size[:, 1]), ratio(size[:, 2])], axis=-1)


class TokenEmbedder(nn.Module):
    """Condition tokens (B, L, C) -> (B, L, D): Linear, tanh-GELU, Linear, in the dtype of the tokens."""

    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        hidden = nn.gelu(Dense(self.width, (None, "embed"), small, name="fc1")(tokens), approximate=True)
        return Dense(self.width, ("embed", None), small, name="fc2")(hidden)


def null_table(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The fixed random table that stands for "no condition": standard deviation 1 / sqrt(features), never trained."""
    return jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5
