"""Noise schedules: how much signal is left at each timestep.

linear: betas from 1e-4 to 0.02 in equal steps, scaled to the number of steps (Ho et al. 2020; DiT, PixArt, Lumos).
cosine: alpha_bar(t) = cos^2((t / T + s) / (1 + s) pi / 2), s = 0.008, betas clipped at 0.999 (Nichol & Dhariwal 2021, eq. 17).
Flow matching needs no table: see `process`.
"""

from __future__ import annotations

import functools
import math

import numpy as np

BETA_START, BETA_END = 1e-4, 0.02
COSINE_OFFSET, MAX_BETA = 0.008, 0.999


@functools.cache
def betas(schedule: str, steps: int) -> np.ndarray:
    """(T,) float64 variances added at each step.

    Args:
      schedule: "linear" or "cosine".
      steps: T; the linear schedule keeps its total noise when T is not 1000.

    Raises:
      ValueError: another schedule.
    """
    if schedule == "linear":
        scale = 1000 / steps
        return np.linspace(scale * BETA_START, scale * BETA_END, steps, dtype=np.float64)
    if schedule == "cosine":

        def alpha_bar(time):
            return math.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2

        values = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), MAX_BETA) for i in range(steps)]
        return np.array(values, np.float64)
    raise ValueError(f"schedule {schedule!r} has no betas; it is one of linear, cosine")


@functools.cache
def alphas_cumprod(schedule: str, steps: int) -> np.ndarray:
    """(T,) float64 alpha_bar_t: the share of the variance that is signal."""
    return np.cumprod(1.0 - betas(schedule, steps))


@functools.cache
def posterior(schedule: str, steps: int) -> dict[str, np.ndarray]:
    """Tables (T,) float64 of q(x_{t-1} | x_t, x_0): `variance`, `log_variance` (clipped at t = 0), `x0_weight`, `xt_weight`.

    Ho et al. 2020, eqs. 6 and 7.
    """
    b, bar = betas(schedule, steps), alphas_cumprod(schedule, steps)
    before = np.append(1.0, bar[:-1])
    variance = b * (1.0 - before) / (1.0 - bar)
    # The variance is 0 at t = 0, where the posterior is a point: its neighbour stands in under the logarithm.
    clipped = np.append(variance[1], variance[1:]) if steps > 1 else np.maximum(variance, 1e-20)
    return {
        "variance": variance,
        "log_variance": np.log(clipped),
        "x0_weight": b * np.sqrt(before) / (1.0 - bar),
        "xt_weight": (1.0 - before) * np.sqrt(1.0 - b) / (1.0 - bar),
    }
