"""Self-attention over latent tokens, and cross-attention from them to condition tokens: softmax(q k^T / sqrt(K)) v.

Logits and softmax are float32 whatever the compute dtype. The plain form keeps a layer's logits in memory, 4 N^2 bytes a head
and row; `kernel_for` says where a fused kernel, which does not, takes its place. Axis letters: B batch, N latent tokens, L
condition tokens, D width, H heads, K head dim.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lumos_jax.models import fused_attention
from lumos_jax.models.layers import Initializer, dense, parameter, reshaped, xavier, zeros

QKV = "qkv"  # name by which remat policies know the queries, keys and values of self-attention

# cuDNN's flash attention takes these head dims on every GPU that has it. With 256 tokens a step of DiT-XL/2 takes 16 % less
# time with it on an H100 (docs/performance.md); it was not measured with fewer.
CUDNN_HEAD_DIMS = range(8, 129, 8)
CUDNN_TOKENS = 256

# Far below any logit, and finite: a row whose tokens are all masked averages them instead of becoming NaN.
MASKED = -1e30


def kernel_for(hardware: str, tokens: int, head_dim: int, dtype: jnp.dtype) -> str:
    """Selects the form of self-attention: "pallas" (fused_attention), "cudnn", or "" for the plain one.

    Args:
      hardware: "tpu" where all rows are on one chip; "cuda" where rows and heads split evenly over GPUs with flash
        attention; "" otherwise. The sharded forward pass sets it.
      tokens, head_dim, dtype: of the queries.
    """
    if hardware == "tpu" and fused_attention.fits(tokens, head_dim, dtype):
        return "pallas"
    if hardware == "cuda" and tokens >= CUDNN_TOKENS and head_dim in CUDNN_HEAD_DIMS and dtype == jnp.bfloat16:
        return "cudnn"
    return ""


@jax.custom_vjp
def attend(q_BNHK: jax.Array, k_BLHK: jax.Array, v_BLHK: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """The plain form, (B, N, H, K); mask is True for tokens that are seen.

    Both passes divide by the softmax's sum where arrays are K wide, never where they are L wide (Dao et al. 2022):
        e = exp(l - max l),  o = (e v) / sum e,    do' = do / sum e,  dl = e (do' v^T - <do', o>),  dv = e^T do'
    """
    return _attend_forward(q_BNHK, k_BLHK, v_BLHK, mask_BL)[0]


def _attend_forward(q, k, v, mask_BL):
    scale = q.shape[-1] ** -0.5
    q_BHNK, k_BHLK, v_BHLK = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    logits_BHNL = jnp.einsum("bhnk,bhlk->bhnl", q_BHNK, k_BHLK, preferred_element_type=jnp.float32)
    if mask_BL is not None:
        logits_BHNL = jnp.where(mask_BL[:, None, None, :], logits_BHNL, MASKED)
    e_BHNL = jnp.exp(scale * (logits_BHNL - logits_BHNL.max(axis=-1, keepdims=True)))
    total_BHN1 = e_BHNL.sum(axis=-1, keepdims=True)
    e_BHNL = e_BHNL.astype(v.dtype)
    out_BHNK = jnp.einsum("bhnl,bhlk->bhnk", e_BHNL, v_BHLK, preferred_element_type=jnp.float32) / total_BHN1
    out_BHNK = out_BHNK.astype(v.dtype)
    return out_BHNK.transpose(0, 2, 1, 3), (q_BHNK, k_BHLK, v_BHLK, e_BHNL, total_BHN1, out_BHNK)


def _attend_backward(residuals, grad):
    q_BHNK, k_BHLK, v_BHLK, e_BHNL, total_BHN1, out_BHNK = residuals
    grad_BHNK = grad.transpose(0, 2, 1, 3).astype(jnp.float32) / total_BHN1
    inner_BHN1 = (grad_BHNK * out_BHNK).sum(axis=-1, keepdims=True)
    grad_BHNK = grad_BHNK.astype(v_BHLK.dtype)
    grad_v = jnp.einsum("bhnl,bhnk->bhlk", e_BHNL, grad_BHNK)
    grad_e = jnp.einsum("bhnk,bhlk->bhnl", grad_BHNK, v_BHLK, preferred_element_type=jnp.float32)
    grad_logits = (q_BHNK.shape[-1] ** -0.5 * e_BHNL * (grad_e - inner_BHN1)).astype(q_BHNK.dtype)
    grad_q = jnp.einsum("bhnl,bhlk->bhnk", grad_logits, k_BHLK)
    grad_k = jnp.einsum("bhnl,bhnk->bhlk", grad_logits, q_BHNK)
    return (*(g.transpose(0, 2, 1, 3) for g in (grad_q, grad_k, grad_v)), None)


attend.defvjp(_attend_forward, _attend_backward)


def attend_fused(
    q_BHKN: jax.Array,
    y_BLD: jax.Array,
    mask_BL: jax.Array | None,
    kernel: jax.Array,
    bias: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Cross-attention by the TPU kernel, (B, H, K, N).

    Args:
      q_BHKN: queries, tokens last.
      y_BLD, mask_BL: condition tokens, and which of them are seen; None: all.
      kernel, bias: (D, 2, H, K) and (2, H, K), which project y to keys and values.
      interpret: as of fused_attention.attend.
    """
    batch, length, _ = y_BLD.shape
    mask_BL = jnp.ones((batch, length), bool) if mask_BL is None else mask_BL
    seen_B1 = mask_BL.any(axis=1, keepdims=True)
    padding = ((0, 0), (0, -length % fused_attention.LANES))
    mask_BL = jnp.pad(mask_BL | ~seen_B1, padding)
    kv = _project_heads(jnp.pad(y_BLD, (*padding, (0, 0))), kernel, bias)  # (B, 2, H, K, L)
    # Rows that see nothing average all their tokens: with keys of zeros all logits are equal.
    kv = jnp.where(seen_B1[..., None, None, None] | (jnp.arange(2)[None, :, None, None, None] == 1), kv, 0)
    logit_bias = jnp.where(mask_BL, 0.0, MASKED)[..., None]
    return fused_attention.attend_masked(q_BHKN, kv, logit_bias, interpret)


