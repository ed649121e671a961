"""Samplers: from noise to x0, pure functions of (denoise, noise, key) around `jax.lax.scan`.

ddpm: ancestral sampling on a respaced schedule, with the learned variance or the posterior's      Ho et al. 2020, algorithm 2
        x_{t-1} = w_0 x_0 + w_t x_t + sigma_t z                                                                            (1)
ddim: deterministic for eta = 0                                                                    Song et al. 2021, eq. 12
        x_{t-1} = a_{t-1} x_0 + sqrt(s_{t-1}^2 - sigma^2) eps + sigma z,
        sigma = eta s_{t-1} / s_t sqrt(1 - alpha_bar_t / alpha_bar_{t-1})                                                  (2)
euler, heun: the probability-flow ODE dx/dt = u(x, t) of flow matching from t = 1 to 0, first and second order             (3)
dpm++: DPM-Solver++ 2M on the discrete schedule made continuous                                    Lu et al. 2022, algorithm 2
        lambda = log(a / s),  h_i = lambda_i - lambda_{i-1},  r_i = h_{i-1} / h_i                                          (4)
        D_i = m_{i-1} + (m_{i-1} - m_{i-2}) / (2 r_i),  x_i = s_i / s_{i-1} x_{i-1} - a_i (exp(-h_i) - 1) D_i              (5)
        with m the predicted x_0. Times are uniform from 1 to 1 / T, log a is interpolated linearly between the table's nodes
        at (i + 1) / T, the network's time is (t - 1 / T) 1000. The first step, and with few the last, is first order (D = m).

Coefficients do not depend on the network: they are computed in float64 before the scan. Axis letters: B batch, S sampling
steps; x_0, x_t, eps and z ~ N(0, 1) are (B, [F,] h, w, c).

`sample` runs all steps in one program. `start`, `stages` and `step` are the same, for callers that stop between steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.diffusion import schedule
from lumos_jax.diffusion.process import NETWORK_TIME, Process, split_output, to_x0_noise

FLOW_SAMPLERS = ("euler", "heun")
SAMPLERS = ("ddpm", "ddim", "dpm++", *FLOW_SAMPLERS)
Carry = tuple[jax.Array, jax.Array]  # x_t, and x_0 as the last step predicted it
Tables = Mapping[str, Any]  # by name, (S,) numbers, or one of a step
FEW_STEPS = 10  # with fewer, dpm++ makes the last step first order: second order is unstable there


def sample(
    process: Process,
    denoise: Callable,
    noise: jax.Array,
    key: jax.Array,
    *,
    sampler: str,
    steps: int,
    lower_last: bool = False,
    eta: float = 0.0,
) -> jax.Array:
    """Samples x0 (B, h, w, c) float32.

    Args:
      process: what the network was trained on.
      denoise: (x (B, h, w, c), network time (B,)) -> (B, h, w, c_out), guided or not.
      noise: (B, h, w, c), standard normal: the starting point.
      key: of the noise that ddpm, and ddim with eta > 0, add in each step; folded by step. One for all rows, or (B,): a row's
        noise then depends on its own key alone.
      sampler: one of SAMPLERS.
      steps: calls of the network (heun: 2 steps - 1).
      lower_last: dpm++ only: make the last step first order for any number of steps, not only for fewer than 10.
      eta: ddim only: 0 is deterministic, 1 adds as much noise as ddpm.

    Raises:
      ValueError: an unknown sampler, one that does not solve the process, or more steps than the process has.
    """
    carry = start(noise)
    for name, tables_S in stages(process, sampler=sampler, steps=steps, lower_last=lower_last, eta=eta):
        move = functools.partial(step, process, denoise, name=name, key=key)
        carry, _ = jax.lax.scan(lambda carry, row, move=move: (move(carry, row), None), carry, tables_S)
    return carry[0]


def start(noise: jax.Array) -> Carry:
    """What the first step takes."""
    x = noise.astype(jnp.float32)
    return x, jnp.zeros_like(x)


def stages(
    process: Process, *, sampler: str, steps: int, lower_last: bool = False, eta: float = 0.0
) -> list[tuple[str, Tables]]:
    """The steps of a sampler in their order: the name of a step function, and tables (S,) float32 with a row for each of its
    steps. Arguments and errors as of `sample`."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
    if process.is_flow != (sampler in FLOW_SAMPLERS):
        raise ValueError(f"sampler {sampler!r} does not solve schedule {process.schedule!r}")
    if steps < 1 or (not process.is_flow and steps > process.steps):
        raise ValueError(f"{steps} sampling steps: must be from 1 to {process.steps}")
    if sampler == "dpm++":
        return [(sampler, _rows(_dpm_solver_pp_2m_tables(process, steps, lower_last)))]
    if sampler == "ddim":
        return [(f"ddim{'+noise' if eta else ''}", _rows(_ddim_tables(process, steps, eta)))]
    if sampler == "ddpm":
        return [(sampler, _rows(_ddpm_tables(process, steps)))]
    rows = _rows(_flow_tables(steps))
    if sampler == "euler" or steps == 1:
        return [("euler", rows)]
    # The last step is always first order, so that the network is never called at t = 0.
    return [(name, {key: table[part] for key, table in rows.items()})
            for name, part in (("heun", slice(-1)), ("euler", slice(-1, None)))]  # fmt: skip


