"""What the transformer is stacked of: the block and the final layer; their equations stand at the top of `dit`.

Axis letters: B batch, F frames, N tokens, D width, L condition tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lumos_jax.models import layers
from lumos_jax.models.attention import CrossAttention, SelfAttention
from lumos_jax.models.layers import Dense, modulated_norm, parameter, zeros

MODULATIONS = 6  # shift, scale, gate of attention, then of the MLP


MLP_PRODUCTS = ("mlp_hidden", "mlp_out")  # names by which remat policies know the two products of an MLP
ACTIVATIONS = {"gelu_tanh": layers.gelu, "gelu": functools.partial(nn.gelu, approximate=False)}


class Mlp(nn.Module):
    """(B, N, D) -> (B, N, D): Linear, GELU, Linear; activation is one of ACTIVATIONS; rounded as of layers.matmul."""

    hidden: int
    activation: str = "gelu_tanh"
    rounded: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = checkpoint_name(
            Dense(self.hidden, ("embed", "mlp"), rounded=self.rounded, name="fc1")(x), MLP_PRODUCTS[0]
        )
        out = Dense(x.shape[-1], ("mlp", "embed"), rounded=self.rounded, name="fc2")(
            ACTIVATIONS[self.activation](hidden)
        )
        return checkpoint_name(out, MLP_PRODUCTS[1])


class Block(nn.Module):
    """One transformer block, (B F, N, D) -> (B F, N, D); cross-attends where there are condition tokens."""

    heads: int
    mlp_hidden: int
    temporal: bool = False
    activation: str = "gelu_tanh"
    spread: Any = None  # models.dit.Spread, where frames are split over devices
    rounded: str = "none"  # the products of the MLP, as of layers.matmul
    hardware: str = ""  # as of SelfAttention

    @nn.compact
    def __call__(
        self, x: jax.Array, s: jax.Array, y: jax.Array | None, mask: jax.Array | None, frames: int = 0
    ) -> jax.Array:
        """x (B F, N, D), s = SiLU of the embedded time (B F, D), y embedded tokens (B, L, D), mask (B, L); frames: F, or 0 for
        pictures, which pass the temporal layer by."""
        width = x.shape[-1]
        modulate = Dense(MODULATIONS * width, ("embed", "mlp"), zeros, out_dtype=jnp.float32, name="modulation")
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulate(s), MODULATIONS, axis=-1)
        attended = SelfAttention(self.heads, hardware=self.hardware, name="attn")(modulated_norm(x, shift_1, scale_1))
        x = gated(x, gate_1, attended)
        if self.temporal and frames:
            x = x + self._over_frames(x, frames)
        if y is not None:
            # All frames of a clip see its tokens: their queries stand side by side.
            queries = x.reshape(y.shape[0], -1, width)
            x = (queries + CrossAttention(self.heads, name="cross")(queries, y, mask)).reshape(x.shape)
        mlp = Mlp(self.mlp_hidden, self.activation, self.rounded, name="mlp")
        return gated(x, gate_2, mlp(modulated_norm(x, shift_2, scale_2)))

    def _over_frames(self, x: jax.Array, frames: int) -> jax.Array:
        """Attention over the frames of each place: (B F, N, D) -> (B F, N, D)."""
        h = layers.layer_norm(x).astype(x.dtype).reshape(-1, frames, *x.shape[1:])
        attention = SelfAttention(self.heads, zeros, name="temporal")

        def attend(h):
            size, frames, tokens, width = h.shape
            where = layers.sinusoid(jnp.arange(frames), width)
            h = (h.astype(jnp.float32) + where[None, :, None]).astype(x.dtype)
            h = attention(h.transpose(0, 2, 1, 3).reshape(-1, frames, width))
            return h.reshape(size, tokens, frames, width).transpose(0, 2, 1, 3)

        h = attend(h) if self.spread is None else self.spread.over_frames(attend, h)
        return h.reshape(x.shape)


def gated(x: jax.Array, gate: jax.Array, branch: jax.Array) -> jax.Array:
    """x + gate * branch, summed in float32. x, branch: (B, N, D); gate: (B, D) float32."""
    return (x.astype(jnp.float32) + gate[:, None] * branch.astype(jnp.float32)).astype(x.dtype)


FINALS = ("table", "adaln")


class FinalLayer(nn.Module):
    """x (B, N, D), embedded time (B, D) -> (B, N, features) float32; kind is one of FINALS."""

    features: int
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array, s: jax.Array) -> jax.Array:
        width = x.shape[-1]
        if self.kind == "table":
            table = parameter(self, "table", nn.initializers.normal(width**-0.5), (None, "embed"), (2, width))
            shift, scale = s + table[:1], s + table[1:]
        else:
            modulate = Dense(2 * width, ("embed", "mlp"), zeros, name="modulation")
            shift, scale = jnp.split(modulate(nn.silu(s)), 2, axis=-1)
        project = Dense(self.features, ("embed", None), zeros, out_dtype=jnp.float32, name="out")
        return project(modulated_norm(x, shift, scale))
