"""The condition of the transformer, and the embedders of timestep, tokens, vector and camera.

Axis letters: B batch, L condition tokens, C their features, V features of the vector, h w c latent, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lumos_jax.models.layers import Dense, Initializer, matmul, parameter, sinusoid, small, zeros

# What Condition.vector is, and its null condition:
#   linear   V features through one Linear; a learned null vector [RCG]
#   size     an image's (height, width, height / width), as the multi-scale T2I embeds it; kept [PixArt]
#   numbers  V numbers, each a sinusoid, through one MLP; kept [SVD]
#   class    (B, 1), a class of V; a learned row of the table, number V [DiT]
VECTOR_KINDS = ("linear", "size", "numbers", "class")
PARTS = ("tokens", "vector", "latent")  # of a Condition, which a task may drop one by one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """Every part is optional; a task fills those that it has.

    tokens: (B, L, C), for cross-attention. With a camera (B, L, C + camera_dim) until `Network.project_camera`.
    token_mask: (B, L) bool, True for tokens that are seen; None for all.
    vector: (B, V), embedded and added to the timestep embedding; see VECTOR_KINDS.
    latent: (B, [F,] h, w, c), concatenated to the noisy latent on channels.
    """

    tokens: jax.Array | None = None
    token_mask: jax.Array | None = None
    vector: jax.Array | None = None
    latent: jax.Array | None = None


class TwoLayers(nn.Module):
    """Linear, activation, Linear: (..., C) -> (..., D), in the dtype of the input."""

    width: int
    activation: Callable = nn.silu
    last_init: Initializer = small

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.activation(Dense(self.width, (None, "embed"), small, name="fc1")(x))
        return Dense(self.width, ("embed", None), self.last_init, name="fc2")(hidden)


class SizeEmbedder(nn.Module):
    """An image's (height, width, height / width), in pixels, (B, 3) -> (B, D) float32, as in the multi-scale network.

    Each number through an embedder of D / 3 features; height and width share theirs. The ratio has what 3 does not divide.
    """

    width: int

    @nn.compact
    def __call__(self, size_B3: jax.Array) -> jax.Array:
        third = self.width // 3
        side, ratio = TwoLayers(third, name="side"), TwoLayers(self.width - 2 * third, name="ratio")
        height, width, aspect = (sinusoid(size_B3[:, i]) for i in range(3))
        return jnp.concatenate([side(height), side(width), ratio(aspect)], axis=-1)


class ClassEmbedder(nn.Module):
    """Class numbers (B, 1), integers in [0, classes], of which the last means "no class", -> (B, D) float32."""

    classes: int
    width: int

    @nn.compact
    def __call__(self, class_B1: jax.Array) -> jax.Array:
        table = parameter(self, "table", small, (None, "embed"), (self.classes + 1, self.width))
        return table[class_B1[:, 0].astype(jnp.int32)]


def vector_embedder(kind: str, dim: int, width: int) -> nn.Module:
    """The embedder of Condition.vector: kind is one of VECTOR_KINDS; dim is V. That of "numbers" takes their sinusoids side by
    side (B, 256 V); its last layer starts at zero, so that a network that gains it behaves as before [SVD: added time ids]."""
    if kind == "linear":
        return Dense(width, (None, "embed"))
    if kind == "size":
        return SizeEmbedder(width)
    return TwoLayers(width, last_init=zeros) if kind == "numbers" else ClassEmbedder(dim, width)


class CameraProjection(nn.Module):
    """Tokens with V camera numbers (B, L, C + V) -> (B, L, C): a Linear that starts as the identity on the first C. [Zero123]

    With `turns` it is bilinear: each number v also turns the features f by a matrix of its own, zero at first, + sum_v v f W_v.
    Where content moves to depends on its position times the camera's motion, a product that a sum of both does not have.
    """

    features: int
    turns: bool

    @nn.compact
    def __call__(self, tokens_BLC: jax.Array) -> jax.Array:
        project = Dense(
            self.features, (None, None), lambda _, shape, dtype: jnp.eye(*shape, dtype=dtype), name="project"
        )
        result_BLC = project(tokens_BLC)
        if not self.turns:
            return result_BLC
        feature_BLC, camera_BLV = tokens_BLC[..., : self.features], tokens_BLC[..., self.features :]
        products = (camera_BLV[..., :, None] * feature_BLC[..., None, :]).reshape(*feature_BLC.shape[:-1], -1)
        turn = parameter(self, "turn", zeros, (None, None), (products.shape[-1], self.features))  # (V C, C)
        return result_BLC + matmul(products, turn, result_BLC.dtype)


def null_table(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The fixed random table of the null condition: standard deviation 1 / sqrt(features), never trained."""
    return jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5
