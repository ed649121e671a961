"""The network that DINO trains (Caron et al. 2021): a ViT, a projection head over prototypes, and the centre of its outputs.

    head(x) = normalise(MLP([CLS])) . normalise(prototypes)

Axes: B batch, D width, K prototypes.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax.encoders.vit import Vit


@dataclasses.dataclass(frozen=True)
class SelfDistilled:
    """Shapes of the ViT and of the head; frozen and hashable.

    Attributes:
      hidden: width of the head's two hidden layers.
      bottleneck: features that are normalised and compared with the prototypes.
      prototypes: K.
    """

    vit: Vit
    hidden: int
    bottleneck: int
    prototypes: int

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Float32 parameters {"vit", "head", "centre"}.

        Positions start small: as strong as the patches (which suits a random encoder) they would be all that [CLS] sees.
        """
        keys = jax.random.split(key, 5)
        vit = self.vit.init(keys[0])
        vit["positions"] = 0.05 * jax.random.normal(keys[1], vit["positions"].shape)
        sizes = (self.vit.width, self.hidden, self.hidden, self.bottleneck)
        head = {}
        for number, (inner, outer) in enumerate(itertools.pairwise(sizes)):
            kernel = jax.random.normal(jax.random.fold_in(keys[2], number), (inner, outer)) * inner**-0.5
            head[f"layer{number}"] = {"kernel": kernel, "bias": jnp.zeros(outer)}
        head["prototypes"] = jax.random.normal(keys[3], (self.bottleneck, self.prototypes))
        return {"vit": vit, "head": head, "centre": jnp.zeros(self.prototypes)}

    def trainable(self) -> dict[str, Any]:
        """A tree like the parameters, of bool: False for the centre, which follows the teacher's outputs."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key != "centre", shapes)

    def logical_axes(self) -> dict[str, Any]:
        """A tree like the parameters, of tuples without names: the network is small, and whole on every device."""
        return jax.tree.map(lambda leaf: (None,) * len(leaf.shape), jax.eval_shape(self.init, jax.random.key(0)))

    def scores(self, params: dict[str, Any], image: jax.Array) -> jax.Array:
        """Normalised images (B, S, S, 3) -> (B, K): cosines of [CLS]'s projection with the prototypes."""
        x = self.vit.apply(params["vit"], image)[:, 0]
        head = params["head"]
        for number in range(3):
            layer = head[f"layer{number}"]
            x = x @ layer["kernel"] + layer["bias"][None]
            x = x if number == 2 else jax.nn.gelu(x, approximate=False)
        return _unit(x, -1) @ _unit(head["prototypes"], 0)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=axis, keepdims=True) + 1e-12)