def _input_projection(module: nn.Module, name: str, parts: int, width: int, heads: int):
    """Kernel (D, parts, H, K) and bias (parts, H, K): heads are a dim of their own, so that a mesh can split them."""
    axes = ("embed", None, "heads", "head_dim")
    shape = (width, parts, heads, width // heads)
    kernel = parameter(module, f"{name}_kernel", reshaped(xavier, width, parts * width), axes, shape)
    return kernel, parameter(module, f"{name}_bias", zeros, axes[1:], shape[1:])


def _output_projection(module: nn.Module, init: Initializer, width: int, heads: int):
    """Kernel (H K, D), stored as (H, K, D), and bias (D,)."""
    axes, shape = ("heads_in", "head_dim", "embed"), (heads, width // heads, width)
    kernel = parameter(module, "out_kernel", reshaped(init, width, width), axes, shape)
    return kernel.reshape(width, width), parameter(module, "out_bias", zeros, axes[2:], (width,))


def _split_heads(x_BND: jax.Array, kernel: jax.Array, bias: jax.Array, apart: bool = False) -> list[jax.Array]:
    """Projects x: a list of `parts` arrays (B, N, H, K). apart: by a matmul each, for kernels that read whole arrays."""
    width, parts, heads, head_dim = kernel.shape
    if apart:  # splitting one result, and joining its gradient again, would copy both
        pairs = [(kernel[:, part].reshape(width, -1), bias[part].reshape(-1)) for part in range(parts)]
        return [dense(x_BND, *pair).reshape(*x_BND.shape[:2], heads, head_dim) for pair in pairs]
    x = dense(x_BND, kernel.reshape(width, -1), bias.reshape(-1)).reshape(*x_BND.shape[:2], parts, heads, head_dim)
    # The gradient of split is one concatenation; that of indexing is a sum of padded arrays.
    return [part.squeeze(2) for part in jnp.split(x, parts, axis=2)]


def _project_heads(x_BND: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Projects x for a TPU kernel: (B, parts, H, K, N)."""
    flat = fused_attention.project(x_BND, kernel.reshape(kernel.shape[0], -1), bias.reshape(-1))
    return flat.reshape(x_BND.shape[0], *kernel.shape[1:], x_BND.shape[1])


class SelfAttention(nn.Module):
    """(B, N, D) -> (B, N, D), with one fused projection to queries, keys and values.

    out_init: initializer of the output's kernel. hardware: see `kernel_for`.
    """

    heads: int
    out_init: Initializer = xavier
    hardware: str = ""

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        batch, tokens, width = x_BND.shape
        kernel, bias = _input_projection(self, "qkv", 3, width, self.heads)
        output = _output_projection(self, self.out_init, width, self.heads)
        chosen = kernel_for(self.hardware, tokens, width // self.heads, x_BND.dtype)
        if chosen == "pallas":
            qkv = fused_attention.project(x_BND, kernel.reshape(width, -1), bias.reshape(-1))  # (B, 3 H K, N)
            qkv = checkpoint_name(qkv, QKV)
            heads_BHKN = fused_attention.attend(qkv.reshape(batch, *kernel.shape[1:], tokens))
            return fused_attention.merge(heads_BHKN, *output)
        heads = _split_heads(x_BND, kernel, bias, apart=chosen == "cudnn")
        q_BNHK, k_BNHK, v_BNHK = checkpoint_name(heads, QKV)
        if chosen == "cudnn":
            heads_BNHK = jax.nn.dot_product_attention(q_BNHK, k_BNHK, v_BNHK, implementation="cudnn")
        else:
            heads_BNHK = attend(q_BNHK, k_BNHK, v_BNHK)
        return dense(heads_BNHK.reshape(x_BND.shape), *output)


class CrossAttention(nn.Module):
    """x (B, N, D), y (B, L, D), mask (B, L) -> (B, N, D); for a single token (B, 1, D), to be broadcast.

    With one condition token the softmax is the constant 1 whatever the query, and whatever the mask, as rows whose tokens are
    all masked average them. So the layer is two matmuls on that token. hardware: "tpu" allows fused_attention's kernel.
    """

    heads: int
    hardware: str = ""

    @nn.compact
    def __call__(self, x_BND: jax.Array, y_BLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
        width = x_BND.shape[-1]
        q_kernel, q_bias = _input_projection(self, "q", 1, width, self.heads)
        kv_kernel, kv_bias = _input_projection(self, "kv", 2, width, self.heads)
        output = _output_projection(self, zeros, width, self.heads)
        if y_BLD.shape[1] == 1:
            v_B1D = dense(y_BLD, kv_kernel[:, 1].reshape(width, width), kv_bias[1].reshape(width))
            return dense(v_B1D, *output)
        shape = (x_BND.shape[1], width // self.heads, y_BLD.shape[1])
        if self.hardware == "tpu" and fused_attention.fits_masked(*shape, x_BND.dtype):
            q_BHKN = _project_heads(x_BND, q_kernel, q_bias).squeeze(1)
            return fused_attention.merge(attend_fused(q_BHKN, y_BLD, mask_BL, kv_kernel, kv_bias), *output)
        (q_BNHK,) = _split_heads(x_BND, q_kernel, q_bias)
        k_BLHK, v_BLHK = _split_heads(y_BLD, kv_kernel, kv_bias)
        return dense(attend(q_BNHK, k_BLHK, v_BLHK, mask_BL).reshape(x_BND.shape), *output)
