"""The diffusion transformer as a Flax module (Peebles & Xie 2023; PixArt-alpha, Chen et al. 2023; Lumos, arXiv 2412.07767).

    s     = timestep_mlp(t) + embedded vector                                                                       (1)
    x     = patches W + positions                                                                                   (2)
    block : x += gate_1 attn((1 + scale_1) LN(x) + shift_1)                                                         (3)
            x += cross(x, y)                                                                                        (4)
            x += gate_2 mlp((1 + scale_2) LN(x) + shift_2)                                                          (5)
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = SiLU(s) W_block                                    (6)
    out   = ((1 + scale) LN(x) + shift) W,   shift, scale = table + s  (final = table), or SiLU(s) W' (final = adaln, DiT)

Networks for clips add to each block, after (3), attention over the frames at each position (STDiT, SVD):
x += temporal(LN(x) + sinusoid of the frame), whose output starts at zero, so that it leaves an image prior unchanged.

Layers are scanned with stacked parameters; CPUs and GPUs unroll the scan. In bfloat16 (the default compute dtype) matmuls take
bfloat16 and accumulate in float32; norms, modulation, gates, softmax, GELU, the timestep embedding and the output are float32;
the residual stream is stored in bfloat16. Axis letters: B images (each frame of a clip is one), R rows of the batch, F frames,
N tokens, D width, L condition tokens, C their features, V features of the vector, h w c latent, P = p p c values of a patch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from lumos_jax.models import alignment, conditioning, layers
from lumos_jax.models.attention import QKV, CrossAttention, SelfAttention
from lumos_jax.models.conditioning import Condition
from lumos_jax.models.layers import Dense, modulated_norm, parameter, zeros

MODULATIONS = 6  # shift, scale, gate of attention, then of the MLP
MLP_MATMULS = ("mlp_hidden", "mlp_out")  # names by which remat policies know the results of an MLP's two matmuls
ACTIVATIONS = {"gelu_tanh": layers.gelu, "gelu": functools.partial(nn.gelu, approximate=False)}

# Ops on gathered weights; never saved for backward. On activations the same ops are cheap to recompute.
_WEIGHT_OPS = (
    "convert_element_type", "sharding_constraint", "reshape", "squeeze", "slice", "split", "broadcast_in_dim", "all_gather",
)  # fmt: skip


_save = jax.checkpoint_policies.save_only_these_names


def _dots(primitive, *inputs, **params) -> bool:
    """A remat policy that saves matmuls with weights, and cuDNN's attention."""
    if primitive.name.startswith("dot_product_attention_fwd"):
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **params)


