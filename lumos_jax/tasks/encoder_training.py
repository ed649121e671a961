"""What tasks that train an encoder share: a network that is replicated, layers of its heads, the contrastive loss, and which
networks a run leaves for others to load.

Axes: B batch, D width of the ViT, P width of what is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lumos_jax import config, encoders
from lumos_jax.encoders.vit import Vit
from lumos_jax.tasks.base import Task

UNCACHEABLE = "config.task.name={} trains on no frozen features: there is nothing to cache"


def linear(key: jax.Array, inner: int, outer: int) -> dict[str, jax.Array]:
    """Parameters of a linear layer."""
    return {"kernel": jax.random.normal(key, (inner, outer)) * inner**-0.5, "bias": jnp.zeros(outer)}


def apply_linear(layer: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """(B, inner) -> (B, outer)."""
    return x @ layer["kernel"] + layer["bias"][None]


def unit(x: jax.Array, axis: int) -> jax.Array:
    """Scales vectors along `axis` to length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=axis, keepdims=True) + 1e-12)


def info_nce(
    queries: jax.Array, keys: jax.Array, scale: jax.Array | float, weight: jax.Array, same: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The contrastive loss (InfoNCE: van den Oord et al. 2018): - log softmax_j(scale q_i . k_j) at j = i.

    Args:
      queries, keys: (B, P) of length 1; key i is the positive of query i, the others are its negatives.
      scale: the inverse of the temperature.
      weight: (B,); keys of weight 0 are no negatives.
      same: (B, B) bool, pairs that are no negatives of each other; None: there are none.

    Returns:
      (loss (B,), 1 (B,) where the positive is nearest, else 0).
    """
    logits = scale * queries @ keys.T
    left_out = jnp.broadcast_to(weight[None] == 0, logits.shape)
    left_out = left_out if same is None else left_out | same
    logits = jnp.where(left_out & ~jnp.eye(len(logits), dtype=bool), -jnp.inf, logits)
    positive = jnp.diagonal(logits)
    return jax.nn.logsumexp(logits, axis=1) - positive, (positive >= logits.max(axis=1)).astype(jnp.float32)


class EncoderNetwork:
    """A network with a ViT, small enough to be replicated; all of it trains."""

    vit: Vit

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Float32 parameters, those of the ViT as "vit"."""
        raise NotImplementedError

    def trainable(self) -> dict[str, Any]:
        """A tree like the parameters, of bool."""
        return jax.tree.map(lambda _: True, jax.eval_shape(self.init, jax.random.key(0)))

    def logical_axes(self) -> dict[str, Any]:
        """A tree like the parameters, of tuples without names."""
        return jax.tree.map(lambda leaf: (None,) * len(leaf.shape), jax.eval_shape(self.init, jax.random.key(0)))


class EncoderTask(Task):
    """A task whose network is an `EncoderNetwork`. side: of the images that its ViT sees, pixels."""

    evaluator: ClassVar[str] = "neighbors"
    network: EncoderNetwork
    side: int

    @classmethod
    def trained_encoders(cls, settings: config.Settings, params: Any) -> dict[str, tuple[Any, Any]]:
        return {"image-encoder": (encoders.vit_of(settings.encoder), params["vit"])}

    def features(self, params: Any, image: jax.Array) -> jax.Array:
        """uint8 (B, H, W, 3) -> [CLS] (B, D) of the uncropped image."""
        pixels = encoders.preprocess(image, self.side, "bilinear", encoders.IMAGENET_STATISTICS)
        return self.network.vit.apply(params["vit"], pixels)[:, 0]
