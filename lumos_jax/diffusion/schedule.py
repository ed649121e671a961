"""Noise schedules: float64 tables over the T discrete timesteps. Flow matching needs none, see `process`.

linear: beta_t from 1e-4 to 0.02 in equal steps, times 1000 / T       Ho et al. 2020; DiT, PixArt, Lumos               (1)
cosine: alpha_bar(t) = cos^2((t / T + s) / (1 + s) pi / 2), s = 0.008, betas clipped at 0.999    Nichol & Dhariwal 2021, eq. 17
alpha_bar_t = prod_{i <= t} (1 - beta_i)                                                         Ho et al. 2020, eq. 4 (2)
q(x_{t-1} | x_t, x_0):                                                                           Ho et al. 2020, eq. 7 (3)
  variance beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
  mean     beta_t sqrt(alpha_bar_{t-1}) / (1 - alpha_bar_t) x_0
           + (1 - alpha_bar_{t-1}) sqrt(1 - beta_t) / (1 - alpha_bar_t) x_t
"""

from __future__ import annotations

import functools
import math

import numpy as np

BETA_START, BETA_END = 1e-4, 0.02
COSINE_OFFSET, MAX_BETA = 0.008, 0.999


@functools.cache
def betas(schedule: str, steps: int) -> np.ndarray:
    """(T,) variances added at each of T `steps`. Raises ValueError for a schedule other than "linear" and "cosine"."""
    if schedule == "linear":
        scale = 1000 / steps  # the total noise does not depend on T
        return np.linspace(scale * BETA_START, scale * BETA_END, steps, dtype=np.float64)
    if schedule == "cosine":

        def alpha_bar(time):
            return math.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2

        values = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), MAX_BETA) for i in range(steps)]
        return np.array(values, np.float64)
    raise ValueError(f"schedule {schedule!r} has no betas; it is one of linear, cosine")


@functools.cache
def alphas_cumprod(schedule: str, steps: int) -> np.ndarray:
    """(T,) alpha_bar_t by (2): the share of the variance that is signal."""
    return np.cumprod(1.0 - betas(schedule, steps))


@functools.cache
def posterior(schedule: str, steps: int) -> dict[str, np.ndarray]:
    """(T,) tables of (3): `log_variance` (clipped at t = 0), `x0_weight`, `xt_weight`."""
    beta_T, bar_T = betas(schedule, steps), alphas_cumprod(schedule, steps)
    previous_T = np.append(1.0, bar_T[:-1])  # alpha_bar_{t-1}
    variance_T = beta_T * (1.0 - previous_T) / (1.0 - bar_T)
    # At t = 0 the posterior is a point, of variance 0; its logarithm uses the next variance.
    clipped_T = np.append(variance_T[1], variance_T[1:]) if steps > 1 else np.maximum(variance_T, 1e-20)
    return {
        "log_variance": np.log(clipped_T),
        "x0_weight": beta_T * np.sqrt(previous_T) / (1.0 - bar_T),
        "xt_weight": (1.0 - previous_T) * np.sqrt(1.0 - beta_T) / (1.0 - bar_T),
    }
