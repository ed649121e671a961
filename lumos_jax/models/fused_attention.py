"""Attention as one TPU kernel in Pallas, forward and backward: logits and softmax never leave the chip's vector memory.

Queries, keys and values of self-attention are one array (B, 3, H, K, N) with tokens along the lanes, written in that layout by
their projection, so that heads of any multiple of 8 are sliced without a copy. Cross-attention has queries (B, H, K, N), keys
and values (B, 2, H, K, L), and a bias of the logits for masked keys.

Per head and block of queries, with transposed logits so that the softmax runs down the sublanes (Dao et al. 2022; maximum and
sum are exact, as all keys of a head fit):

    s = k^T q,  e = exp(scale (s - max s)),  o = v e / sum e,  z = scale max s + log sum e                          (forward)
    p = exp(scale s - z),  dv = do p^T,  ds = scale p (v^T do - <do, o>),  dq = k ds,  dk = q ds^T                 (backward)

Logits and softmax are float32 whatever the compute dtype. Axis letters: B batch, H heads, K head dim, N tokens, L tokens as
keys, n queries of a block, D width, E = 3 H K.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
MAX_TOKENS = 4096  # more keys, and the logits of a block of queries exceed vector memory
MAX_QUERIES = 256  # per block
MAX_BLOCKS = 8  # unrolled in one program
CROSS_QUERIES = 512  # at most per block of cross-attention, which has few keys
# What the gradient's arrays may add up to, by the sums in `fits` and `fits_masked`. SELF_BYTES is by itemsize: matmuls in full
# precision split float32 operands, which takes memory too. With more, programs were refused for v5e or v5p, which have 16 MiB
# of vector memory for one; the compiler shares some of it among arrays.
SELF_BYTES = {2: 20 * 2**20, 4: 12 * 2**20}
CROSS_BYTES = 10 * 2**20


def fits(tokens: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether `attend` supports heads of that shape."""
    whole = tokens % LANES == 0 and tokens <= MAX_TOKENS and head_dim % SUBLANES == 0
    # q, k, v, o and their gradients, each twice, as one is copied meanwhile; s, e, p, dp, ds in float32.
    itemsize = jnp.dtype(dtype).itemsize
    arrays = 2 * 8 * _most_heads(tokens) * tokens * head_dim * itemsize
    return whole and arrays + 5 * 4 * _queries(tokens) * tokens <= SELF_BYTES[itemsize]


def fits_masked(tokens: int, head_dim: int, keys: int, dtype: jnp.dtype) -> bool:
    """Whether `attend_masked` supports heads of that shape, with keys padded to LANES."""
    queries = _cross_queries(tokens)
    arrays = 2 * 4 * tokens * head_dim * jnp.dtype(dtype).itemsize  # q, o and their gradients
    logits = 5 * 4 * queries * (keys + -keys % LANES)
    whole = tokens % LANES == 0 and tokens <= MAX_BLOCKS * queries
    return whole and head_dim % SUBLANES == 0 and arrays + logits <= CROSS_BYTES


