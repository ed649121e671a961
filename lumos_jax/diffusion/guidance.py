"""Classifier-free guidance (Ho & Salimans 2022): out = null + scale (conditioned - null), on the prediction half.

interval: guide only while the noise level, as a share of the time, lies in it (Kynkaanniemi et al. 2024).
rescale: pulls the guided prediction's spread back to the conditioned one's (Lin et al. 2023, eq. 15 and 16).
The two passes run as one batch of twice the rows; with scale 1 there is no second pass. The variance half is the conditioned
pass's.
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
    scale: float | np.ndarray,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    process: Process,
) -> Callable:
    """The guided denoiser.

    Args:
      predict: (x (B, h, w, c), network time (B,), condition) -> (B, h, w, c_out).
      condition, null: trees alike with leading dim B.
      scale: 1 is no guidance, and costs none; or an array that broadcasts to the prediction, as one scale a frame.
      interval: (low, high) within [0, 1]; 0 is clean, 1 is noise.
      rescale: 0 .. 1, 0 for none.
      process: tells a learned variance's channels apart.

    Returns:
      (x, network time) -> (B, h, w, c_out).
    """
    if np.all(np.asarray(scale) == 1.0):
        return lambda x, time: predict(x, time, condition)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, null)

    def denoise(x, time):
        out = predict(jnp.concatenate([x, x]), jnp.concatenate([time, time]), both)
        conditioned, without = jnp.split(out, 2)
        yes, logits = split_output(process, conditioned)
        no, _ = split_output(process, without)
        result = no + scale * (yes - no)
        if rescale:
            dims = tuple(range(1, x.ndim))
            ratio = yes.std(dims, keepdims=True) / jnp.maximum(result.std(dims, keepdims=True), 1e-8)
            result = result * (rescale * ratio + 1.0 - rescale)
        if interval != (0.0, 1.0):
            share = (time / NETWORK_TIME).reshape(-1, *[1] * (x.ndim - 1))
            result = jnp.where((share >= interval[0]) & (share <= interval[1]), result, yes)
        return result if logits is None else jnp.concatenate([result, logits], axis=-1)

    return denoise