# Results of a block that are saved for backward: all but gathered weights ("none"); matmuls with weights and cuDNN's attention,
# not plain attention's matmuls, which are cheap to recompute and of N x N numbers a head ("dots"); the two matmuls of the MLP,
# whose stores TPUs hide behind the matmuls themselves, as they do not attention's ("mlp"); these and queries, keys and values
# ("qkv"); nothing ("full"). All but "full" save the statistics of layer norms, two numbers a token.
REMAT_POLICIES = {
    "none": lambda primitive, *_, **__: primitive.name not in _WEIGHT_OPS,
    "dots": jax.checkpoint_policies.save_from_both_policies(_dots, _save(layers.NORM_STATISTICS)),
    "qkv": _save(*MLP_MATMULS, layers.NORM_STATISTICS, QKV),
    "mlp": _save(*MLP_MATMULS, layers.NORM_STATISTICS),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """What a network is; hashable. `network.make_dit` fills it from config.model.

    Attributes:
      width, depth, heads, mlp_hidden: D, number of blocks, H, hidden features of an MLP.
      latent_shape: (h, w, c) of the latents it is trained on, of one frame.
      out_channels: c of its output, 2 c for a learned variance.
      token_shape: (L, C) of the condition tokens; None for no cross-attention.
      position_base: the grid of tokens whose positions are counted in ones; see layers.positions.
      dtype: compute dtype.
      remat: one of REMAT_POLICIES.
      unroll: layers of the scan that are unrolled at once.
      final: source of the final layer's modulation, table or adaln.
      position_scale: distance of positions; see network.position_scale.
      vector_kind, vector_dim: how Condition.vector is embedded, one of conditioning.VECTOR_KINDS, and its V; 0 for none.
      concat_channels: channels of the latent that is concatenated to the input; 0 for none.
      camera_dim: camera numbers at the end of each token's features, which `project_camera` projects into them.
      camera_turns: whether their products with the features are projected too; see conditioning.CameraProjection.
      temporal: whether blocks also attend over frames.
      align_block: the block, counted from 1, whose tokens are projected for alignment; 0: there is no projector.
      align_shape: (side of the grid, features) of the tokens that they are aligned with; see models.alignment.
    """

    width: int
    depth: int
    heads: int
    mlp_hidden: int
    activation: str
    patch_size: int
    latent_shape: tuple[int, int, int]
    out_channels: int
    token_shape: tuple[int, int] | None
    position_base: tuple[int, int]
    dtype: str
    remat: str
    unroll: int
    final: str
    position_scale: float = 1.0
    vector_kind: str = "linear"
    vector_dim: int = 0
    concat_channels: int = 0
    camera_dim: int = 0
    camera_turns: bool = False
    temporal: bool = False
    align_block: int = 0
    align_shape: tuple[int, int] = (0, 0)


class Mlp(nn.Module):
    """(B, N, D) -> (B, N, D): Linear, GELU, Linear. activation: one of ACTIVATIONS."""

    hidden: int
    activation: str = "gelu_tanh"

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        hidden_BNM = checkpoint_name(Dense(self.hidden, ("embed", "mlp"), name="fc1")(x_BND), MLP_MATMULS[0])
        hidden_BNM = ACTIVATIONS[self.activation](hidden_BNM)
        return checkpoint_name(Dense(x_BND.shape[-1], ("mlp_in", "embed"), name="fc2")(hidden_BNM), MLP_MATMULS[1])


class Block(nn.Module):
    """One transformer block, (B, N, D) -> (B, N, D), in the form that nn.scan takes: returns (carry, None).

    temporal: whether it has attention over frames. modulated: whether it is given its modulation. over_frames, hardware: see
    `Network.apply`.
    """

    heads: int
    mlp_hidden: int
    temporal: bool = False
    activation: str = "gelu_tanh"
    modulated: bool = False
    over_frames: Callable | None = None
    hardware: str = ""

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, s_BD: jax.Array, y_RLD: jax.Array | None, mask_RL: jax.Array | None, frames: int
    ) -> tuple[jax.Array, None]:
        """s: SiLU of the embedded time, or if `modulated` the layer's modulation, (R, 6 D) float32; y: embedded condition
        tokens; frames: F, or 0 for images, which skip the temporal layer."""
        width = x_BND.shape[-1]
        if self.hardware == "cuda":
            # Left to itself XLA keeps x with tokens last in some layers, and transposes it for each matmul.
            x_BND = with_layout_constraint(x_BND, Layout((0, 1, 2)))
        if self.modulated:
            modulation = jnp.repeat(s_BD, frames, axis=0) if frames else s_BD
        else:
            dense = Dense(MODULATIONS * width, (None, "modulation"), zeros, out_dtype=jnp.float32, name="modulation")
            modulation = dense(s_BD)
        # (B, 6 D) -> six times (B, D), float32.
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, MODULATIONS, axis=-1)

        attention = SelfAttention(self.heads, hardware=self.hardware, name="attn")
        x_BND = gated(x_BND, gate_1, attention(modulated_norm(x_BND, shift_1, scale_1)))
        if self.temporal and frames:
            x_BND = x_BND + self._temporal(x_BND, frames)
        if y_RLD is not None:
            # All frames of a clip attend to its tokens: their queries are side by side, (R, F N, D).
            x_RMD = x_BND.reshape(y_RLD.shape[0], -1, width)
            cross_RMD = CrossAttention(self.heads, self.hardware, name="cross")(x_RMD, y_RLD, mask_RL)
            x_BND = layers.broadcast_add(x_RMD, cross_RMD).reshape(x_BND.shape)
        mlp = Mlp(self.mlp_hidden, self.activation, name="mlp")
        return gated(x_BND, gate_2, mlp(modulated_norm(x_BND, shift_2, scale_2))), None

    def _temporal(self, x_BND: jax.Array, frames: int) -> jax.Array:
        """Attention over the frames at each position: (B, N, D) -> (B, N, D)."""
        dtype = x_BND.dtype
        attention = SelfAttention(self.heads, zeros, name="temporal")

        def attend(h_RFND):
            rows, frames, tokens, width = h_RFND.shape
            where_FD = layers.sinusoid(jnp.arange(frames), width)
            h_RFND = (h_RFND.astype(jnp.float32) + where_FD[None, :, None]).astype(dtype)
            h = attention(h_RFND.transpose(0, 2, 1, 3).reshape(-1, frames, width))  # (R N, F, D)
            return h.reshape(rows, tokens, frames, width).transpose(0, 2, 1, 3)  # (R, F, N, D)

        h_RFND = layers.layer_norm(x_BND).astype(dtype).reshape(-1, frames, *x_BND.shape[1:])
        h_RFND = attend(h_RFND) if self.over_frames is None else self.over_frames(attend, h_RFND)
        return h_RFND.reshape(x_BND.shape)


