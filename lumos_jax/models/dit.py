"""The diffusion transformer (Peebles & Xie 2023; PixArt-alpha, Chen et al. 2023; Lumos, arXiv 2412.07767).

    s     = timestep_mlp(t) + embedded vector
    x     = patches W + positions
    block : x += gate_1 attn((1 + scale_1) LN(x) + shift_1);  x += cross(x, y);  x += gate_2 mlp((1 + scale_2) LN(x) + shift_2)
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = SiLU(s) W_block
    out   = ((1 + scale) LN(x) + shift) W,   shift, scale = table + s  (final = table), or SiLU(s) W' (final = adaln, as DiT)

Video networks add to each block, after attention within frames, attention over frames at each place (STDiT, SVD):
x += temporal(LN(x) + frame's sinusoid), whose output starts at zero, so that the image prior is unchanged at first.

Blocks are one module, its parameters stacked on a leading `layers` axis and applied by a scan. Compute dtype bfloat16:
matmuls take bfloat16 and accumulate in float32; norms, modulation, gates, softmax, the timestep embedding and the output are
float32; the residual stream is stored in bfloat16. Axis letters: B batch, N tokens, D width, L condition tokens, C, V their
features, F frames, h w c latent, p patch side.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from lumos_jax import config
from lumos_jax.models import conditioning, layers, quantized, sizes
from lumos_jax.models.blocks import MLP_PRODUCTS, Block, FinalLayer
from lumos_jax.models.conditioning import Condition
from lumos_jax.models.layers import Dense

# On a CPU a scan copies what a layer keeps for its gradient into stacked arrays and out again, at the speed of memory.
CPU_UNROLL = 12


# What makes weights whole and brings them in shape; of activations the same costs little to do again.
_OF_WEIGHTS = (
    "convert_element_type",
    "sharding_constraint",
    "reshape",
    "squeeze",
    "slice",
    "split",
    "broadcast_in_dim",
    "all_gather",
)


def _keep_all_but_gathered(primitive, *_, **__) -> bool:
    """Keeps every result but casts, gathers and new shapes, so that no layer's whole weights outlive its forward pass."""
    return primitive.name not in _OF_WEIGHTS


