"""The forward (noising) process, and what a network may predict of it.

    x_t = a_t x_0 + s_t eps                                                                                       (1)
      linear, cosine: a_t = sqrt(alpha_bar_t), s_t = sqrt(1 - alpha_bar_t), t = 0 .. T - 1   Ho et al. 2020, eq. 4
      flow:           a_t = 1 - t, s_t = t, t in (0, 1)                                      Lipman et al. 2023; Liu et al. 2023
    prediction: noise eps | x0 | v = a_t eps - s_t x_0 (Salimans & Ho 2022) | flow u = eps - x_0          (2)
    E[x_{t-1} | x_t, x_0] = w_0 x_0 + w_t x_t                                                Ho et al. 2020, eq. 7 (3)
    log var = v log beta_t + (1 - v) log beta~_t, v = (logit + 1) / 2                        Nichol & Dhariwal 2021, eq. 15 (4)

Every prediction is linear in x_0 and eps, so that together with x_t it determines both (`to_x0_noise`).
Arithmetic is in float32, from float64 tables. Axis letters: B batch, T timesteps; x_0, eps, x_t are (B, [F,] h, w, c).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config
from lumos_jax.diffusion import schedule

NETWORK_TIME = 1000.0  # the range of the network's time input
LOG_2 = math.log(2.0)  # nats to bits


class Process(config.Diffusion):
    """A forward process with its parameterization, as config.diffusion describes it; hashable."""

    @property
    def is_flow(self) -> bool:
        return self.schedule == "flow"

    def out_channels(self, channels: int) -> int:
        """Channels of the network's output for latents of `channels`: twice as many with a learned variance."""
        return 2 * channels if self.learned_variance else channels


def make_process(diffusion: config.Diffusion) -> Process:
    """The process that config.diffusion describes."""
    return Process(**dataclasses.asdict(diffusion))


def at_timestep(table_T: np.ndarray, t_B: jax.Array, like: jax.Array) -> jax.Array:
    """Entries of a table at integer timesteps, as float32 (B, 1, 1, ...) that broadcasts to `like` (B, ...)."""
    return expand(jnp.asarray(table_T, jnp.float32)[t_B], like)


def expand(value_B: jax.Array, like: jax.Array) -> jax.Array:
    """(B,) -> (B, 1, ...) with as many dims as `like`."""
    return value_B.reshape(value_B.shape + (1,) * (like.ndim - value_B.ndim))


def coefficients(process: Process, t_B: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a_t, s_t) of (1), broadcastable to `like`."""
    if process.is_flow:
        time = expand(t_B.astype(jnp.float32), like)
        return 1.0 - time, time
    bar_T = schedule.alphas_cumprod(process.schedule, process.steps)
    return at_timestep(np.sqrt(bar_T), t_B, like), at_timestep(np.sqrt(1.0 - bar_T), t_B, like)


def corrupt(process: Process, x0: jax.Array, noise: jax.Array, t_B: jax.Array) -> jax.Array:
    """x_t by (1)."""
    signal, sigma = coefficients(process, t_B, x0)
    return signal * x0 + sigma * noise


def target(process: Process, x0: jax.Array, noise: jax.Array, t_B: jax.Array) -> jax.Array:
    """What the network is trained to predict, by (2)."""
    signal, sigma = coefficients(process, t_B, x0)
    return from_x0_noise(process.prediction, signal, sigma, x0, noise)


def from_x0_noise(prediction: str, signal, sigma, x0, noise):
    """(2): the prediction for x0 and noise at coefficients (signal, sigma)."""
    if prediction == "noise":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "v":
        return signal * noise - sigma * x0
    return noise - x0


def to_x0_noise(prediction: str, signal, sigma, x_t, output):
    """Solves (1) and (2) for (x0, noise), given x_t and the network's prediction. Where sigma or signal is 0, only v and flow
    give a finite value."""
    if prediction == "noise":
        return (x_t - sigma * output) / signal, output
    if prediction == "x0":
        return output, (x_t - signal * output) / sigma
    if prediction == "v":
        # signal^2 + sigma^2 is 1 up to rounding for these schedules.
        return signal * x_t - sigma * output, sigma * x_t + signal * output
    return x_t - sigma * output, x_t + signal * output


def signal_to_noise(process: Process) -> np.ndarray:
    """(T,) float64 SNR = alpha_bar / (1 - alpha_bar) of the discrete schedules."""
    bar_T = schedule.alphas_cumprod(process.schedule, process.steps)
    return bar_T / (1.0 - bar_T)


def split_output(process: Process, output: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Network output (B, ..., c_out) -> (prediction, variance logits or None), halves of the channels."""
    if not process.learned_variance:
        return output, None
    prediction, logits = jnp.split(output, 2, axis=-1)
    return prediction, logits


def posterior_mean(process: Process, x0: jax.Array, x_t: jax.Array, t_B: jax.Array) -> jax.Array:
    """(3): the mean of q(x_{t-1} | x_t, x_0)."""
    tables = schedule.posterior(process.schedule, process.steps)
    return at_timestep(tables["x0_weight"], t_B, x0) * x0 + at_timestep(tables["xt_weight"], t_B, x_t) * x_t


def model_log_variance(process: Process, logits: jax.Array, t_B: jax.Array) -> jax.Array:
    """(4): the network's log variance, between the posterior's (logit -1) and beta's (logit 1)."""
    low = at_timestep(schedule.posterior(process.schedule, process.steps)["log_variance"], t_B, logits)
    high = at_timestep(np.log(schedule.betas(process.schedule, process.steps)), t_B, logits)
    share = (logits + 1) / 2
    return share * high + (1 - share) * low


def sample_timesteps(process: Process, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random timesteps: int32 in [0, T), or float32 in (0, 1) for flow. Uniform, or logit-normal (Esser et al. 2024):
    u = sigmoid(mean + n), dense in the middle; discrete processes take the step that contains u."""
    if process.timesteps == "logit_normal":
        u = jax.nn.sigmoid(process.logit_mean + jax.random.normal(key, shape))
    elif process.is_flow:
        u = jax.random.uniform(key, shape)
    else:
        return jax.random.randint(key, shape, 0, process.steps, jnp.int32)
    if process.is_flow:
        return jnp.clip(u, 1e-5, 1 - 1e-5)  # at the ends x_t is all noise or all image
    return jnp.minimum((u * process.steps).astype(jnp.int32), process.steps - 1)


def network_time(process: Process, t: jax.Array) -> jax.Array:
    """t as the network takes it: float32 in [0, 1000)."""
    scale = NETWORK_TIME if process.is_flow else NETWORK_TIME / process.steps
    return t.astype(jnp.float32) * jnp.float32(scale)


def timestep_quartile(process: Process, t: jax.Array) -> jax.Array:
    """The quarter of the schedule that t is in: int32 0 (least noise) .. 3 (most)."""
    span = 1.0 if process.is_flow else process.steps
    return jnp.clip((t.astype(jnp.float32) * (4.0 / span)).astype(jnp.int32), 0, 3)
