"""Vision transformer (Dosovitskiy et al. 2021) as the self-supervised encoders use it: one [CLS] token, norms before branches.

    DINO (Caron et al. 2021), MoCo-v3 (Chen et al. 2021)   the plain network; MoCo-v3's positions are fixed sin-cos
    DINOv2 (Oquab et al. 2023)                             every branch times a learned scale
    CLIP (Radford et al. 2021)                             quick GELU, a norm before the blocks, tokens left unnormed at the end

On top may sit the head that the network was trained with, applied by `project`:

    linear   CLIP's projection: x W
    mlp      MoCo-v3's projector: (Linear, batch norm, ReLU) twice, Linear, batch norm without scale, no biases; the batch norms
             use the statistics that training left in the weights (RCG conditions on its 256 outputs)

Axes: B batch, N tokens with [CLS] first, D width, H heads, K head dim. Layers are stacked and scanned.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# name: (width, depth, heads)
SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
MLP_RATIO = 4
BATCH_NORM_EPS = 1e-5
ACTIVATIONS = {"gelu": functools.partial(nn.gelu, approximate=False), "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x)}


def keep(tree: Any) -> Any:
    """The gather of parameters that no device has only a part of."""
    return tree


def init_blocks(block: nn.Module, key: jax.Array, depth: int, *inputs: jax.Array) -> Any:
    """The parameters of `depth` blocks, stacked."""
    return jax.vmap(lambda k: block.init(k, *inputs)["params"])(jax.random.split(key, depth))


def apply_blocks(block: nn.Module, params: Any, gather: Callable, x: jax.Array, *inputs: jax.Array) -> jax.Array:
    """x through all blocks; `gather` gathers parameters that are split over devices, a layer at a time."""

    def body(x, layer):
        return block.apply({"params": gather(layer)}, x, *inputs), None

    return jax.lax.scan(body, x, params)[0]


@dataclasses.dataclass(frozen=True)
class Vit:
    """Shape of the network; hashable.

    Attributes:
      trained_side: side in pixels of the images that the position table is for.
      eps: of the layer norms; 1e-6 in the official DINO, 1e-12 in Hugging Face's.
      position_offset: added to the grid before positions are interpolated: 0.1 in the official DINO, else 0.
      activation: gelu (exact) | quick_gelu (x sigmoid(1.702 x)).
      layer_scale: whether each branch has a learned scale.
      input_norm: whether a norm stands before the blocks, and the last one is for `project` alone (CLIP).
      hidden: width of the MLPs; 0 takes four times the width.
      head: "" | linear (CLIP) | mlp (MoCo-v3).
      head_dims: widths of the head's outputs, one a layer.
      whitened: whether parameters hold what whitens tokens of the images that the network was trained on.
    """

    width: int
    depth: int
    heads: int
    patch_size: int
    trained_side: int
    eps: float = 1e-6
    position_offset: float = 0.1
    activation: str = "gelu"
    layer_scale: bool = False
    input_norm: bool = False
    hidden: int = 0
    head: str = ""
    head_dims: tuple[int, ...] = ()
    whitened: bool = False

    @property
    def _block(self) -> _Block:
        hidden = self.hidden or MLP_RATIO * self.width
        return _Block(self.heads, self.eps, hidden, self.activation, self.layer_scale)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random float32 parameters: Flax's defaults; positions as strong as the patches, so that tokens say where they are."""
        keys = jax.random.split(key, 4)
        count = (self.trained_side // self.patch_size) ** 2
        patch = nn.Dense(self.width, use_bias=not self.input_norm)
        norm = {"scale": jnp.ones(self.width), "bias": jnp.zeros(self.width)}
        params = {
            "patch": patch.init(keys[0], jnp.zeros((1, self.patch_size**2 * 3)))["params"],
            "cls": 0.02 * jax.random.normal(keys[2], (self.width,)),
            "positions": 0.7 * jax.random.normal(keys[3], (1 + count, self.width)),
            "blocks": init_blocks(self._block, keys[1], self.depth, jnp.zeros((1, 1, self.width))),
            "norm": norm,
        }
        if self.input_norm:
            params["input_norm"] = norm
        if self.head:
            params["head"] = self._init_head(jax.random.fold_in(key, 1))
        if self.whitened:
            params["whitening"] = {"mean": jnp.zeros(self.width), "kernel": jnp.eye(self.width)}
        return params

    def apply(
        self,
        params: dict[str, Any],
        image: jax.Array,
        gather: Callable = keep,
        hide: Callable[[jax.Array], jax.Array] | None = None,
        last_norm: bool = True,
    ) -> jax.Array:
        """image (B, H, W, 3), normalized, sides multiples of the patch size -> tokens (B, 1 + N, D), [CLS] first.

        After the last norm, but for CLIP, whose last norm is for `project` alone. `gather` gathers parameters that are split
        over devices, a layer at a time. `hide` replaces some of the embedded patches (B, N, D), before positions are added.
        Without `last_norm` the tokens are as the last block leaves them.
        """
        blocks = params["blocks"]
        params = gather({name: part for name, part in params.items() if name != "blocks"})
        p, dtype = self.patch_size, image.dtype
        size, grid = image.shape[0], (image.shape[1] // p, image.shape[2] // p)
        x = image.reshape(size, grid[0], p, grid[1], p, 3).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(size, grid[0] * grid[1], p * p * 3)
        x = nn.Dense(self.width, use_bias=not self.input_norm, dtype=dtype).apply({"params": params["patch"]}, x)
        x = x if hide is None else hide(x)
        cls = jnp.broadcast_to(params["cls"].astype(dtype), (size, 1, self.width))
        x = jnp.concatenate([cls, x], axis=1)
        x = x + self.positions(params["positions"], grid)[None].astype(dtype)
        if self.input_norm:
            x = self._norm(params["input_norm"], x)
        x = apply_blocks(self._block, blocks, gather, x)
        return x if self.input_norm or not last_norm else self._norm(params["norm"], x)

    def project(self, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """Tokens as `apply` gives them -> what the network's head makes of [CLS], (B, head_dims[-1])."""
        x = self._norm(params["norm"], tokens[:, 0]) if self.input_norm else tokens[:, 0]
        for number in range(len(self.head_dims)):
            layer = {name: value.astype(x.dtype)[None] for name, value in params["head"][f"layer{number}"].items()}
            x = x @ layer["kernel"][0]
            if self.head == "mlp":
                x = (x - layer["mean"]) * jax.lax.rsqrt(layer["variance"] + BATCH_NORM_EPS)
                if "scale" in layer:
                    x = jax.nn.relu(x * layer["scale"] + layer["bias"])
        return x

    def _init_head(self, key: jax.Array) -> dict[str, Any]:
        head: dict[str, Any] = {}
        for number, (inner, outer) in enumerate(itertools.pairwise((self.width, *self.head_dims))):
            layer = {"kernel": jax.random.normal(jax.random.fold_in(key, number), (inner, outer)) * inner**-0.5}
            if self.head == "mlp":
                layer |= {"mean": jnp.zeros(outer), "variance": jnp.ones(outer)}
                if number < len(self.head_dims) - 1:
                    layer |= {"scale": jnp.ones(outer), "bias": jnp.zeros(outer)}
            head[f"layer{number}"] = layer
        return head

    def _norm(self, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return nn.LayerNorm(epsilon=self.eps, dtype=x.dtype).apply({"params": params}, x)

    def positions(self, table: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """(1 + trained N, D) -> (1 + N, D): the patches' positions resampled bicubically for another grid."""
        side = self.trained_side // self.patch_size
        if grid == (side, side):
            return table
        patches = table[1:].astype(jnp.float32).reshape(side, side, -1)
        rows, columns = (jnp.asarray(bicubic_matrix(side, n, self.position_offset), jnp.float32) for n in grid)
        patches = jnp.einsum("hr,rcd,wc->hwd", rows, patches, columns, precision="highest")
        return jnp.concatenate([table[:1].astype(jnp.float32), patches.reshape(-1, table.shape[-1])])


class _Block(nn.Module):
    heads: int
    eps: float
    hidden: int
    activation: str
    layer_scale: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, tokens, width = x.shape
        dtype = x.dtype
        # Two dims before every matmul with weights: the gradient of a three-dim one is slow on CPUs.
        x = x.reshape(size * tokens, width)
        h = nn.LayerNorm(epsilon=self.eps, dtype=dtype, name="norm1")(x)
        qkv = nn.Dense(3 * width, dtype=dtype, name="qkv")(h)
        qkv = qkv.reshape(size, tokens, 3, self.heads, width // self.heads)
        q, k, v = (part.squeeze(2) for part in jnp.split(qkv, 3, axis=2))
        h = jax.nn.dot_product_attention(q, k, v).reshape(size * tokens, width)
        x = x + self._scaled("scale1", nn.Dense(width, dtype=dtype, name="proj")(h))
        h = nn.LayerNorm(epsilon=self.eps, dtype=dtype, name="norm2")(x)
        h = ACTIVATIONS[self.activation](nn.Dense(self.hidden, dtype=dtype, name="fc1")(h))
        x = x + self._scaled("scale2", nn.Dense(width, dtype=dtype, name="fc2")(h))
        return x.reshape(size, tokens, width)

    def _scaled(self, name: str, branch: jax.Array) -> jax.Array:
        if not self.layer_scale:
            return branch
        scale = self.param(name, nn.initializers.ones, (branch.shape[-1],))
        return branch * scale[None].astype(branch.dtype)


def bicubic_matrix(source: int, target: int, offset: float) -> np.ndarray:
    """(target, source) float64 weights of cubic convolution with a = -0.75, half-pixel centers, borders repeated.

    With an offset the scale is (target + offset) / source, as the official DINO passes it; without, target / source.
    """
    a = -0.75

    def kernel(distance):
        d = np.abs(distance)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

    weights, rows = np.zeros((target, source)), np.arange(target)[:, None]
    centers = (rows + 0.5) / ((target + offset) / source) - 0.5
    taps = np.floor(centers).astype(int) + np.arange(-1, 3)
    np.add.at(weights, (rows, np.clip(taps, 0, source - 1)), kernel(centers - taps))
    return weights