class KeepingBlock(Block):
    """A block that carries the output of block `kept` (counted from 1) along: of one block, where a scan's outputs would be
    stacked for all. carry: (x, that output, this block's number)."""

    kept: int = 1

    def __call__(self, carry: tuple, *inputs) -> tuple[tuple, None]:
        x_BND, kept_BND, number = carry
        x_BND, _ = super().__call__(x_BND, *inputs)
        return (x_BND, jnp.where(number == self.kept, x_BND, kept_BND), number + 1), None


def gated(x_BND: jax.Array, gate_BD: jax.Array, branch_BND: jax.Array) -> jax.Array:
    """x + gate * branch, summed in float32; gate is float32."""
    return (x_BND.astype(jnp.float32) + gate_BD[:, None] * branch_BND.astype(jnp.float32)).astype(x_BND.dtype)


class FinalLayer(nn.Module):
    """x (B, N, D), embedded time (B, D) -> (B, N, features) float32. kind: table or adaln."""

    features: int
    kind: str

    @nn.compact
    def __call__(self, x_BND: jax.Array, s_BD: jax.Array) -> jax.Array:
        width = x_BND.shape[-1]
        if self.kind == "table":
            table_2D = parameter(self, "table", nn.initializers.normal(width**-0.5), (None, "embed"), (2, width))
            shift_BD, scale_BD = s_BD + table_2D[:1], s_BD + table_2D[1:]
        else:
            modulation = Dense(2 * width, ("embed", "mlp"), zeros, name="modulation")
            shift_BD, scale_BD = jnp.split(modulation(nn.silu(s_BD)), 2, axis=-1)
        project = Dense(self.features, ("embed", None), zeros, out_dtype=jnp.float32, name="out")
        return project(modulated_norm(x_BND, shift_BD, scale_BD))


