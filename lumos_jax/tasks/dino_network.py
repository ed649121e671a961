"""The network that DINO trains (Caron et al. 2021): a ViT, a projection head over prototypes, and the centre of its outputs.

    head(x) = normalise(MLP(token)) . normalise(prototypes),   [CLS] for the picture, the other tokens for patches (iBOT)

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
      masked: whether patches may be hidden, as masked image modelling does; they have a centre of their own.
      pixels: whether a linear layer tells the pixels of each patch from its token.
    """

    vit: Vit
    hidden: int
    bottleneck: int
    prototypes: int
    masked: bool = False
    pixels: bool = False

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Float32 parameters {"vit", "head", "centre"}, {"mask", "patch_centre"} where patches may be hidden, and {"pixels"}.

        Positions start small: as strong as the patches they would be all that [CLS] sees. Where patches may be hidden they
        start as strong, since a hidden one says nothing else.
        """
        keys = jax.random.split(key, 5)
        vit = self.vit.init(keys[0])
        if not self.masked:
            vit["positions"] = 0.05 * jax.random.normal(keys[1], vit["positions"].shape)
        sizes = (self.vit.width, self.hidden, self.hidden, self.bottleneck)
        head = {}
        for number, (inner, outer) in enumerate(itertools.pairwise(sizes)):
            kernel = jax.random.normal(jax.random.fold_in(keys[2], number), (inner, outer)) * inner**-0.5
            head[f"layer{number}"] = {"kernel": kernel, "bias": jnp.zeros(outer)}
        head["prototypes"] = jax.random.normal(keys[3], (self.bottleneck, self.prototypes))
        params = {"vit": vit, "head": head, "centre": jnp.zeros(self.prototypes)}
        if self.masked:
            params["mask"] = 0.02 * jax.random.normal(keys[4], (self.vit.width,))
            params["patch_centre"] = jnp.zeros(self.prototypes)
        if self.pixels:
            inner, outer = self.vit.width, 3 * self.vit.patch_size**2
            kernel = jax.random.normal(jax.random.fold_in(keys[4], 1), (inner, outer)) * inner**-0.5
            params["pixels"] = {"kernel": kernel, "bias": jnp.zeros(outer)}
        return params

    def trainable(self) -> dict[str, Any]:
        """A tree like the parameters, of bool: False for the centres, which follow the teacher's outputs."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree_util.tree_map_with_path(lambda path, _: "centre" not in path[0].key, shapes)

    def logical_axes(self) -> dict[str, Any]:
        """A tree like the parameters, of tuples without names: the network is small, and whole on every device."""
        return jax.tree.map(lambda leaf: (None,) * len(leaf.shape), jax.eval_shape(self.init, jax.random.key(0)))

    def tokens(self, params: dict[str, Any], image: jax.Array, hidden: jax.Array | None = None) -> jax.Array:
        """What the ViT makes of image (B, S, S, 3), normalised: (B, 1 + N, D), [CLS] first.

        `hidden`, (B, N) bool, are patches that are not shown: a learned vector stands in for them.
        """

        def hide(patches):
            return jnp.where(hidden[..., None], params["mask"][None, None].astype(patches.dtype), patches)

        return self.vit.apply(params["vit"], image, hide=None if hidden is None else hide)

    def scores(self, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """Cosines of the projections of tokens (B, T, D) with the prototypes, (B, T, K)."""
        size, count, width = tokens.shape
        x = tokens.reshape(size * count, width)
        head = params["head"]
        for number in range(3):
            layer = head[f"layer{number}"]
            x = x @ layer["kernel"] + layer["bias"][None]
            x = x if number == 2 else jax.nn.gelu(x, approximate=False)
        return (_unit(x, -1) @ _unit(head["prototypes"], 0)).reshape(size, count, -1)

    def told_pixels(self, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """The pixels of each patch by its token: (B, 1 + N, D) -> (B, N, p p 3), normalised as the image."""
        size, count, width = tokens[:, 1:].shape
        flat = tokens[:, 1:].reshape(size * count, width)
        return (flat @ params["pixels"]["kernel"] + params["pixels"]["bias"][None]).reshape(size, count, -1)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=axis, keepdims=True) + 1e-12)
