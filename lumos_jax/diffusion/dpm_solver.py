"""DPM-Solver++ 2M (Lu et al. 2022, algorithm 2) on a discrete variance-preserving schedule made continuous.

    lambda = log(a / s),  h_i = lambda_i - lambda_{i-1},  r_i = h_{i-1} / h_i                                              (1)
    D_i = m_{i-1} + (m_{i-1} - m_{i-2}) / (2 r_i),  x_i = s_i / s_{i-1} x_{i-1} - a_i (exp(-h_i) - 1) D_i                  (2)

with m the predicted x0. Times are uniform from 1 to 1 / T, log a is interpolated linearly between the table's nodes at
(i + 1) / T, and the network's time is (t - 1 / T) 1000. The first step, and optionally the last, is first order (D = m).
Axis letters: B batch, S sampling steps.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.diffusion.process import NETWORK_TIME, Process, log_snr_table, split_output, to_x0_noise

# With fewer steps than this, "auto" makes the last one first order: second order is unstable there.
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
    nodes_T, log_signal_T = log_snr_table(process)
    times = np.linspace(1.0, 1.0 / process.steps, steps + 1)
    log_a = np.interp(times, nodes_T, log_signal_T)
    a, s = np.exp(log_a), np.sqrt(1.0 - np.exp(2.0 * log_a))
    h_S = np.diff(log_a - np.log(s))  # (1)
    # Weight of m_{i-1} - m_{i-2} in (2): 1 / (2 r), or 0 for a first-order step.
    correction_S = np.append(0.0, h_S[1:] / (2.0 * h_S[:-1]))
    if lower_last == "always" or steps < FEW_STEPS:
        correction_S[-1] = 0.0
    tables_S = {
        "time": (times[:-1] - 1.0 / process.steps) * NETWORK_TIME,
        "signal": a[:-1],
        "sigma": s[:-1],
        "x_weight": s[1:] / s[:-1],
        "x0_weight": -a[1:] * np.expm1(-h_S),
        "correction": correction_S,
    }
    rows = {name: jnp.asarray(table, jnp.float32) for name, table in tables_S.items()}

    def body(carry, row):
        x, previous = carry
        time_B = jnp.full(x.shape[:1], row["time"], jnp.float32)
        prediction, _ = split_output(process, denoise(x, time_B).astype(jnp.float32))
        x0, _ = to_x0_noise(process.prediction, row["signal"], row["sigma"], x, prediction)
        corrected = x0 + row["correction"] * (x0 - previous)
        return (row["x_weight"] * x + row["x0_weight"] * corrected, x0), None

    (x, _), _ = jax.lax.scan(body, (x, jnp.zeros_like(x)), rows)
    return x