class DiT(nn.Module):
    """The network. `Network` is its interface for the rest of the code.

    gather, modulate, over_frames, hardware: what a sharded forward pass changes inside; see `Network.apply`. aligned: likewise.
    """

    cfg: DiTConfig
    gather: Callable | None = None
    modulate: Callable | None = None
    over_frames: Callable | None = None
    hardware: str = ""
    aligned: bool = False

    def setup(self):
        cfg = self.cfg
        self.patch = Dense(cfg.width, (None, "embed"))
        self.time = conditioning.TwoLayers(cfg.width)
        if cfg.token_shape:
            self.tokens = conditioning.TwoLayers(cfg.width, functools.partial(nn.gelu, approximate=True))
        if cfg.camera_dim:
            self.camera = conditioning.CameraProjection(cfg.token_shape[1], cfg.camera_turns)
        if cfg.vector_dim:
            self.vector = conditioning.vector_embedder(cfg.vector_kind, cfg.vector_dim, cfg.width)
        if cfg.align_block:
            self.align = alignment.Projector(cfg.align_shape[1])
        kept = {"kept": cfg.align_block} if self.aligned else {}
        self.blocks = self._scanned_block()(
            cfg.heads, cfg.mlp_hidden, cfg.temporal, cfg.activation, bool(self.modulate), self.over_frames, self.hardware,
            **kept,
        )  # fmt: skip
        self.final = FinalLayer(cfg.patch_size**2 * cfg.out_channels, cfg.final)

    def _scanned_block(self) -> type[nn.Module]:
        cfg, gather, block = self.cfg, self.gather, KeepingBlock if self.aligned else Block
        if gather is not None:
            # Innermost: the weights of one layer are gathered in the scanned body, and again in its backward pass.
            block = nn.map_variables(block, "params", lambda variables: {"params": gather(variables["params"])})
        # Without a gather, "none" needs no checkpoint at all, which would only prevent fusions.
        if cfg.remat != "none" or gather is not None:
            # A scan keeps CSE from undoing the recomputation; unrolled layers need the barrier.
            block = nn.remat(block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=cfg.unroll > 1, static_argnums=(5,))
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0 if self.modulate else nn.broadcast, *[nn.broadcast] * 3),
            length=cfg.depth,
            unroll=cfg.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=False,
        )

    def __call__(self, x: jax.Array, t_R: jax.Array, condition: Condition) -> jax.Array | tuple[jax.Array, jax.Array]:
        """x (R, [F,] h, w, c) -> (R, [F,] h, w, out_channels) float32; arguments, and `aligned`, as of `Network.apply`."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        frames = x.shape[1] if x.ndim == 5 else 0
        if condition.latent is not None:
            x = jnp.concatenate([x, condition.latent.astype(x.dtype)], axis=-1)
        x_Bhwc = x.reshape(-1, *x.shape[-3:])
        grid = (x_Bhwc.shape[1] // cfg.patch_size, x_Bhwc.shape[2] // cfg.patch_size)

        x_BND = self.patch(layers.patchify(x_Bhwc.astype(jnp.float32), cfg.patch_size))  # (B, N, P) -> (B, N, D)
        where_ND = layers.positions(grid, cfg.position_base, cfg.position_scale, cfg.width)
        x_BND = (x_BND + where_ND[None]).astype(dtype)

        # (R,) -> (R, D), in float32 throughout: it has R rows only, and the modulation of every layer depends on it.
        s_BD = self.time(layers.sinusoid(t_R))
        if condition.vector is not None:
            vector_RV = condition.vector.astype(jnp.float32)
            if cfg.vector_kind == "numbers":
                vector_RV = jnp.concatenate([layers.sinusoid(vector_RV[:, i]) for i in range(cfg.vector_dim)], axis=-1)
            s_BD = s_BD + self.vector(vector_RV)  # (R, D)
        modulation = self.modulate(nn.silu(s_BD).astype(dtype)) if self.modulate else None
        s_BD = jnp.repeat(s_BD, frames, axis=0) if frames else s_BD  # (R, D) -> (B, D)
        y_RLD = condition.tokens
        if y_RLD is not None:
            y_RLD = self.tokens(y_RLD.astype(dtype))  # (R, L, C) -> (R, L, D)

        if modulation is None:
            modulation = nn.silu(s_BD).astype(dtype)
        inputs = (modulation, y_RLD, condition.token_mask, frames)
        if self.aligned:
            (x_BND, kept_BND, _), _ = self.blocks((x_BND, x_BND, jnp.ones((), jnp.int32)), *inputs)
        else:
            x_BND, _ = self.blocks(x_BND, *inputs)
        out_Bhwc = layers.unpatchify(self.final(x_BND, s_BD), cfg.patch_size, grid)  # (B, N, P) -> (B, h, w, c_out)
        out = out_Bhwc.reshape(-1, frames, *out_Bhwc.shape[1:]) if frames else out_Bhwc
        if not self.aligned:
            return out
        return out, self.align(alignment.pool(kept_BND, grid, cfg.align_shape[0]))

    def project_camera(self, tokens_RLC: jax.Array) -> jax.Array:
        """Tokens with the camera's numbers at the end of their features (R, L, C + camera_dim) -> (R, L, C) float32."""
        return self.camera(tokens_RLC.astype(jnp.float32))
