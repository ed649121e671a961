"""DPM-Solver++ 2M (Lu et al. 2022, algorithm 2) on a discrete variance-preserving schedule made continuous.

    lambda = log(a / s);  h = lambda_i - lambda_{i-1};  r = h_{i-1} / h_i
    D = m_{i-1} + (m_{i-1} - m_{i-2}) / (2 r);   x_i = s_i / s_{i-1} x_{i-1} - a_i (exp(-h) - 1) D

with m the predicted x0. Times run uniformly from 1 to 1 / T, log a is interpolated linearly between the table's nodes at
(i + 1) / T, and the network's time is (t - 1 / T) 1000. The first step, and where asked the last, is first order (D = m).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.diffusion.process import NETWORK_TIME, Process, log_snr_table, split_output, to_x0_noise

# With fewer steps than this the last one is first order even under "auto": the second order is unstable there.
FEW_STEPS = 10


def dpm_solver_pp_2m(
    process: Process, denoise: Callable, x: jax.Array, *, steps: int, lower_last: str = "auto"
) -> jax.Array:
    """x (B, h, w, c) at t = 1 -> x0. See `samplers.sample` for the arguments.

    Raises:
      ValueError: `lower_last` is neither "auto" nor "always".
    """
    if lower_last not in ("auto", "always"):
        raise ValueError(f"lower_last={lower_last!r} is not one of auto, always")
    nodes, log_signal = log_snr_table(process)
    times = np.linspace(1.0, 1.0 / process.steps, steps + 1)
    log_a = np.interp(times, nodes, log_signal)
    a, s = np.exp(log_a), np.sqrt(1.0 - np.exp(2.0 * log_a))
    lam = log_a - np.log(s)
    h = np.diff(lam)
    # Weight of the difference m_{i-1} - m_{i-2}: 1 / (2 r), or 0 for a first-order step.
    correction = np.append(0.0, h[1:] / (2.0 * h[:-1]))
    if lower_last == "always" or steps < FEW_STEPS:
        correction[-1] = 0.0
    rows = {
        "time": (times[:-1] - 1.0 / process.steps) * NETWORK_TIME,
        "signal": a[:-1],
        "sigma": s[:-1],
        "keep": s[1:] / s[:-1],
        "move": -a[1:] * np.expm1(-h),
        "correction": correction,
    }
    rows = {name: jnp.asarray(row, jnp.float32) for name, row in rows.items()}

    def body(carry, row):
        x, previous = carry
        time = jnp.full(x.shape[:1], row["time"], jnp.float32)
        prediction, _ = split_output(process, denoise(x, time).astype(jnp.float32))
        x0, _ = to_x0_noise(process.prediction, row["signal"], row["sigma"], x, prediction)
        better = x0 + row["correction"] * (x0 - previous)
        return (row["keep"] * x + row["move"] * better, x0), None

    (x, _), _ = jax.lax.scan(body, (x, jnp.zeros_like(x)), rows)
    return x
