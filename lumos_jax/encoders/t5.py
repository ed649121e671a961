"""The encoder of T5 v1.1 and Flan-T5 (Raffel et al. 2020; Shazeer 2020; Chung et al. 2022): what Lumos T2I reads captions with.

Pre-norm, RMS norms in float32, no biases, gated tanh-GELU, attention scores not scaled, a learned bias by relative position
that all layers share, float32 softmax.

Axes: B batch, L tokens, D width, H heads, K head dim, V vocabulary, R position buckets. Layers are stacked and scanned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.encoders.vit import apply_blocks, init_blocks, keep


@dataclasses.dataclass(frozen=True)
class T5Encoder:
    """Shape of the network.

    Attributes:
      head_dim: K; H K need not be the width.
      mlp_width: of each of the two branches of the gated MLP.
      vocabulary: V, rows of the embedding table.
      buckets: R, half of them for keys before the query, half for keys after it.
      max_distance: tokens from which on all distances share the last bucket.
      eps: of the RMS norms.
    """

    width: int
    depth: int
    heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    @property
    def _block(self) -> _Block:
        return _Block(self.heads, self.head_dim, self.mlp_width, self.eps)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random float32 parameters: Mesh TensorFlow's scales, but position biases of std 1: heads distinguish neighbors."""
        keys = jax.random.split(key, 3)
        x, bias, mask = jnp.zeros((1, 1, self.width)), jnp.zeros((1, self.heads, 1, 1)), jnp.ones((1, 1, 1, 1), bool)
        return {
            "embedding": jax.random.normal(keys[0], (self.vocabulary, self.width)),
            "relative_bias": jax.random.normal(keys[1], (self.buckets, self.heads)),
            "blocks": init_blocks(self._block, keys[2], self.depth, x, bias, mask),
            "norm": {"scale": jnp.ones(self.width)},
        }

    def apply(self, params: dict[str, Any], ids: jax.Array, mask: jax.Array, gather: Callable = keep) -> jax.Array:
        """Token ids (B, L) int32 in [0, V) and mask (B, L), nonzero where a token counts -> (B, L, D) after the last norm.

        The compute dtype is that of the parameters. No token attends to a masked one; what comes out at masked positions means
        nothing, and is finite. `gather` gathers parameters that are split over devices, a layer at a time.
        """
        x_BLD = jnp.asarray(gather(params["embedding"]))[ids]
        dtype = x_BLD.dtype
        table = jnp.asarray(gather(params["relative_bias"])).astype(jnp.float32)
        buckets = relative_buckets(ids.shape[1], self.buckets, self.max_distance)
        bias_1HLL = table[buckets].transpose(2, 0, 1)[None]
        mask_B11L = (mask != 0)[:, None, None, :]
        x_BLD = apply_blocks(self._block, params["blocks"], gather, x_BLD, bias_1HLL, mask_B11L)
        return nn.RMSNorm(epsilon=self.eps, dtype=dtype).apply({"params": gather(params["norm"])}, x_BLD)


class _Block(nn.Module):
    heads: int
    head_dim: int
    mlp_width: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        size, length, width = x.shape
        inner, dtype = self.heads * self.head_dim, x.dtype

        def dense(features: int, name: str, h: jax.Array, std: float) -> jax.Array:
            init = nn.initializers.normal(std)
            return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init, name=name)(h)

        h = nn.RMSNorm(epsilon=self.eps, dtype=dtype, name="norm1")(x)
        # Queries start small by sqrt(K) because the scores are not divided by it.
        stds = {"q": (width * self.head_dim) ** -0.5, "k": width**-0.5, "v": width**-0.5}
        q, k, v = (
            dense(inner, name, h, std).reshape(size, length, self.heads, self.head_dim) for name, std in stds.items()
        )
        h = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0).reshape(size, length, inner)
        x = x + dense(width, "o", h, inner**-0.5)
        h = nn.RMSNorm(epsilon=self.eps, dtype=dtype, name="norm2")(x)
        gate = nn.gelu(dense(self.mlp_width, "wi_0", h, width**-0.5), approximate=True)
        return x + dense(width, "wo", gate * dense(self.mlp_width, "wi_1", h, width**-0.5), self.mlp_width**-0.5)


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """(L, L) int32 in [0, R): the bucket of key position minus query position, queries along the first axis.

    The first half of the buckets is for keys at or before the query, the second for keys after it. Of each half, the first half
    counts tokens one by one; the rest grows logarithmically up to max_distance, and the last bucket takes all beyond.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    side = buckets // 2
    exact = side // 2
    distance = np.abs(offset)
    # float32, as the networks were trained: a float64 quotient may fall on the other side of a bucket's edge.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, side - 1))
    return (bucket + side * (offset > 0)).astype(np.int32)
