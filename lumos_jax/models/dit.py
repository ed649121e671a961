"""The diffusion transformer (Peebles & Xie 2023; PixArt-alpha, Chen et al. 2023; Lumos, arXiv 2412.07767).

    s     = timestep_mlp(t) + vector W
    x     = patches W + positions
    block : x += gate_1 attn((1 + scale_1) LN(x) + shift_1);  x += cross(x, y);  x += gate_2 mlp((1 + scale_2) LN(x) + shift_2)
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = SiLU(s) W_block
    out   = ((1 + scale) LN(x) + shift) W,   shift, scale = table + s

Blocks are one module, its parameters stacked on a leading `layers` axis and applied by a scan. Compute dtype bfloat16:
matmuls take bfloat16 and accumulate in float32; norms, modulation, gates, softmax, the timestep embedding and the output are
float32; the residual stream is stored in bfloat16. Axis letters: B batch, N tokens, D width, L condition tokens, C, V their
features, h w c latent, p patch side.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lumos_jax import config
from lumos_jax.models import conditioning, layers, sizes
from lumos_jax.models.attention import CrossAttention, SelfAttention
from lumos_jax.models.conditioning import Condition
from lumos_jax.models.layers import Dense, modulated_norm, parameter, zeros

# On a CPU a scan copies what a layer keeps for its gradient into stacked arrays and out again, at the speed of memory.
CPU_UNROLL = 12
MODULATIONS = 6  # shift, scale, gate of attention, then of the MLP


class Mlp(nn.Module):
    """(B, N, D) -> (B, N, D): Linear, tanh-GELU, Linear."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = layers.gelu(Dense(self.hidden, ("embed", "mlp"), name="fc1")(x))
        return Dense(x.shape[-1], ("mlp", "embed"), name="fc2")(hidden)


class Block(nn.Module):
    """One transformer block, (B, N, D) -> (B, N, D); cross-attends where there are condition tokens."""

    heads: int
    mlp_hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, s: jax.Array, y: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        """x (B, N, D), s = SiLU of the embedded time (B, D), y embedded tokens (B, L, D), mask (B, L)."""
        width = x.shape[-1]
        modulate = Dense(MODULATIONS * width, ("embed", "mlp"), zeros, out_dtype=jnp.float32, name="modulation")
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulate(s), MODULATIONS, axis=-1)
        attended = SelfAttention(self.heads, name="attn")(modulated_norm(x, shift_1, scale_1))
        x = gated(x, gate_1, attended)
        if y is not None:
            x = x + CrossAttention(self.heads, name="cross")(x, y, mask)
        return gated(x, gate_2, Mlp(self.mlp_hidden, name="mlp")(modulated_norm(x, shift_2, scale_2)))


def gated(x: jax.Array, gate: jax.Array, branch: jax.Array) -> jax.Array:
    """x + gate * branch, summed in float32. x, branch: (B, N, D); gate: (B, D) float32."""
    return (x.astype(jnp.float32) + gate[:, None] * branch.astype(jnp.float32)).astype(x.dtype)


class FinalLayer(nn.Module):
    """x (B, N, D), embedded time (B, D) -> (B, N, features) float32."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, s: jax.Array) -> jax.Array:
        width = x.shape[-1]
        table = parameter(self, "table", nn.initializers.normal(width**-0.5), (None, "embed"), (2, width))
        shift, scale = s + table[:1], s + table[1:]
        project = Dense(self.features, ("embed", None), zeros, out_dtype=jnp.float32, name="out")
        return project(modulated_norm(x, shift, scale))


def _keep_all_but_gathered(primitive, *_, **__) -> bool:
    """Keeps every result but casts and gathers, so that no layer's whole weights outlive its forward pass."""
    return primitive.name not in ("convert_element_type", "sharding_constraint")