def _cross_queries(tokens: int) -> int:
    """Queries per block of cross-attention."""
    return next((size for size in (CROSS_QUERIES, CROSS_QUERIES // 2) if tokens % size == 0), LANES)


def _queries(tokens: int) -> int:
    """Queries per block: fewer where there are many keys."""
    return MAX_QUERIES if tokens % MAX_QUERIES == 0 and tokens <= MAX_TOKENS // 4 else LANES


def _heads(heads: int, tokens: int) -> int:
    """Heads per program."""
    return next(n for n in (4, 3, 2, 1) if heads % n == 0 and n <= _most_heads(tokens))


def _most_heads(tokens: int) -> int:
    return min(4, max(1, MAX_BLOCKS * _queries(tokens) // tokens))


def _dot(a, b, a_dim, b_dim):
    # Named, since the compiler of kernels refuses the highest precision, which runs ask for, of bfloat16 arrays.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _softmax(q_Kn, k_KL, v_KL, bias_L1=None):
    """A block of queries: outputs (K, n) and z (1, n), float32."""
    scale, s_Ln = q_Kn.shape[0] ** -0.5, _dot(k_KL, q_Kn, 0, 0)
    s_Ln = s_Ln if bias_L1 is None else s_Ln + bias_L1
    max_1n = s_Ln.max(axis=0, keepdims=True)
    e_Ln = jnp.exp(scale * (s_Ln - max_1n))
    sum_1n = e_Ln.sum(axis=0, keepdims=True)
    return _dot(v_KL, e_Ln.astype(v_KL.dtype), 1, 0) / sum_1n, scale * max_1n + jnp.log(sum_1n)


def _softmax_gradient(q_Kn, k_KL, v_KL, out_Kn, z_1n, do_Kn, bias_L1=None):
    """Of a block of queries: dq (K, n), and its part of dk and dv (K, L), float32."""
    scale, s_Ln = q_Kn.shape[0] ** -0.5, _dot(k_KL, q_Kn, 0, 0)
    s_Ln = s_Ln if bias_L1 is None else s_Ln + bias_L1
    inner_1n = (do_Kn.astype(jnp.float32) * out_Kn.astype(jnp.float32)).sum(axis=0, keepdims=True)
    p_Ln = jnp.exp(scale * s_Ln - z_1n)
    ds_Ln = (scale * p_Ln * (_dot(v_KL, do_Kn, 0, 0) - inner_1n)).astype(q_Kn.dtype)
    return _dot(k_KL, ds_Ln, 1, 0), _dot(q_Kn, ds_Ln, 1, 1), _dot(do_Kn, p_Ln.astype(do_Kn.dtype), 1, 1)


def _blocks(tokens, size):
    return [pl.ds(begin, size) for begin in range(0, tokens, size)]


def _forward_kernel(qkv, out, z):
    tokens = qkv.shape[-1]
    for h in range(qkv.shape[2]):
        for queries in _blocks(tokens, _queries(tokens)):
            o_Kn, z[0, h, :, queries] = _softmax(qkv[0, 0, h, :, queries], qkv[0, 1, h], qkv[0, 2, h])
            out[0, h, :, queries] = o_Kn.astype(out.dtype)


def _backward_kernel(qkv, out, z, grad, grad_qkv):
    tokens = qkv.shape[-1]
    for h in range(qkv.shape[2]):
        dk_KL = dv_KL = 0.0
        for queries in _blocks(tokens, _queries(tokens)):
            block = (a[0, h, :, queries] for a in (out, z, grad))
            q_Kn, k_KL, v_KL = qkv[0, 0, h, :, queries], qkv[0, 1, h], qkv[0, 2, h]
            dq_Kn, dk, dv = _softmax_gradient(q_Kn, k_KL, v_KL, *block)
            grad_qkv[0, 0, h, :, queries] = dq_Kn.astype(grad_qkv.dtype)
            dk_KL, dv_KL = dk_KL + dk, dv_KL + dv
        grad_qkv[0, 1, h] = dk_KL.astype(grad_qkv.dtype)
        grad_qkv[0, 2, h] = dv_KL.astype(grad_qkv.dtype)


def _masked_forward_kernel(q, kv, bias, out, z):
    for h in range(q.shape[1]):
        for queries in _blocks(q.shape[-1], _cross_queries(q.shape[-1])):
            o_Kn, z[0, h, :, queries] = _softmax(q[0, h, :, queries], kv[0, 0, h], kv[0, 1, h], bias[0])
            out[0, h, :, queries] = o_Kn.astype(out.dtype)


def _masked_backward_kernel(q, kv, bias, out, z, grad, grad_q, grad_kv):
    for h in range(q.shape[1]):
        dk_KL = dv_KL = 0.0
        for queries in _blocks(q.shape[-1], _cross_queries(q.shape[-1])):
            block = (a[0, h, :, queries] for a in (out, z, grad))
            dq_Kn, dk, dv = _softmax_gradient(q[0, h, :, queries], kv[0, 0, h], kv[0, 1, h], *block, bias[0])
            grad_q[0, h, :, queries] = dq_Kn.astype(grad_q.dtype)
            dk_KL, dv_KL = dk_KL + dk, dv_KL + dv
        grad_kv[0, 0, h] = dk_KL.astype(grad_kv.dtype)
        grad_kv[0, 1, h] = dv_KL.astype(grad_kv.dtype)


def _run(kernel, name, operands, results, group, keys, matmuls, interpret):
    """Runs `kernel` for every row and group of heads. Arrays are (B, parts, H, K, tokens), (B, H, K, tokens), or (B, L, 1).

    keys: L. matmuls: how many of N x L x K it has, for the compiler's cost model.
    """
    batch, heads, head_dim, tokens = next(r.shape for r in (*results, *operands) if len(r.shape) == 4)

    def spec(a):
        def index(row, head):
            return {3: (row, 0, 0), 4: (row, head, 0, 0), 5: (row, 0, head, 0, 0)}[len(a.shape)]

        inner = a.shape[1:] if len(a.shape) == 3 else (*a.shape[1:-3], group, *a.shape[-2:])
        return pl.BlockSpec((1, *inner), index)

    varies = jax.typeof(operands[0]).manual_axis_type  # inside shard_map: the mesh axes over which the operands differ
    results = [jax.ShapeDtypeStruct(r.shape, r.dtype, manual_axis_type=varies) for r in results]
    pairs = batch * heads * tokens * keys
    cost = pl.CostEstimate(
        flops=2 * matmuls * pairs * head_dim,
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
    """Attends: queries, keys and values (B, 3, H, K, N) -> (B, H, K, N), in the dtype of `qkv`.

    Args:
      qkv: heads of a shape that `fits` accepts.
      interpret: run Pallas's interpreter, slowly and on any backend, instead of compiling for a TPU.
    """
    return _attend_forward(qkv, interpret)[0]


def _attend_forward(qkv, interpret):
    batch, _, *rest, tokens = qkv.shape
    out = jax.ShapeDtypeStruct((batch, *rest, tokens), qkv.dtype)
    z = jax.ShapeDtypeStruct((batch, rest[0], 1, tokens), jnp.float32)
    group = _heads(rest[0], tokens)
    out, z = _run(_forward_kernel, "attention", [qkv], [out, z], group, tokens, 2, interpret)
    return out, (qkv, out, z)


def _attend_backward(interpret, residuals, grad):
    operands, tokens = [*residuals, grad], grad.shape[-1]
    group = _heads(grad.shape[1], tokens)
    return tuple(_run(_backward_kernel, "attention_gradient", operands, [residuals[0]], group, tokens, 5, interpret))


attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend_masked(q: jax.Array, kv: jax.Array, bias: jax.Array, interpret: bool = False) -> jax.Array:
    """Cross-attention: queries (B, H, K, N), keys and values (B, 2, H, K, L) -> (B, H, K, N), in the dtype of `q`.

    bias: (B, L, 1) float32, added to the logits before they are scaled; no gradient. interpret: as of `attend`.
    """
    return _masked_forward(q, kv, bias, interpret)[0]


def _masked_forward(q, kv, bias, interpret):
    z = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[-1]), jnp.float32)
    out, z = _run(_masked_forward_kernel, "cross_attention", [q, kv, bias], [q, z], 1, kv.shape[-1], 2, interpret)
    return out, (q, kv, bias, out, z)


def _masked_backward(interpret, residuals, grad):
    q, kv, bias, *_ = residuals
    operands, name = [*residuals, grad], "cross_attention_gradient"
    return *_run(_masked_backward_kernel, name, operands, [q, kv], 1, kv.shape[-1], 5, interpret), jnp.zeros_like(bias)


attend_masked.defvjp(_masked_forward, _masked_backward)


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x (B, N, D), kernel (D, E), bias (E,) -> (B, E, N): a dense layer whose result has tokens along the lanes, as `attend`
    takes them. The matrix unit writes that layout, so that nothing is transposed in memory."""
    out = jax.lax.dot_general(kernel.astype(x.dtype), x, (((0,), (2,)), ((), ())))
    return out.transpose(1, 0, 2) + bias[None, :, None].astype(x.dtype)


def _project_backward(residuals, grad):
    x, kernel, bias = residuals
    grad_x = jax.lax.dot_general(grad, kernel.astype(x.dtype), (((1,), (1,)), ((), ())))
    grad_kernel = jax.lax.dot_general(x, grad, (((0, 1), (0, 2)), ((), ())), preferred_element_type=kernel.dtype)
    # Matmul with ones: the matrix unit sums along lanes, which the vector unit does slowly.
    ones = jax.lax.optimization_barrier(jnp.ones((grad.shape[0], grad.shape[2], SUBLANES), grad.dtype))
    grad_bias = jax.lax.dot_general(grad, ones, (((0, 2), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
    return grad_x, grad_kernel, grad_bias[:, 0].astype(bias.dtype)


project.defvjp(lambda x, kernel, bias: (project(x, kernel, bias), (x, kernel, bias)), _project_backward)


def merge(heads: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The output projection: heads (B, H, K, N), kernel (H K, D), bias (D,) -> (B, N, D)."""
    flat = heads.reshape(heads.shape[0], -1, heads.shape[-1])
    out = jax.lax.dot_general(flat, kernel.astype(flat.dtype), (((1,), (0,)), ((), ())))
    return out + bias[None, None].astype(flat.dtype)
