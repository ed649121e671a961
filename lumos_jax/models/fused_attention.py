"""Self-attention as one TPU kernel, forward and backward: logits and softmax never leave the chip's vector memory.

Written in Pallas. Queries, keys and values are one array (B, 3, H, K, N) with tokens along the lanes, as their projection
writes it at once, so that heads of any multiple of 8 are cut without moving anything. Per head and block of queries, with
logits transposed so that the softmax runs down the sublanes (Dao et al. 2022; maximum and sum are whole, as all keys of a
head fit):

    s = k^T q,  e = exp(scale (s - max s)),  o = v e / sum e,  z = scale max s + log sum e
    p = exp(scale s - z),  dv = do p^T,  ds = scale p (v^T do - <do, o>),  dq = k ds,  dk = q ds^T

Logits and softmax are float32 whatever the compute dtype. Axis letters: B batch, H heads, K head dim, N tokens, L tokens as
keys, n queries of a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
MOST_TOKENS = 4096  # whose logits against a block of queries fit in vector memory
MOST_QUERIES = 256  # of a block
MOST_BLOCKS = 8  # that one program lays out one after another


def fits(tokens: int, head_dim: int) -> bool:
    """Whether the kernel takes heads of that many tokens, each `head_dim` wide."""
    return tokens % LANES == 0 and tokens <= MOST_TOKENS and head_dim % SUBLANES == 0


def _queries(tokens: int) -> int:
    """Queries of a block: fewer where there are many keys."""
    return MOST_QUERIES if tokens % MOST_QUERIES == 0 and tokens <= MOST_TOKENS // 4 else LANES


def _heads(heads: int, tokens: int) -> int:
    """Heads of one program."""
    most = max(1, MOST_BLOCKS * _queries(tokens) // tokens)
    return next(n for n in (4, 3, 2, 1) if heads % n == 0 and n <= most)


def _dot(a, b, a_dim, b_dim):
    return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)


def _forward_kernel(qkv, out, z):
    _, _, heads, head_dim, tokens = qkv.shape
    block, scale = _queries(tokens), head_dim**-0.5
    for h in range(heads):
        k, v = qkv[0, 1, h], qkv[0, 2, h]
        for begin in range(0, tokens, block):
            some = pl.ds(begin, block)
            s = _dot(k, qkv[0, 0, h, :, some], 0, 0)  # (L, n)
            top = s.max(axis=0, keepdims=True)
            e = jnp.exp(scale * (s - top))
            total = e.sum(axis=0, keepdims=True)
            out[0, h, :, some] = (_dot(v, e.astype(v.dtype), 1, 0) / total).astype(out.dtype)
            z[0, h, :, some] = scale * top + jnp.log(total)


def _backward_kernel(qkv, out, z, grad, grad_qkv):
    _, _, heads, head_dim, tokens = qkv.shape
    block, scale = _queries(tokens), head_dim**-0.5
    for h in range(heads):
        k, v = qkv[0, 1, h], qkv[0, 2, h]
        dk = dv = 0.0
        for begin in range(0, tokens, block):
            some = pl.ds(begin, block)
            q, do = qkv[0, 0, h, :, some], grad[0, h, :, some]
            inner = (do.astype(jnp.float32) * out[0, h, :, some].astype(jnp.float32)).sum(axis=0, keepdims=True)
            p = jnp.exp(scale * _dot(k, q, 0, 0) - z[0, h, :, some])  # (L, n)
            ds = (scale * p * (_dot(v, do, 0, 0) - inner)).astype(q.dtype)
            dv += _dot(do, p.astype(do.dtype), 1, 1)  # (K, L)
            dk += _dot(q, ds, 1, 1)
            grad_qkv[0, 0, h, :, some] = _dot(k, ds, 1, 0).astype(grad_qkv.dtype)
        grad_qkv[0, 1, h] = dk.astype(grad_qkv.dtype)
        grad_qkv[0, 2, h] = dv.astype(grad_qkv.dtype)


def _run(kernel, name, operands, results, products, interpret):
    """Runs `kernel` for every row and group of heads. products: of N x N x K, by which its cost is told to the compiler."""
    batch, _, heads, head_dim, tokens = operands[0].shape
    group = _heads(heads, tokens)

    def spec(a):
        def index(row, head):
            return (row, 0, head, 0, 0) if len(a.shape) == 5 else (row, head, 0, 0)

        return pl.BlockSpec((1, *a.shape[1:-3], group, *a.shape[-2:]), index)

    varies = jax.typeof(operands[0]).manual_axis_type  # on which axes of the mesh, of which the kernel knows nothing
    results = [jax.ShapeDtypeStruct(r.shape, r.dtype, manual_axis_type=varies) for r in results]
    pairs = batch * heads * tokens**2
    cost = pl.CostEstimate(
        flops=2 * products * pairs * head_dim,
        transcendentals=pairs,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*operands, *results)),
    )
    return pl.pallas_call(
        kernel,
        results,
        grid=(batch, heads // group),
        in_specs=[spec(a) for a in operands],
        out_specs=[spec(a) for a in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(qkv: jax.Array, interpret: bool = False) -> jax.Array:
    """Queries, keys and values (B, 3, H, K, N) -> (B, H, K, N), both in the dtype of `qkv`.

    Args:
      qkv: of heads that `fits` accepts.
      interpret: compute it step by step on any backend, slowly, instead of compiling it for a TPU.
    """
    return _attend_forward(qkv, interpret)[0]


def _attend_forward(qkv, interpret):
    batch, _, *rest, tokens = qkv.shape
    out = jax.ShapeDtypeStruct((batch, *rest, tokens), qkv.dtype)
    z = jax.ShapeDtypeStruct((batch, rest[0], 1, tokens), jnp.float32)
    out, z = _run(_forward_kernel, "attention", [qkv], [out, z], 2, interpret)
    return out, (qkv, out, z)


def _attend_backward(interpret, residuals, grad):
    operands = [*residuals, grad]
    return tuple(_run(_backward_kernel, "attention_gradient", operands, [residuals[0]], 5, interpret))


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x (B, N, D), kernel (D, E), bias (E,) -> (B, E, N): a dense layer whose tokens end up along the lanes, as `attend` takes
    them. Written by the matrix unit in that order, it need not be transposed in memory."""
    out = jax.lax.dot_general(kernel.astype(x.dtype), x, (((0,), (2,)), ((), ())))
    return out.transpose(1, 0, 2) + bias[None, :, None].astype(x.dtype)


def _project_backward(residuals, grad):
    x, kernel, bias = residuals
    grad_x = jax.lax.dot_general(grad, kernel.astype(x.dtype), (((1,), (1,)), ((), ())))
    grad_kernel = jax.lax.dot_general(x, grad, (((0, 1), (0, 2)), ((), ())), preferred_element_type=kernel.dtype)
    # A product with ones: the matrix unit sums along lanes, which the vector unit does slowly.
    ones = jax.lax.optimization_barrier(jnp.ones((grad.shape[0], grad.shape[2], SUBLANES), grad.dtype))
    grad_bias = jax.lax.dot_general(grad, ones, (((0, 2), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
    return grad_x, grad_kernel, grad_bias[:, 0].astype(bias.dtype)


project.defvjp(lambda x, kernel, bias: (project(x, kernel, bias), (x, kernel, bias)), _project_backward)


def merge(heads: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """heads (B, H, K, N), kernel (H K, D), bias (D,) -> (B, N, D)."""
    flat = heads.reshape(heads.shape[0], -1, heads.shape[-1])
    return jax.lax.dot_general(flat, kernel.astype(flat.dtype), (((1,), (0,)), ((), ()))) + bias[None, None].astype(
        flat.dtype
    )