# Which results of a block's forward pass are kept for its backward pass. "dots" keeps the products with weights and computes
# those of attention again: they are cheap, and hold N x N numbers a head.
_REMAT_POLICIES = {
    "none": _keep_all_but_gathered,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class DiT:
    """The network as pure functions of its parameters; frozen and hashable. See `make_dit`."""

    width: int
    depth: int
    heads: int
    mlp_hidden: int
    patch_size: int
    latent_shape: tuple[int, int, int]
    out_channels: int
    token_shape: tuple[int, int] | None
    vector_dim: int
    vector_is_size: bool
    concat_channels: int
    position_base: tuple[int, int]
    position_scale: float
    dtype: str
    remat: str
    unroll: int

    @property
    def _modules(self) -> dict[str, nn.Module]:
        modules = {
            "patch": Dense(self.width, (None, "embed")),
            "time": conditioning.TimestepEmbedder(self.width),
            "final": FinalLayer(self.patch_size**2 * self.out_channels),
        }
        if self.token_shape:
            modules["tokens"] = conditioning.TokenEmbedder(self.width)
        if self.vector_dim:
            linear = Dense(self.width, (None, "embed"))
            modules["vector"] = conditioning.SizeEmbedder(self.width) if self.vector_is_size else linear
        return modules

    @property
    def _block(self) -> Block:
        return Block(self.heads, self.mlp_hidden)

    def _boxed_init(self, key: jax.Array) -> dict[str, Any]:
        """Parameters in boxes that carry the axis names; those of blocks still without `layers`."""

        def named(name):
            # By name, so that an added part leaves the others' values as they were.
            return jax.random.fold_in(key, zlib.crc32(name.encode()))

        channels = self.latent_shape[2] + self.concat_channels
        row, token = jnp.zeros((1, self.width)), jnp.zeros((1, 1, self.width))
        inputs = {
            "patch": (jnp.zeros((1, 1, self.patch_size**2 * channels)),),
            "time": (jnp.zeros((1,)),),
            "final": (token, row),
        }
        if self.token_shape:
            inputs["tokens"] = (jnp.zeros((1, 1, self.token_shape[1])),)
        if self.vector_dim:
            inputs["vector"] = (jnp.zeros((1, self.vector_dim)),)
        params = {name: module.init(named(name), *inputs[name])["params"] for name, module in self._modules.items()}

        def init_block(key):
            return self._block.init(key, token, row, token if self.token_shape else None, None)["params"]

        params["blocks"] = jax.vmap(init_block)(jax.random.split(named("blocks"), self.depth))
        nullable = self.vector_dim and not self.vector_is_size
        nulls = {"tokens": self.token_shape, "vector": (self.vector_dim,) if nullable else None}
        nulls = {name: conditioning.null_table(named(f"null {name}"), shape) for name, shape in nulls.items() if shape}
        return params | ({"null": nulls} if nulls else {})

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Float32 parameters: a nested dict, those of blocks stacked on a leading axis of length `depth`."""
        return nn.meta.unbox(self._boxed_init(key))

    def logical_axes(self) -> dict[str, Any]:
        """A tree like the parameters, of one tuple per parameter with a logical axis name (or None) per dim."""

        def is_box(leaf):
            return isinstance(leaf, nn.meta.AxisMetadata)

        def names(path, leaf):
            stacked = ("layers",) if path[0].key == "blocks" else ()
            return stacked + (leaf.names if is_box(leaf) else (None,) * len(leaf.shape))

        shapes = jax.eval_shape(self._boxed_init, jax.random.key(0))
        return jax.tree_util.tree_map_with_path(names, shapes, is_leaf=is_box)

    def trainable(self) -> dict[str, Any]:
        """A tree like the parameters, of bool: False for the null tables."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key != "null", shapes)

    def null_condition(self, params: dict[str, Any], condition: Condition) -> Condition:
        """The condition that says nothing, for as many rows: null tables, zero latents; token mask and sizes are kept.

        Gradients do not reach the tables.
        """

        def table(name, like):
            if like is None:
                return None
            values = jax.lax.stop_gradient(params["null"][name])
            if values.shape != like.shape[1:]:
                raise ValueError(f"condition.{name} has shape {like.shape}; the network's is (B, *{values.shape})")
            return jnp.broadcast_to(values, like.shape).astype(like.dtype)

        latent = None if condition.latent is None else jnp.zeros_like(condition.latent)
        return Condition(
            tokens=table("tokens", condition.tokens),
            token_mask=condition.token_mask,
            vector=condition.vector if self.vector_is_size else table("vector", condition.vector),
            latent=latent,
        )

    def apply(
        self,
        params: dict[str, Any],
        x: jax.Array,
        t: jax.Array,
        condition: Condition,
        *,
        gather: Callable[[Any], Any] | None = None,
    ) -> jax.Array:
        """The network's output for noisy latents.

        Args:
          params: as from `init`.
          x: (B, h, w, c); h and w are any multiples of the patch size.
          t: (B,) network time in [0, 1000).
          condition: tokens are needed if and only if the network has them, latent likewise; an absent vector is zero.
          gather: called inside the scanned body on one layer of `params["blocks"]`; returns that block's parameters. It
            brings shards together, adds adapters, or both.

        Returns:
          (B, h, w, out_channels) float32.

        Raises:
          ValueError: shapes that do not fit the network.
        """
        self._check(x, condition)
        dtype = jnp.dtype(self.dtype)
        modules = self._modules

        def run(name, *inputs):
            return modules[name].apply({"params": params[name]}, *inputs)

        grid = (x.shape[1] // self.patch_size, x.shape[2] // self.patch_size)
        if condition.latent is not None:
            x = jnp.concatenate([x, condition.latent.astype(x.dtype)], axis=-1)
        x = run("patch", layers.patchify(x.astype(jnp.float32), self.patch_size))
        where = layers.positions(grid, self.position_base, self.position_scale, self.width)
        x = (x + where[None]).astype(dtype)
        s = run("time", t)
        if condition.vector is not None:
            s = s + run("vector", condition.vector.astype(jnp.float32))
        y = None if condition.tokens is None else run("tokens", condition.tokens.astype(dtype))
        x = self._run_blocks(params["blocks"], x, nn.silu(s).astype(dtype), y, condition.token_mask, gather)
        return layers.unpatchify(run("final", x, s), self.patch_size, grid)

    def _run_blocks(self, params, x, s, y, mask, gather):
        block = self._block

        def body(x, layer):
            if gather is not None:
                layer = gather(layer)
            return block.apply({"params": layer}, x, s, y, mask), None

        # Without a gather, "none" needs no checkpoint at all, which would only stand in the way of fusions.
        if self.remat != "none" or gather is not None:
            body = jax.checkpoint(body, prevent_cse=self.unroll > 1, policy=_REMAT_POLICIES[self.remat])
        return jax.lax.scan(body, x, params, unroll=self.unroll)[0]

    def _check(self, x: jax.Array, condition: Condition) -> None:
        _, h, w, c = x.shape
        if h % self.patch_size or w % self.patch_size or c != self.latent_shape[2]:
            raise ValueError(
                f"latents of shape {x.shape}: sides must be multiples of the patch size {self.patch_size}, "
                f"channels {self.latent_shape[2]}"
            )
        tokens, vector, latent = condition.tokens, condition.vector, condition.latent
        if (tokens is None) != (self.token_shape is None) or (
            tokens is not None and tokens.shape[2] != self.token_shape[1]
        ):
            got = None if tokens is None else tokens.shape
            raise ValueError(
                f"condition.tokens has shape {got}; the network was made for token_shape={self.token_shape}"
            )
        if vector is not None and vector.shape[1] != self.vector_dim:
            raise ValueError(f"condition.vector has shape {vector.shape}; the network's vector_dim={self.vector_dim}")
        channels = 0 if latent is None else latent.shape[3]
        if channels != self.concat_channels or (channels and latent.shape[:3] != x.shape[:3]):
            got = None if latent is None else latent.shape
            raise ValueError(
                f"condition.latent has shape {got}; the network concatenates {self.concat_channels} channels to {x.shape}"
            )


def make_dit(
    model: config.Model,
    *,
    latent_shape: tuple[int, int, int],
    out_channels: int,
    token_shape: tuple[int, int] | None,
    vector_dim: int = 0,
    vector_is_size: bool = False,
    concat_channels: int = 0,
) -> DiT:
    """The network that config.model describes.

    Args:
      model: config.model.
      latent_shape: (h, w, c) of the latents it is trained on.
      out_channels: c of its output, 2 c for a learned variance.
      token_shape: (L, C) of the condition tokens, or None for no cross-attention.
      vector_dim: V of the vector added to the timestep embedding, 0 for none.
      vector_is_size: the vector is an image's (height, width, height / width), embedded as the multi-scale T2I does it.
      concat_channels: channels of the latent that is concatenated to the input, 0 for none.

    Raises:
      ValueError: an unknown size or remat policy, or latents that do not divide into patches.
    """
    size = sizes.make_size(model)
    if model.remat not in _REMAT_POLICIES:
        raise ValueError(f"config.model.remat={model.remat!r} is not one of {', '.join(_REMAT_POLICIES)}")
    h, w, _ = latent_shape
    if h % model.patch_size or w % model.patch_size:
        raise ValueError(
            f"latents of {h}x{w} do not divide into patches of config.model.patch_size={model.patch_size}; "
            "change it, or config.data.image_size"
        )
    grid = (h // model.patch_size, w // model.patch_size)
    return DiT(
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        mlp_hidden=int(size.width * model.mlp_ratio),
        patch_size=model.patch_size,
        latent_shape=tuple(latent_shape),
        out_channels=out_channels,
        token_shape=None if token_shape is None else tuple(token_shape),
        vector_dim=3 if vector_is_size else vector_dim,
        vector_is_size=vector_is_size,
        concat_channels=concat_channels,
        position_base=(model.position_base,) * 2 if model.position_base else grid,
        position_scale=model.position_scale,
        dtype=model.dtype,
        remat=model.remat,
        unroll=min(size.depth, model.unroll or (CPU_UNROLL if jax.default_backend() == "cpu" else 1)),
    )