def step(process: Process, denoise: Callable, carry: Carry, row: Tables, *, name: str, key: jax.Array) -> Carry:
    """One step: (x_t, x0 as the network predicted it a step before) -> the same of the next time.

    denoise, key: as of `sample`. name, row: as of `stages`, one row of the tables.
    """
    return _STEPS[name](process, denoise, carry, row, key)


def spaced_timesteps(total: int, steps: int) -> np.ndarray:
    """(S,) `steps` of `total` timesteps, evenly spaced, ascending, from 0 to total - 1 (one step: the last)."""
    return np.round(np.linspace(0, total - 1, steps)).astype(np.int64) if steps > 1 else np.array([total - 1])


def normal_rows(key: jax.Array, shape: tuple[int, ...], step: int | jax.Array | None = None) -> jax.Array:
    """Standard normal rows (B, ...): of one key, or each of its own key (B,); the key of a sampling step is folded from it."""
    if key.ndim:
        return jax.vmap(lambda own: normal_rows(own, shape[1:], step))(key)
    return jax.random.normal(key if step is None else jax.random.fold_in(key, step), shape)


def _call(denoise: Callable, x: jax.Array, time: jax.Array) -> jax.Array:
    """The network's output, float32, at one network time for every row of x."""
    return denoise(x, jnp.full(x.shape[:1], time, jnp.float32)).astype(jnp.float32)


def _predict(process: Process, denoise: Callable, x: jax.Array, row: Tables) -> tuple:
    """(x_0, eps, variance logits or None), as the network predicts them from x_t at `row`'s time, signal and sigma."""
    prediction, logits = split_output(process, _call(denoise, x, row["time"]))
    return *to_x0_noise(process.prediction, row["signal"], row["sigma"], x, prediction), logits


def _rows(tables_S: dict[str, np.ndarray]) -> Tables:
    """float32, and the `index` of each step."""
    rows = {name: table.astype(np.float32) for name, table in tables_S.items()}
    return rows | {"index": np.arange(len(rows["time"]), dtype=np.int32)}


