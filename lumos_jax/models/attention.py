"""Self-attention over latent tokens, and cross-attention from them to condition tokens.

softmax(q k^T / sqrt(K)) v. Logits and softmax are float32 whatever the compute dtype. The plain form keeps all logits of a
layer in memory, 4 N^2 bytes a head and row; kernels, which do not, take its place where `kernel_for` says. Axis letters: B
batch, N latent tokens, L condition tokens, D width, H heads, K head dim.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lumos_jax.models import fused_attention
from lumos_jax.models.layers import Initializer, dense, parameter, reshaped, xavier, zeros

# Heads and tokens of self-attention that cuDNN is asked for: its flash attention takes these widths on every GPU that has it;
# with fewer tokens the plain form's logits are small beside what a block's MLP holds.
CUDNN_HEAD_DIMS = range(8, 129, 8)
CUDNN_TOKENS = 1024

# Far below any logit, and finite: a row whose tokens are all masked averages them instead of becoming NaN.
MASKED = -1e30


def kernel_for(hardware: str, tokens: int, head_dim: int, dtype: jnp.dtype) -> str:
    """Which form of self-attention is taken: "pallas" (fused_attention), "cudnn" or "" for the plain one.

    Args:
      hardware: "tpu" for rows that are all of one chip; "cuda" for rows and heads that are split evenly over GPUs with flash
        attention; "" for all else. `train.spread` tells.
      tokens, head_dim, dtype: of the queries.
    """
    if hardware == "tpu" and fused_attention.fits(tokens, head_dim):
        return "pallas"
    if hardware == "cuda" and tokens >= CUDNN_TOKENS and head_dim in CUDNN_HEAD_DIMS and dtype == jnp.bfloat16:
        return "cudnn"
    return ""


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """q (B, N, H, K), k and v (B, L, H, K), mask (B, L) bool, True for tokens that are seen -> (B, N, H, K).

    Both passes divide by the softmax's sum where heads are K wide, never where they are L wide (Dao et al. 2022):
        e = exp(l - max l),  o = (e v) / sum e,    do' = do / sum e,  dl = e (do' v^T - <do', o>),  dv = e^T do'
    """
    return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q, k, v, mask):
    scale = q.shape[-1] ** -0.5
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    logits = jnp.einsum("bhnk,bhlk->bhnl", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, MASKED)
    e = jnp.exp(scale * (logits - logits.max(axis=-1, keepdims=True)))
    total = e.sum(axis=-1, keepdims=True)
    e = e.astype(v.dtype)
    out = jnp.einsum("bhnl,bhlk->bhnk", e, v, preferred_element_type=jnp.float32) / total
    out = out.astype(v.dtype)
    return out.transpose(0, 2, 1, 3), (q, k, v, e, total, out)


def _attend_backward(residuals, grad):
    q, k, v, e, total, out = residuals
    grad = grad.transpose(0, 2, 1, 3).astype(jnp.float32) / total
    inner = (grad * out).sum(axis=-1, keepdims=True)
    grad = grad.astype(v.dtype)
    grad_v = jnp.einsum("bhnl,bhnk->bhlk", e, grad)
    grad_e = jnp.einsum("bhnk,bhlk->bhnl", grad, v, preferred_element_type=jnp.float32)
    grad_logits = (q.shape[-1] ** -0.5 * e * (grad_e - inner)).astype(q.dtype)
    grad_q = jnp.einsum("bhnl,bhlk->bhnk", grad_logits, k)
    grad_k = jnp.einsum("bhnl,bhnk->bhlk", grad_logits, q)
    return (*(g.transpose(0, 2, 1, 3) for g in (grad_q, grad_k, grad_v)), None)


attend.defvjp(_attend_forward, _attend_backward)


def _project(module: nn.Module, name: str, parts: int, width: int, heads: int):
    """Kernel (D, parts, H, K) and bias (parts, H, K): heads are a dim of their own, so that they can be split."""
    axes = ("embed", None, "heads", "head_dim")
    shape = (width, parts, heads, width // heads)
    kernel = parameter(module, f"{name}_kernel", reshaped(xavier, width, parts * width), axes, shape)
    return kernel, parameter(module, f"{name}_bias", zeros, axes[1:], shape[1:])


def _output(module: nn.Module, init, width: int, heads: int):
    axes, shape = ("heads", "head_dim", "embed"), (heads, width // heads, width)
    kernel = parameter(module, "out_kernel", reshaped(init, width, width), axes, shape)
    return kernel.reshape(width, width), parameter(module, "out_bias", zeros, axes[2:], (width,))


def _split_heads(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> list[jax.Array]:
    """x (B, N, D) -> parts arrays (B, N, H, K)."""
    width, parts, heads, head_dim = kernel.shape
    x = dense(x, kernel.reshape(width, -1), bias.reshape(-1)).reshape(*x.shape[:2], parts, heads, head_dim)
    # Split, whose gradient is one concatenation; that of indexing is a sum of padded arrays.
    return [part.squeeze(2) for part in jnp.split(x, parts, axis=2)]


def _merge_heads(x: jax.Array) -> jax.Array:
    """(B, N, H, K) -> (B, N, D)."""
    return x.reshape(*x.shape[:2], -1)


class SelfAttention(nn.Module):
    """(B, N, D) -> (B, N, D), one fused projection to queries, keys and values; `out_init` is of the output's kernel.

    hardware: as of `kernel_for`.
    """

    heads: int
    out_init: Initializer = xavier
    hardware: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        kernel, bias = _project(self, "qkv", 3, width, self.heads)
        output = _output(self, self.out_init, width, self.heads)
        chosen = kernel_for(self.hardware, x.shape[1], width // self.heads, x.dtype)
        if chosen == "pallas":
            qkv = fused_attention.project(x, kernel.reshape(width, -1), bias.reshape(-1))
            heads = fused_attention.attend(qkv.reshape(x.shape[0], *kernel.shape[1:], x.shape[1]))
            return fused_attention.merge(heads, *output)
        q, k, v = _split_heads(x, kernel, bias)
        attended = jax.nn.dot_product_attention(q, k, v, implementation="cudnn") if chosen else attend(q, k, v)
        return dense(_merge_heads(attended), *output)


class CrossAttention(nn.Module):
    """x (B, N, D), y (B, L, D), mask (B, L) -> (B, N, D), or (B, 1, D), to be broadcast, for a single token.

    With one condition token the softmax is the constant 1 whatever the query (and whatever the mask, by the rule for
    rows whose tokens are all masked), so the layer is two products on that token. `fold` False keeps the general path.
    """

    heads: int
    fold: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        q_kernel, q_bias = _project(self, "q", 1, width, self.heads)
        kv_kernel, kv_bias = _project(self, "kv", 2, width, self.heads)
        output = _output(self, zeros, width, self.heads)
        if self.fold and y.shape[1] == 1:
            return dense(dense(y, kv_kernel[:, 1].reshape(width, width), kv_bias[1].reshape(width)), *output)
        (q,) = _split_heads(x, q_kernel, q_bias)
        k, v = _split_heads(y, kv_kernel, kv_bias)
        return dense(_merge_heads(attend(q, k, v, mask)), *output)
