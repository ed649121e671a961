"""The transformer's block and its final layer; `dit` has their equations.

Axis letters: B images (each frame of a clip is one), N tokens, D width, R rows of the batch (R = B without clips), F frames, L
condition tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lumos_jax.models import layers
from lumos_jax.models.attention import CrossAttention, SelfAttention
from lumos_jax.models.layers import Dense, modulated_norm, parameter, zeros

MODULATIONS = 6  # shift, scale, gate of attention, then of the MLP
MLP_MATMULS = ("mlp_hidden", "mlp_out")  # names by which remat policies know the results of an MLP's two matmuls
ACTIVATIONS = {"gelu_tanh": layers.gelu, "gelu": functools.partial(nn.gelu, approximate=False)}
FINALS = ("table", "adaln")


class Mlp(nn.Module):
    """(B, N, D) -> (B, N, D): Linear, GELU, Linear. activation: one of ACTIVATIONS."""

    hidden: int
    activation: str = "gelu_tanh"

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        hidden_BNM = checkpoint_name(Dense(self.hidden, ("embed", "mlp"), name="fc1")(x_BND), MLP_MATMULS[0])
        hidden_BNM = ACTIVATIONS[self.activation](hidden_BNM)
        return checkpoint_name(Dense(x_BND.shape[-1], ("mlp", "embed"), name="fc2")(hidden_BNM), MLP_MATMULS[1])


class Block(nn.Module):
    """One transformer block, (B, N, D) -> (B, N, D), in the form that nn.scan takes: returns (carry, None).

    Attributes:
      temporal: whether it has attention over frames.
      over_frames: for frames that several devices hold: (attend, h_RFND) -> attend(h) of all frames, see `Network.apply`.
      hardware: see attention.kernel_for.
    """

    heads: int
    mlp_hidden: int
    temporal: bool = False
    activation: str = "gelu_tanh"
    over_frames: Callable | None = None
    hardware: str = ""

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, s_BD: jax.Array, y_RLD: jax.Array | None, mask_RL: jax.Array | None, frames: int
    ) -> tuple[jax.Array, None]:
        """s: SiLU of the embedded time; y: embedded condition tokens; frames: F, or 0 for images, which skip the temporal
        layer."""
        width = x_BND.shape[-1]
        modulation = Dense(MODULATIONS * width, ("embed", "mlp"), zeros, out_dtype=jnp.float32, name="modulation")
        # (B, 6 D) -> six times (B, D), float32.
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation(s_BD), MODULATIONS, axis=-1)

        attention = SelfAttention(self.heads, hardware=self.hardware, name="attn")
        x_BND = gated(x_BND, gate_1, attention(modulated_norm(x_BND, shift_1, scale_1)))
        if self.temporal and frames:
            x_BND = x_BND + self._temporal(x_BND, frames)
        if y_RLD is not None:
            # All frames of a clip attend to its tokens: their queries are side by side, (R, F N, D).
            x_RMD = x_BND.reshape(y_RLD.shape[0], -1, width)
            x_RMD = x_RMD + CrossAttention(self.heads, name="cross")(x_RMD, y_RLD, mask_RL)
            x_BND = x_RMD.reshape(x_BND.shape)
        mlp = Mlp(self.mlp_hidden, self.activation, name="mlp")
        return gated(x_BND, gate_2, mlp(modulated_norm(x_BND, shift_2, scale_2))), None

    def _temporal(self, x_BND: jax.Array, frames: int) -> jax.Array:
        """Attention over the frames at each position: (B, N, D) -> (B, N, D)."""
        dtype = x_BND.dtype
        attention = SelfAttention(self.heads, zeros, name="temporal")

        def attend(h_RFND):
            rows, frames, tokens, width = h_RFND.shape
            where_FD = layers.sinusoid(jnp.arange(frames), width)
            h_RFND = (h_RFND.astype(jnp.float32) + where_FD[None, :, None]).astype(dtype)
            h = attention(h_RFND.transpose(0, 2, 1, 3).reshape(-1, frames, width))  # (R N, F, D)
            return h.reshape(rows, tokens, frames, width).transpose(0, 2, 1, 3)  # (R, F, N, D)

        h_RFND = layers.layer_norm(x_BND).astype(dtype).reshape(-1, frames, *x_BND.shape[1:])
        h_RFND = attend(h_RFND) if self.over_frames is None else self.over_frames(attend, h_RFND)
        return h_RFND.reshape(x_BND.shape)


def gated(x_BND: jax.Array, gate_BD: jax.Array, branch_BND: jax.Array) -> jax.Array:
    """x + gate * branch, summed in float32; gate is float32."""
    return (x_BND.astype(jnp.float32) + gate_BD[:, None] * branch_BND.astype(jnp.float32)).astype(x_BND.dtype)


class FinalLayer(nn.Module):
    """x (B, N, D), embedded time (B, D) -> (B, N, features) float32. kind: one of FINALS."""

    features: int
    kind: str

    @nn.compact
    def __call__(self, x_BND: jax.Array, s_BD: jax.Array) -> jax.Array:
        width = x_BND.shape[-1]
        if self.kind == "table":
            table_2D = parameter(self, "table", nn.initializers.normal(width**-0.5), (None, "embed"), (2, width))
            shift_BD, scale_BD = s_BD + table_2D[:1], s_BD + table_2D[1:]
        else:
            modulation = Dense(2 * width, ("embed", "mlp"), zeros, name="modulation")
            shift_BD, scale_BD = jnp.split(modulation(nn.silu(s_BD)), 2, axis=-1)
        project = Dense(self.features, ("embed", None), zeros, out_dtype=jnp.float32, name="out")
        return project(modulated_norm(x_BND, shift_BD, scale_BD))