def _reversed(tables_S: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """From the noisiest row, the last, to the first."""
    return {name: table[::-1] for name, table in tables_S.items()}


def _respaced(process: Process, steps: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """alpha_bar (S,) at the sampling steps, alpha_bar one step earlier (1 at the end), and the tables that `_predict` takes."""
    used_S = spaced_timesteps(process.steps, steps)
    bar_S = schedule.alphas_cumprod(process.schedule, process.steps)[used_S]
    time_S = used_S * (NETWORK_TIME / process.steps)
    return bar_S, np.append(1.0, bar_S[:-1]), {"time": time_S, "signal": np.sqrt(bar_S), "sigma": np.sqrt(1 - bar_S)}


def _ddim_tables(process: Process, steps: int, eta: float) -> dict[str, np.ndarray]:
    bar_S, next_bar_S, tables_S = _respaced(process, steps)
    std_S = eta * np.sqrt((1 - next_bar_S) / (1 - bar_S) * (1 - bar_S / next_bar_S))
    tables_S |= {
        "next_signal": np.sqrt(next_bar_S),
        "next_sigma": np.sqrt(np.maximum(1 - next_bar_S - std_S**2, 0.0)),
        "std": std_S,
    }
    return _reversed(tables_S)


def _ddim(process: Process, denoise: Callable, carry: Carry, row: Tables, key: jax.Array) -> Carry:
    """(2) with eta = 0."""
    x0, noise, _ = _predict(process, denoise, carry[0], row)
    return row["next_signal"] * x0 + row["next_sigma"] * noise, x0


def _ddim_with_noise(process: Process, denoise: Callable, carry: Carry, row: Tables, key: jax.Array) -> Carry:
    """(2)."""
    x, x0 = _ddim(process, denoise, carry, row, key)
    return x + row["std"] * normal_rows(key, x.shape, row["index"]), x0


def _ddpm_tables(process: Process, steps: int) -> dict[str, np.ndarray]:
    bar_S, next_bar_S, tables_S = _respaced(process, steps)
    beta_S = 1 - bar_S / next_bar_S
    variance_S = beta_S * (1 - next_bar_S) / (1 - bar_S)
    # Clipped where the variance is 0, as in schedule.posterior.
    log_variance_S = np.log(np.append(variance_S[1], variance_S[1:])) if steps > 1 else np.log(beta_S)
    tables_S |= {
        "x0_weight": beta_S * np.sqrt(next_bar_S) / (1 - bar_S),
        "xt_weight": (1 - next_bar_S) * np.sqrt(1 - beta_S) / (1 - bar_S),
        "low": log_variance_S,
        "high": np.log(beta_S),
        "noisy": (np.arange(steps) > 0).astype(np.float64),  # the last step returns the mean
    }
    return _reversed(tables_S)


def _ddpm(process: Process, denoise: Callable, carry: Carry, row: Tables, key: jax.Array) -> Carry:
    """(1)."""
    x, _ = carry
    x0, _, logits = _predict(process, denoise, x, row)
    mean = row["x0_weight"] * x0 + row["xt_weight"] * x
    share = 0.0 if logits is None else (logits + 1) / 2
    log_variance = share * row["high"] + (1 - share) * row["low"]
    z = normal_rows(key, x.shape, row["index"])
    return mean + row["noisy"] * jnp.exp(0.5 * log_variance) * z, x0


def _dpm_solver_pp_2m_tables(process: Process, steps: int, lower_last: bool) -> dict[str, np.ndarray]:
    """(4)."""
    nodes_T = np.linspace(0.0, 1.0, process.steps + 1)[1:]
    times = np.linspace(1.0, 1.0 / process.steps, steps + 1)
    log_a = np.interp(times, nodes_T, 0.5 * np.log(schedule.alphas_cumprod(process.schedule, process.steps)))
    a, s = np.exp(log_a), np.sqrt(1.0 - np.exp(2.0 * log_a))
    h_S = np.diff(log_a - np.log(s))  # (4)
    # Weight of m_{i-1} - m_{i-2} in (5): 1 / (2 r), or 0 for a first-order step.
    correction_S = np.append(0.0, h_S[1:] / (2.0 * h_S[:-1]))
    if lower_last or steps < FEW_STEPS:
        correction_S[-1] = 0.0
    return {
        "time": (times[:-1] - 1.0 / process.steps) * NETWORK_TIME,
        "signal": a[:-1],
        "sigma": s[:-1],
        "x_weight": s[1:] / s[:-1],
        "x0_weight": -a[1:] * np.expm1(-h_S),
        "correction": correction_S,
    }


def _dpm_solver_pp_2m(process: Process, denoise: Callable, carry: Carry, row: Tables, key: jax.Array) -> Carry:
    """(5)."""
    x, previous = carry
    x0, _, _ = _predict(process, denoise, x, row)
    corrected = x0 + row["correction"] * (x0 - previous)
    return row["x_weight"] * x + row["x0_weight"] * corrected, x0


def _flow_tables(steps: int) -> dict[str, np.ndarray]:
    edges = np.linspace(0.0, 1.0, steps + 1)
    return _reversed(
        {
            "time": edges[1:] * NETWORK_TIME,
            "next_time": edges[:-1] * NETWORK_TIME,
            "step": np.diff(edges),
            "t": edges[1:],
        }
    )


def _euler(process: Process, denoise: Callable, carry: Carry, row: Tables, key: jax.Array) -> Carry:
    """(3), first order."""
    x, _ = carry
    slope = _call(denoise, x, row["time"])
    return x - row["step"] * slope, x - row["t"] * slope


def _heun(process: Process, denoise: Callable, carry: Carry, row: Tables, key: jax.Array) -> Carry:
    """(3), second order."""
    x, _ = carry
    slope = _call(denoise, x, row["time"])
    ahead = _call(denoise, x - row["step"] * slope, row["next_time"])
    return x - row["step"] * 0.5 * (slope + ahead), x - row["t"] * slope


_STEPS = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "ddim+noise": _ddim_with_noise,
    "dpm++": _dpm_solver_pp_2m,
    "euler": _euler,
    "heun": _heun,
}