# Which results of a block's forward pass are kept for its backward pass. "dots" keeps the products with weights and computes
# those of attention again: they are cheap, and hold N x N numbers a head. "mlp" keeps those of the MLP alone: of the cost of
# keeping a result, on TPUs, theirs hides behind their matmuls, and attention's does not.
_REMAT_POLICIES = {
    "none": _keep_all_but_gathered,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names(*MLP_PRODUCTS),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Spread(Protocol):
    """How rows, and the frames of clips, are spread over devices; frozen and hashable. See `train.spread.Spread`."""

    def run(
        self, apply: Callable, axes: Any, dtype: str, params: Any, given: tuple, gather: Callable | None
    ) -> jax.Array:
        """apply(params, *given, gather=..., hardware=...), on each device with its own rows or frames of (x, t, condition).

        axes: logical axis names of the parameters; dtype: in which a layer's weights are gathered.
        """
        ...

    def over_frames(self, attend: Callable, h: jax.Array) -> jax.Array:
        """Within `run`: attend(h) of all frames, for h (B, F, N, D) of one's own. `attend` works place by place (N)."""
        ...


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
    vector_kind: str
    concat_channels: int
    camera_dim: int
    camera_turns: bool
    temporal: bool
    final: str
    activation: str
    position_base: tuple[int, int]
    position_scale: float
    dtype: str
    remat: str
    unroll: int
    mlp_products: str = "none"
    spread: Spread | None = None

    @property
    def _modules(self) -> dict[str, nn.Module]:
        modules = {
            "patch": Dense(self.width, (None, "embed")),
            "time": conditioning.TimestepEmbedder(self.width),
            "final": FinalLayer(self.patch_size**2 * self.out_channels, self.final),
        }
        if self.token_shape:
            modules["tokens"] = conditioning.TokenEmbedder(self.width)
        if self.camera_dim:
            modules["camera"] = conditioning.CameraProjection(self.token_shape[1], self.camera_turns)
        if self.vector_dim:
            modules["vector"] = {
                "linear": Dense(self.width, (None, "embed")),
                "size": conditioning.SizeEmbedder(self.width),
                "numbers": conditioning.NumbersEmbedder(self.width),
                "class": conditioning.ClassEmbedder(self.vector_dim, self.width),
            }[self.vector_kind]
        return modules

    def _block(self, spread: Spread | None = None, hardware: str = "") -> Block:
        return Block(self.heads, self.mlp_hidden, self.temporal, self.activation, spread, self.mlp_products, hardware)

    @property
    def _vector_features(self) -> int:
        """Numbers a row of Condition.vector."""
        return 1 if self.vector_kind == "class" else self.vector_dim

    def _boxed_init(self, key: jax.Array) -> dict[str, Any]:
        """Parameters in boxes that carry the axis names; those of blocks still without `layers`."""

        def named(name):
            # By name, so that an added part leaves the others' values as they were.
            return jax.random.fold_in(key, zlib.crc32(name.encode()))

        channels = self.latent_shape[-1] + self.concat_channels
        row, token = jnp.zeros((1, self.width)), jnp.zeros((1, 1, self.width))
        inputs = {
            "patch": (jnp.zeros((1, 1, self.patch_size**2 * channels)),),
            "time": (jnp.zeros((1,)),),
            "final": (token, row),
        }
        if self.token_shape:
            inputs["tokens"] = (jnp.zeros((1, 1, self.token_shape[1])),)
        if self.vector_dim:
            inputs["vector"] = (jnp.zeros((1, self._vector_features)),)
        if self.camera_dim:
            inputs["camera"] = (jnp.zeros((1, 1, self.token_shape[1] + self.camera_dim)),)
        params = {name: module.init(named(name), *inputs[name])["params"] for name, module in self._modules.items()}

        def init_block(key):
            tokens = token if self.token_shape else None
            return self._block().init(key, token, row, tokens, None, frames=1)["params"]

        params["blocks"] = jax.vmap(init_block)(jax.random.split(named("blocks"), self.depth))
        nulls = {
            "tokens": None if self.camera_dim else self.token_shape,
            "vector": (self.vector_dim,) if self.vector_dim and self.vector_kind == "linear" else None,
        }
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
        """A tree like the parameters, of bool: False for the null table of tokens."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree_util.tree_map_with_path(lambda path, _: [k.key for k in path] != ["null", "tokens"], shapes)

    def null_condition(self, params: dict[str, Any], condition: Condition) -> Condition:
        """The condition that says nothing, for as many rows, lifted: null tables (zeros for a network with a camera), zero
        latents; token mask, sizes and numbers are kept. Gradients do not reach the table of tokens."""

        def table(values, like):
            if values.shape != like.shape[1:]:
                raise ValueError(f"condition has shape {like.shape} where the network's is (B, *{values.shape})")
            return jnp.broadcast_to(values, like.shape).astype(like.dtype)

        tokens, vector, latent = condition.tokens, condition.vector, condition.latent
        if tokens is not None:
            if self.camera_dim:
                tokens = jnp.zeros((*tokens.shape[:2], self.token_shape[1]), tokens.dtype)
            else:
                tokens = table(jax.lax.stop_gradient(params["null"]["tokens"]), tokens)
        if vector is not None and self.vector_kind == "linear":
            vector = table(params["null"]["vector"], vector)
        elif vector is not None and self.vector_kind == "class":
            vector = jnp.full_like(vector, self.vector_dim)
        latent = None if latent is None else jnp.zeros_like(latent)
        return Condition(tokens, condition.token_mask, vector, latent)

    def lift(self, params: dict[str, Any], condition: Condition) -> Condition:
        """What `apply` takes: the camera numbers at the end of the tokens' features are projected into them (B, L, C). The
        identity for networks without a camera."""
        if not self.camera_dim:
            return condition
        projected = self._modules["camera"].apply({"params": params["camera"]}, condition.tokens.astype(jnp.float32))
        return dataclasses.replace(condition, tokens=projected)

    def without(self, params: dict[str, Any], condition: Condition, drop: Mapping[str, jax.Array]) -> Condition:
        """The condition, lifted, with parts of some rows as "no condition" has them.

        Args:
          params: as from `init`.
          condition: as a task makes it, not lifted.
          drop: for each name of conditioning.PARTS, (B,) bool, the rows that lose it. Of a network with a camera the
            features are zeroed and the camera is kept, as Zero-1-to-3 trains.
        """
        null = self.null_condition(params, condition)
        if self.camera_dim:
            camera = condition.tokens[..., self.token_shape[1] :]
            null = dataclasses.replace(null, tokens=jnp.concatenate([null.tokens, camera], axis=-1))

        def choose(name):
            yes, no = getattr(null, name), getattr(condition, name)
            if no is None:
                return None
            return jnp.where(drop[name].reshape(-1, *[1] * (no.ndim - 1)), yes, no)

        parts = {name: choose(name) for name in conditioning.PARTS}
        return self.lift(params, dataclasses.replace(condition, **parts))

    def widened(self, path: str, array: jax.Array) -> jax.Array:
        """A parameter of a network with fewer input channels, for this one: the new channels start at zero, so that nothing
        changes at first. Only "patch/kernel" has input channels."""
        assert path == "patch/kernel", path
        pixels, channels = self.patch_size**2, self.latent_shape[-1] + self.concat_channels
        kernel = array.reshape(pixels, -1, array.shape[-1])
        kernel = jnp.pad(kernel, ((0, 0), (0, channels - kernel.shape[1]), (0, 0)))
        return kernel.reshape(-1, array.shape[-1])

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
          x: (B, h, w, c), or (B, F, h, w, c) for a network that is temporal; h and w are any multiples of the patch size.
          t: (B,) network time in [0, 1000).
          condition: lifted; tokens are needed if and only if the network has them, latent likewise; an absent vector adds
            nothing.
          gather: called inside the scanned body on one layer of `params["blocks"]`; returns that block's parameters. It
            brings shards together, adds adapters, or both.

        Returns:
          (B, [F,] h, w, out_channels) float32.

        Raises:
          ValueError: shapes that do not fit the network.
        """
        self._check(x, condition)
        if self.spread is not None:
            return self.spread.run(self._apply, self.logical_axes(), self.dtype, params, (x, t, condition), gather)
        return self._apply(params, x, t, condition, gather=gather)

    def _apply(self, params, x, t, condition, *, gather, hardware="") -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        modules = self._modules

        def run(name, *inputs):
            return modules[name].apply({"params": params[name]}, *inputs)

        frames = x.shape[1] if x.ndim == 5 else 0
        if condition.latent is not None:
            x = jnp.concatenate([x, condition.latent.astype(x.dtype)], axis=-1)
        x = x.reshape(-1, *x.shape[-3:])
        grid = (x.shape[1] // self.patch_size, x.shape[2] // self.patch_size)
        x = run("patch", layers.patchify(x.astype(jnp.float32), self.patch_size))
        where = layers.positions(grid, self.position_base, self.position_scale, self.width)
        x = (x + where[None]).astype(dtype)
        s = run("time", t)
        if condition.vector is not None:
            s = s + run("vector", condition.vector.astype(jnp.float32))
        y = None if condition.tokens is None else run("tokens", condition.tokens.astype(dtype))
        s = jnp.repeat(s, frames, axis=0) if frames else s
        x = self._run_blocks(
            params["blocks"], x, nn.silu(s).astype(dtype), y, condition.token_mask, frames, gather, hardware
        )
        out = layers.unpatchify(run("final", x, s), self.patch_size, grid)
        return out.reshape(-1, frames, *out.shape[1:]) if frames else out

    def _run_blocks(self, params, x, s, y, mask, frames, gather, hardware=""):
        block = self._block(self.spread, hardware)

        def body(x, layer):
            if gather is not None:
                layer = gather(layer)
            return block.apply({"params": layer}, x, s, y, mask, frames), None

        # Without a gather, "none" needs no checkpoint at all, which would only stand in the way of fusions.
        if self.remat != "none" or gather is not None:
            body = jax.checkpoint(body, prevent_cse=self.unroll > 1, policy=_REMAT_POLICIES[self.remat])
        return jax.lax.scan(body, x, params, unroll=self.unroll)[0]

    def _check(self, x: jax.Array, condition: Condition) -> None:
        if x.ndim != 4 + (x.ndim == 5 and self.temporal):
            raise ValueError(
                f"latents of shape {x.shape}: this network takes (B, h, w, c)" + (" or (B, F, h, w, c)" * self.temporal)
            )
        h, w, c = x.shape[-3:]
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
        if vector is not None and vector.shape[1] != self._vector_features:
            raise ValueError(
                f"condition.vector has shape {vector.shape}; the network's vector_dim={self.vector_dim} "
                f"({self.vector_kind})"
            )
        channels = 0 if latent is None else latent.shape[-1]
        if channels != self.concat_channels or (channels and latent.shape[:-1] != x.shape[:-1]):
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
    vector_kind: str = "linear",
    concat_channels: int = 0,
    camera_dim: int = 0,
    camera_turns: bool = False,
    temporal: bool = False,
    final: str = "table",
) -> DiT:
    """The network that config.model describes.

    Args:
      model: config.model.
      latent_shape: (h, w, c) of the latents it is trained on, of one frame.
      out_channels: c of its output, 2 c for a learned variance.
      token_shape: (L, C) of the condition tokens, or None for no cross-attention.
      vector_dim: V of the vector added to the timestep embedding, 0 for none.
      vector_kind: what it is, one of conditioning.VECTOR_KINDS.
      concat_channels: channels of the latent that is concatenated to the input, 0 for none.
      camera_dim: numbers about the camera at the end of each token's features, which `DiT.lift` projects into them.
      camera_turns: whether their products with the features are projected too; see conditioning.CameraProjection.
      temporal: blocks attend over frames too.
      final: where the last modulation is from, one of FINALS, if config.model.final leaves it to the task ("auto").

    Raises:
      ValueError: an unknown size or remat policy, products that need a library, latents that do not divide into patches.
    """
    size = sizes.make_size(model)
    if model.remat not in _REMAT_POLICIES:
        raise ValueError(f"config.model.remat={model.remat!r} is not one of {', '.join(_REMAT_POLICIES)}")
    quantized.check(model.mlp_products, "config.model.mlp_products")
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
        vector_dim=3 if vector_kind == "size" else vector_dim,
        vector_kind=vector_kind,
        concat_channels=concat_channels,
        camera_dim=camera_dim,
        camera_turns=camera_turns,
        temporal=temporal,
        final=final if model.final == "auto" else model.final,
        activation=model.activation,
        position_base=(model.position_base,) * 2 if model.position_base else grid,
        position_scale=model.position_scale,
        dtype=model.dtype,
        remat=model.remat,
        mlp_products=model.mlp_products,
        unroll=min(size.depth, model.scan_unroll or (CPU_UNROLL if jax.default_backend() == "cpu" else 1)),
    )
