"""What the transformer is conditioned on, and the embedders of timestep and condition tokens.

Axis letters: B batch, L condition tokens, C their features, V features of the vector, h w c latent, D width.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lumos_jax.models.layers import Dense, matmul, parameter, sinusoid, small, zeros

# What Condition.vector is, and what "no condition" makes of it:
#   linear   V features through one Linear; a learned null vector [RCG]
#   size     an image's (height, width, height / width), as the multi-scale T2I embeds it; kept [PixArt]
#   numbers  V numbers, each a sinusoid, through one MLP; kept [SVD]
#   class    (B, 1), a class of V; a learned row of the table, number V [DiT]
VECTOR_KINDS = ("linear", "size", "numbers", "class")
PARTS = ("tokens", "vector", "latent")  # of a Condition, that a task may drop one by one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """Every part is optional; a task fills those that it has.

    tokens: (B, L, C), seen through cross-attention. With a camera (B, L, C + camera) until
      `Network.project_camera`.
    token_mask: (B, L) bool, True for tokens that are seen; None for all.
    vector: (B, V), embedded and added to the timestep embedding; see VECTOR_KINDS.
    latent: (B, [F,] h, w, c), concatenated to the noisy latent on channels.
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

    Each number through a sinusoid and an MLP to D / 3 features; height and width share theirs. Where 3 does not divide D, the
    ratio has the rest.
    """

    width: int

    @nn.compact
    def __call__(self, size: jax.Array) -> jax.Array:
        third = self.width // 3
        sides, ratio = TimestepEmbedder(third, name="side"), TimestepEmbedder(self.width - 2 * third, name="ratio")
        return jnp.concatenate([sides(size[:, 0]), sides(size[:, 1]), ratio(size[:, 2])], axis=-1)


class NumbersEmbedder(nn.Module):
    """V numbers (B, V), each in about [0, 1000], -> (B, D) float32: their sinusoids side by side, Linear, SiLU, Linear.

    The last layer starts at zero, so that a network that gains it behaves as before. [SVD: its added time ids]
    """

    width: int

    @nn.compact
    def __call__(self, numbers: jax.Array) -> jax.Array:
        waves = jnp.concatenate([sinusoid(numbers[:, i]) for i in range(numbers.shape[1])], axis=-1)
        hidden = nn.silu(Dense(self.width, (None, "embed"), small, name="fc1")(waves))
        return Dense(self.width, ("embed", None), zeros, name="fc2")(hidden)


class ClassEmbedder(nn.Module):
    """Class numbers (B, 1), whole numbers in [0, classes], of which the last means "no class", -> (B, D) float32."""

    classes: int
    width: int

    @nn.compact
    def __call__(self, number: jax.Array) -> jax.Array:
        table = parameter(self, "table", small, (None, "embed"), (self.classes + 1, self.width))
        return table[number[:, 0].astype(jnp.int32)]


class CameraProjection(nn.Module):
    """Tokens with camera numbers (B, L, C + V) -> (B, L, C): a Linear that starts as the identity on the first C. [Zero123]

    With `turns`, each number v also turns the features f by a matrix of its own, zero at first: + sum_v v f W_v. Where content
    goes depends on where it is times how far the camera went; a sum of both does not have that product, and with the
    gradient of a shift at no turn being zero on average, a small network takes very long to find left from right.
    """

    features: int
    turns: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        def identity(_, shape, dtype):
            return jnp.eye(*shape, dtype=dtype)

        result = Dense(self.features, (None, None), identity, name="project")(tokens)
        if not self.turns:
            return result
        feature, camera = tokens[..., : self.features], tokens[..., self.features :]
        products = (camera[..., :, None] * feature[..., None, :]).reshape(*feature.shape[:-1], -1)
        turn = parameter(self, "turn", zeros, (None, None), (products.shape[-1], self.features))
        return result + matmul(products, turn, result.dtype)


class TokenEmbedder(nn.Module):
    """Condition tokens (B, L, C) -> (B, L, D): Linear, tanh-GELU, Linear, in the dtype of the tokens."""

    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        hidden = nn.gelu(Dense(self.width, (None, "embed"), small, name="fc1")(tokens), approximate=True)
        return Dense(self.width, ("embed", None), small, name="fc2")(hidden)


def vector_embedder(kind: str, dim: int, width: int) -> nn.Module:
    """The embedder of Condition.vector: kind is one of VECTOR_KINDS; dim is V, or the number of classes."""
    if kind == "linear":
        return Dense(width, (None, "embed"))
    if kind == "size":
        return SizeEmbedder(width)
    return NumbersEmbedder(width) if kind == "numbers" else ClassEmbedder(dim, width)


def null_table(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The fixed random table that stands for "no condition": standard deviation 1 / sqrt(features), never trained."""
    return jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5
