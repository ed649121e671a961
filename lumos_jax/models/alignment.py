"""Representation alignment: hidden tokens of the transformer are pulled towards a frozen image encoder's patch tokens (REPA: Yu
et al. 2025, "Representation Alignment for Generation", arXiv 2410.06940).

    similarity = mean over patches p of cos(MLP(pool(h))_p, y_p)     h: tokens after a block; y: the encoder's, of the image
    loss       = diffusion loss - weight * similarity

Where the grids differ, h is pooled to the encoder's: targets stay what the encoder gave, and the tokens that cover a patch
predict it together, so that each is free to keep details of its own. Axis letters: B images, N tokens of the transformer, D
width, P patches of the encoder, C their features.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.models.layers import Dense

EPSILON = 1e-12  # added to squared norms


class Projector(nn.Module):
    """Hidden tokens (B, P, D) -> (B, P, features): three Linears with SiLU between them, 2 D wide. [REPA]"""

    features: int

    @nn.compact
    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        hidden = 2 * x_BPD.shape[-1]
        x = nn.silu(Dense(hidden, ("embed", "mlp"), name="fc1")(x_BPD))
        x = nn.silu(Dense(hidden, ("embed", "mlp"), name="fc2")(x))
        return Dense(self.features, ("embed", None), name="fc3")(x)


def pool(x_BND: jax.Array, grid: tuple[int, int], side: int) -> jax.Array:
    """Tokens of a grid (rows, columns) -> (B, side * side, D): each patch has the mean of the tokens that cover it, weighted by
    area: plain average pooling where `side` divides the grid."""
    if grid == (side, side):
        return x_BND
    rows, columns = (coverage(length, side) for length in grid)
    x = x_BND.astype(jnp.float32).reshape(-1, *grid, x_BND.shape[-1])
    x = jnp.einsum("pr,qc,brcd->bpqd", rows, columns, x)
    return x.reshape(-1, side * side, x_BND.shape[-1]).astype(x_BND.dtype)


def coverage(tokens: int, patches: int) -> np.ndarray:
    """(patches, tokens) float32: which share of each patch each token covers, on a side that either divides evenly."""
    patch, token = np.arange(patches + 1) / patches, np.arange(tokens + 1) / tokens
    ends = np.minimum(patch[1:, None], token[None, 1:])
    starts = np.maximum(patch[:-1, None], token[None, :-1])
    return (patches * np.maximum(ends - starts, 0.0)).astype(np.float32)


def similarity(tokens_BPC: jax.Array, target_BPC: jax.Array) -> jax.Array:
    """(B,) float32: mean cosine similarity over patches."""

    def unit(x):
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + EPSILON)

    return (unit(tokens_BPC) * unit(target_BPC)).sum(-1).mean(-1)
