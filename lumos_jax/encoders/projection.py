"""The heads that encoders are trained with, for those who condition on what comes out of them.

    linear   CLIP's projection: x W
    mlp      MoCo-v3's projector: (Linear, batch norm, ReLU) twice, Linear, batch norm without scale, no biases; the batch norms
             use the statistics that training left in the weights (RCG conditions on its 256 outputs)

Axes: B batch, D width in, C features out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

BATCH_NORM_EPS = 1e-5


def init(kind: str, key: jax.Array, width: int, dims: Sequence[int]) -> dict[str, Any]:
    """Random float32 parameters of a head from D = `width` through layers of `dims` outputs."""
    params: dict[str, Any] = {}
    for number, (inner, outer) in enumerate(zip((width, *dims), dims, strict=False)):
        layer = {"kernel": jax.random.normal(jax.random.fold_in(key, number), (inner, outer)) * inner**-0.5}
        if kind == "mlp":
            layer |= {"mean": jnp.zeros(outer), "variance": jnp.ones(outer)}
            if number < len(dims) - 1:
                layer |= {"scale": jnp.ones(outer), "bias": jnp.zeros(outer)}
        params[f"layer{number}"] = layer
    return params


def apply(kind: str, params: dict[str, Any], x: jax.Array) -> jax.Array:
    """(B, D) -> (B, C), in the dtype of x."""
    for number in range(len(params)):
        layer = {name: value.astype(x.dtype)[None] for name, value in params[f"layer{number}"].items()}
        x = x @ layer["kernel"][0]
        if kind == "mlp":
            x = (x - layer["mean"]) * jax.lax.rsqrt(layer["variance"] + BATCH_NORM_EPS)
            if "scale" in layer:
                x = jax.nn.relu(x * layer["scale"] + layer["bias"])
    return x
