"""Classifier-free guidance on the prediction half of the network's output.

    guided = null + scale (conditioned - null)                                              Ho & Salimans 2022, eq. 6       (1)
    rescale: guided (phi std(conditioned) / std(guided) + 1 - phi)                          Lin et al. 2023, eqs. 15 and 16 (2)
    interval: (1) only where the noise level, as a share of the schedule, is within it      Kynkaanniemi et al. 2024

Both passes run as one batch of 2 B rows; at scale 1 there is one pass. The variance half is the conditioned pass's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.diffusion.process import NETWORK_TIME, Process, split_output


def guided(
    predict: Callable,
    condition: Any,
    null: Any,
    *,
    scale: float | np.ndarray | jax.Array,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    process: Process,
) -> Callable:
    """The guided denoiser: (x, network time) -> (B, h, w, c_out).

    Args:
      predict: (x (B, h, w, c), network time (B,), condition) -> (B, h, w, c_out).
      condition, null: trees of the same structure with leading dim B.
      scale: 1 is no guidance, in one pass; or an array that broadcasts to the prediction, as one scale per frame. A jax
        array always guides.
      interval: (low, high) within [0, 1]; 0 is clean, 1 is noise.
      rescale: phi in [0, 1]; 0 for none.
      process: says which channels are a learned variance.
    """
    if not isinstance(scale, jax.Array) and np.all(np.asarray(scale) == 1.0):
        return lambda x, time: predict(x, time, condition)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, null)

    def denoise(x, time):
        out = predict(jnp.concatenate([x, x]), jnp.concatenate([time, time]), both)
        conditioned, unconditioned = jnp.split(out, 2)
        yes, logits = split_output(process, conditioned)
        no, _ = split_output(process, unconditioned)
        result = no + scale * (yes - no)  # (1)
        if rescale:
            dims = tuple(range(1, x.ndim))
            ratio = yes.std(dims, keepdims=True) / jnp.maximum(result.std(dims, keepdims=True), 1e-8)
            # (2)
            result = result * (rescale * ratio + 1.0 - rescale)
        if interval != (0.0, 1.0):
            share = (time / NETWORK_TIME).reshape(-1, *[1] * (x.ndim - 1))
            result = jnp.where((share >= interval[0]) & (share <= interval[1]), result, yes)
        return result if logits is None else jnp.concatenate([result, logits], axis=-1)

    return denoise
