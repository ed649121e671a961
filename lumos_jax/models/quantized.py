"""Products whose operands are rounded to 8 bits first, as matrix units multiply them twice as fast: x W of a forward pass.

Every row of x and every column of W has its own scale, the largest magnitude in it over the largest number that the type holds
(symmetric, no zero point). int8 is what TPUs of v5e on and GPUs of Ampere on have; float8 (e4m3) is for chips that multiply it,
as H100. The gradient passes straight through the rounding: it is that of the plain product (`layers.matmul`). By qwix.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

TYPES = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}


def check(kind: str, field: str) -> None:
    """Raises ValueError, which names the field, if `kind` needs the library and it is not installed."""
    if kind in TYPES and importlib.util.find_spec("qwix") is None:
        raise ValueError(
            f"{field}={kind} needs the package qwix, which is not installed: pip install 'lumos_jax[quantized]', or "
            "pip install 'qwix>=0.1.8,<0.2'"
        )


def product(x: jax.Array, kernel: jax.Array, kind: str, out_dtype: Any) -> jax.Array:
    """(..., D) @ (D, E) -> (..., E) in `out_dtype`; kind is one of TYPES."""
    import qwix  # an extra

    rows, columns = tuple(range(x.ndim - 1)), (1,)
    x, kernel = (
        qwix.quantize(a, TYPES[kind], channelwise_axes=dims, scale_dtype=jnp.float32)
        for a, dims in ((x, rows), (kernel, columns))
    )
    dims = ((len(rows),), (0,)), ((), ())
    return qwix.dot_general(x, kernel, dims, preferred_element_type=jnp.float32).astype(out_dtype)
