"""Samplers: from noise to x0, pure functions of (denoise, noise, key) around `jax.lax.scan`.

ddpm: ancestral sampling (Ho et al. 2020, algorithm 2), on a respaced schedule when steps < T, with the learned or the
      posterior's variance. ddim: Song et al. 2021, eq. 12. dpm++: DPM-Solver++ 2M (Lu et al. 2022), see `dpm_solver`.
euler, heun: the probability-flow ODE of flow matching, first and second order.

Every coefficient is known before the first call of the network: they are computed in float64 and scanned over.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.diffusion import schedule
from lumos_jax.diffusion.dpm_solver import dpm_solver_pp_2m
from lumos_jax.diffusion.process import NETWORK_TIME, Process, split_output, to_x0_noise

SAMPLERS = ("ddpm", "ddim", "dpm++", "euler", "heun")


def sample(
    process: Process,
    denoise: Callable,
    noise: jax.Array,
    key: jax.Array,
    *,
    sampler: str,
    steps: int,
    lower_last: str = "auto",
    eta: float = 0.0,
) -> jax.Array:
    """Draws x0.

    Args:
      process: what the network was trained on.
      denoise: (x (B, h, w, c), network time (B,)) -> (B, h, w, c_out), guided or not.
      noise: (B, h, w, c), standard normal: the starting point.
      key: of the noise that ddpm, and ddim with eta > 0, add along the way; folded by step.
      sampler: one of SAMPLERS.
      steps: calls of the network (heun: 2 steps - 1).
      lower_last: dpm++ only: "auto" lowers the last step to first order when steps < 10, "always" does whatever their number.
      eta: ddim only: 0 is deterministic, 1 adds as much noise as ddpm.

    Returns:
      x0 (B, h, w, c) float32.

    Raises:
      ValueError: an unknown sampler, one that does not go with the process, or more steps than the process has.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
    if process.is_flow != (sampler in ("euler", "heun")):
        raise ValueError(f"sampler {sampler!r} does not solve schedule {process.schedule!r}")
    if steps < 1 or (not process.is_flow and steps > process.steps):
        raise ValueError(f"{steps} sampling steps: must be from 1 to {process.steps}")
    x = noise.astype(jnp.float32)
    if sampler == "dpm++":
        return dpm_solver_pp_2m(process, denoise, x, steps=steps, lower_last=lower_last)
    if sampler == "ddim":
        return _ddim(process, denoise, x, key, steps, eta)
    if sampler == "ddpm":
        return _ddpm(process, denoise, x, key, steps)
    return _flow(denoise, x, steps, second_order=sampler == "heun")


def spaced_timesteps(total: int, steps: int) -> np.ndarray:
    """`steps` timesteps out of `total`, evenly spread, ascending, from 0 to total - 1 (one step: the last)."""
    if steps == 1:
        return np.array([total - 1])
    return np.round(np.linspace(0, total - 1, steps)).astype(np.int64)


def _times(value: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.full(x.shape[:1], value, jnp.float32)


def _network_times(process: Process, used: np.ndarray) -> np.ndarray:
    return used * (NETWORK_TIME / process.steps)


def _reversed_scan(body: Callable, x: jax.Array, tables: dict[str, np.ndarray]) -> jax.Array:
    """Scans from the noisiest entry of the tables (the last) to the cleanest."""
    count = len(next(iter(tables.values())))
    xs = {name: jnp.asarray(table[::-1].copy(), jnp.float32) for name, table in tables.items()}
    xs["index"] = jnp.arange(count)
    return jax.lax.scan(lambda x, row: (body(x, row), None), x, xs)[0]


def _ddim(process: Process, denoise: Callable, x: jax.Array, key: jax.Array, steps: int, eta: float) -> jax.Array:
    used = spaced_timesteps(process.steps, steps)
    bar = schedule.alphas_cumprod(process.schedule, process.steps)[used]
    before = np.append(1.0, bar[:-1])
    spread = eta * np.sqrt((1 - before) / (1 - bar) * (1 - bar / before))
    tables = {
        "time": _network_times(process, used),
        "signal": np.sqrt(bar),
        "sigma": np.sqrt(1 - bar),
        "next_signal": np.sqrt(before),
        "next_sigma": np.sqrt(np.maximum(1 - before - spread**2, 0.0)),
        "spread": spread,
    }

    def body(x, row):
        prediction, _ = split_output(process, denoise(x, _times(row["time"], x)).astype(jnp.float32))
        x0, noise = to_x0_noise(process.prediction, row["signal"], row["sigma"], x, prediction)
        x = row["next_signal"] * x0 + row["next_sigma"] * noise
        if eta:
            x = x + row["spread"] * jax.random.normal(jax.random.fold_in(key, row["index"]), x.shape)
        return x

    return _reversed_scan(body, x, tables)


def _ddpm(process: Process, denoise: Callable, x: jax.Array, key: jax.Array, steps: int) -> jax.Array:
    used = spaced_timesteps(process.steps, steps)
    bar = schedule.alphas_cumprod(process.schedule, process.steps)[used]
    before = np.append(1.0, bar[:-1])
    betas = 1 - bar / before
    variance = betas * (1 - before) / (1 - bar)
    log_variance = np.log(np.append(variance[1], variance[1:])) if steps > 1 else np.log(betas)
    tables = {
        "time": _network_times(process, used),
        "signal": np.sqrt(bar),
        "sigma": np.sqrt(1 - bar),
        "x0_weight": betas * np.sqrt(before) / (1 - bar),
        "xt_weight": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
        "low": log_variance,
        "high": np.log(betas),
        "noisy": (np.arange(steps) > 0).astype(np.float64),  # the last step gives the mean
    }

    def body(x, row):
        prediction, logits = split_output(process, denoise(x, _times(row["time"], x)).astype(jnp.float32))
        x0, _ = to_x0_noise(process.prediction, row["signal"], row["sigma"], x, prediction)
        mean = row["x0_weight"] * x0 + row["xt_weight"] * x
        share = 0.0 if logits is None else (logits + 1) / 2
        log_var = share * row["high"] + (1 - share) * row["low"]
        fresh = jax.random.normal(jax.random.fold_in(key, row["index"]), x.shape)
        return mean + row["noisy"] * jnp.exp(0.5 * log_var) * fresh

    return _reversed_scan(body, x, tables)


def _flow(denoise: Callable, x: jax.Array, steps: int, second_order: bool) -> jax.Array:
    """dx/dt = u(x, t) from t = 1 to 0; the last step is always first order, so that t = 0 is never asked for."""
    edges = np.linspace(0.0, 1.0, steps + 1)
    tables = {
        "time": edges[1:] * NETWORK_TIME,
        "next_time": edges[:-1] * NETWORK_TIME,
        "step": np.diff(edges),
    }

    def euler(x, row):
        return x - row["step"] * denoise(x, _times(row["time"], x)).astype(jnp.float32)

    def heun(x, row):
        slope = denoise(x, _times(row["time"], x)).astype(jnp.float32)
        guess = x - row["step"] * slope
        ahead = denoise(guess, _times(row["next_time"], x)).astype(jnp.float32)
        return x - row["step"] * 0.5 * (slope + ahead)

    if not second_order:
        return _reversed_scan(euler, x, tables)
    if steps > 1:
        x = _reversed_scan(heun, x, {name: table[1:] for name, table in tables.items()})
    return _reversed_scan(euler, x, {name: table[:1] for name, table in tables.items()})
