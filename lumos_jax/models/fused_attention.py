"""Self-attention as one TPU kernel in Pallas, forward and backward: logits and softmax never leave the chip's vector memory.

Queries, keys and values are one array (B, 3, H, K, N) with tokens along the lanes, written in that layout by their projection,
so that heads of any multiple of 8 are sliced without a copy. Per head and block of queries, with transposed logits so that the
softmax runs down the sublanes (Dao et al. 2022; maximum and sum are exact, as all keys of a head fit):

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


def fits(tokens: int, head_dim: int) -> bool:
    """Whether the kernel supports heads of that shape."""
    return tokens % LANES == 0 and tokens <= MAX_TOKENS and head_dim % SUBLANES == 0


def _queries(tokens: int) -> int:
    """Queries per block: fewer where there are many keys."""
    return MAX_QUERIES if tokens % MAX_QUERIES == 0 and tokens <= MAX_TOKENS // 4 else LANES


def _heads(heads: int, tokens: int) -> int:
    """Heads per program."""
    most = max(1, MAX_BLOCKS * _queries(tokens) // tokens)
    return next(n for n in (4, 3, 2, 1) if heads % n == 0 and n <= most)


def _dot(a, b, a_dim, b_dim):
    # Named, since the compiler of kernels refuses the highest precision, which runs ask for, of bfloat16 arrays.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _forward_kernel(qkv, out, z):
    _, _, heads, head_dim, tokens = qkv.shape
    block, scale = _queries(tokens), head_dim**-0.5
    for h in range(heads):
        k_KL, v_KL = qkv[0, 1, h], qkv[0, 2, h]
        for begin in range(0, tokens, block):
            queries = pl.ds(begin, block)
            s_Ln = _dot(k_KL, qkv[0, 0, h, :, queries], 0, 0)
            max_1n = s_Ln.max(axis=0, keepdims=True)
            e_Ln = jnp.exp(scale * (s_Ln - max_1n))
            sum_1n = e_Ln.sum(axis=0, keepdims=True)
            out[0, h, :, queries] = (_dot(v_KL, e_Ln.astype(v_KL.dtype), 1, 0) / sum_1n).astype(out.dtype)  # (K, n)
            z[0, h, :, queries] = scale * max_1n + jnp.log(sum_1n)


def _backward_kernel(qkv, out, z, grad, grad_qkv):
    _, _, heads, head_dim, tokens = qkv.shape
    block, scale = _queries(tokens), head_dim**-0.5
    for h in range(heads):
        k_KL, v_KL = qkv[0, 1, h], qkv[0, 2, h]
        dk_KL = dv_KL = 0.0
        for begin in range(0, tokens, block):
            queries = pl.ds(begin, block)
            q_Kn, do_Kn = qkv[0, 0, h, :, queries], grad[0, h, :, queries]
            products_Kn = do_Kn.astype(jnp.float32) * out[0, h, :, queries].astype(jnp.float32)
            inner_1n = products_Kn.sum(axis=0, keepdims=True)
            p_Ln = jnp.exp(scale * _dot(k_KL, q_Kn, 0, 0) - z[0, h, :, queries])
            ds_Ln = (scale * p_Ln * (_dot(v_KL, do_Kn, 0, 0) - inner_1n)).astype(q_Kn.dtype)
            dv_KL += _dot(do_Kn, p_Ln.astype(do_Kn.dtype), 1, 1)
            dk_KL += _dot(q_Kn, ds_Ln, 1, 1)
            grad_qkv[0, 0, h, :, queries] = _dot(k_KL, ds_Ln, 1, 0).astype(grad_qkv.dtype)  # (K, n)
        grad_qkv[0, 1, h] = dk_KL.astype(grad_qkv.dtype)
        grad_qkv[0, 2, h] = dv_KL.astype(grad_qkv.dtype)


def _run(kernel, name, operands, results, matmuls, interpret):
    """Runs `kernel` for every row and group of heads. matmuls: how many of N x N x K it has, for the compiler's cost model."""
    batch, _, heads, head_dim, tokens = operands[0].shape
    group = _heads(heads, tokens)

    def spec(a):
        def index(row, head):
            return (row, 0, head, 0, 0) if len(a.shape) == 5 else (row, head, 0, 0)

        return pl.BlockSpec((1, *a.shape[1:-3], group, *a.shape[-2:]), index)

    varies = jax.typeof(operands[0]).manual_axis_type  # inside shard_map: the mesh axes over which the operands differ
    results = [jax.ShapeDtypeStruct(r.shape, r.dtype, manual_axis_type=varies) for r in results]
    pairs = batch * heads * tokens**2
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
    out, z = _run(_forward_kernel, "attention", [qkv], [out, z], 2, interpret)
    return out, (qkv, out, z)


def _attend_backward(interpret, residuals, grad):
    operands = [*residuals, grad]
    return tuple(_run(_backward_kernel, "attention_gradient", operands, [residuals[0]], 5, interpret))


attend.defvjp(_attend_forward, _attend_backward)


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
