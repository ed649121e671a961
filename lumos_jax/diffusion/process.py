"""The corruption process and what a network may predict of it.

    x_t = a_t x_0 + s_t eps                                   corruption
      linear, cosine: a_t = sqrt(alpha_bar_t), s_t = sqrt(1 - alpha_bar_t), t = 0 .. T - 1 (Ho et al. 2020)
      flow:           a_t = 1 - t, s_t = t, t in (0, 1)       (Lipman et al. 2023; rectified flow, Liu et al. 2023)
    predictions: noise eps | x0 | v = a_t eps - s_t x_0 (Salimans & Ho 2022) | flow u = eps - x_0

A prediction p = c_x x_0 + c_e eps is linear in the two, so that with x_t each can be read from it: `to_x0`, `to_noise`.
Axes: B batch, h w c latents. All arithmetic in float32, from float64 tables.
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


@dataclasses.dataclass(frozen=True)
class Process:
    """A corruption process with its parameterisation; hashable. Fields as in config.Diffusion."""

    schedule: str
    steps: int
    prediction: str
    learned_variance: bool
    loss: str
    min_snr_gamma: float
    timesteps: str
    logit_mean: float
    logit_std: float

    @property
    def is_flow(self) -> bool:
        return self.schedule == "flow"

    def out_channels(self, channels: int) -> int:
        """Channels that the network must give for latents of `channels`: twice as many with a learned variance."""
        return 2 * channels if self.learned_variance else channels


def make_process(diffusion: config.Diffusion) -> Process:
    """The process that config.diffusion describes."""
    return Process(**dataclasses.asdict(diffusion), learned_variance=diffusion.learned_variance)


def gather(table: np.ndarray, t: jax.Array, like: jax.Array) -> jax.Array:
    """table (T,) at t (B,) int, as float32 (B, 1, 1, ...) to go with `like` (B, ...)."""
    return expand(jnp.asarray(table, jnp.float32)[t], like)


def expand(value: jax.Array, like: jax.Array) -> jax.Array:
    """(B,) -> (B, 1, ...) with as many dims as `like`."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def coefficients(process: Process, t: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a_t, s_t) of x_t = a_t x_0 + s_t eps, broadcastable to `like`."""
    if process.is_flow:
        time = expand(t.astype(jnp.float32), like)
        return 1.0 - time, time
    bar = schedule.alphas_cumprod(process.schedule, process.steps)
    return gather(np.sqrt(bar), t, like), gather(np.sqrt(1.0 - bar), t, like)


def corrupt(process: Process, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t (B, ...) from x0 and noise (B, ...) at t (B,)."""
    signal, sigma = coefficients(process, t, x0)
    return signal * x0 + sigma * noise


def target(process: Process, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """What the network is to predict, (B, ...)."""
    signal, sigma = coefficients(process, t, x0)
    return from_x0_noise(process.prediction, signal, sigma, x0, noise)


def from_x0_noise(prediction: str, signal, sigma, x0, noise):
    """The prediction that belongs to x0 and noise at coefficients (signal, sigma)."""
    if prediction == "noise":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "v":
        return signal * noise - sigma * x0
    return noise - x0


def to_x0_noise(prediction: str, signal, sigma, x_t, output):
    """(x0, noise) that a prediction implies at coefficients (signal, sigma).

    Solves x_t = signal x0 + sigma noise together with the prediction; where sigma or signal is 0 the side that cannot be
    seen in x_t comes out finite only for v and flow.
    """
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
    bar = schedule.alphas_cumprod(process.schedule, process.steps)
    return bar / (1.0 - bar)


def split_output(process: Process, output: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Network output (B, h, w, c_out) -> (prediction, variance logits or None)."""
    if not process.learned_variance:
        return output, None
    prediction, variance = jnp.split(output, 2, axis=-1)
    return prediction, variance


def posterior_mean(process: Process, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Mean of q(x_{t-1} | x_t, x_0)."""
    tables = schedule.posterior(process.schedule, process.steps)
    return gather(tables["x0_weight"], t, x0) * x0 + gather(tables["xt_weight"], t, x_t) * x_t


def model_log_variance(process: Process, logits: jax.Array, t: jax.Array) -> jax.Array:
    """Log variance that the network's logits pick between the posterior's (-1) and beta's (+1) (Nichol & Dhariwal, eq. 15)."""
    low = gather(schedule.posterior(process.schedule, process.steps)["log_variance"], t, logits)
    high = gather(np.log(schedule.betas(process.schedule, process.steps)), t, logits)
    share = (logits + 1) / 2
    return share * high + (1 - share) * low


def sample_timesteps(process: Process, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random timesteps: int32 in [0, T), or float32 in (0, 1) for flow.

    uniform, or logit-normal (Esser et al. 2024): u = sigmoid(mean + std n), which prefers the middle; discrete processes take
    the step that holds u.
    """
    if process.timesteps == "logit_normal":
        u = jax.nn.sigmoid(process.logit_mean + process.logit_std * jax.random.normal(key, shape))
    elif process.is_flow:
        u = jax.random.uniform(key, shape)
    else:
        return jax.random.randint(key, shape, 0, process.steps, jnp.int32)
    if process.is_flow:
        # Away from the ends, where the noise or the image would be all there is.
        return jnp.clip(u, 1e-5, 1 - 1e-5)
    return jnp.minimum((u * process.steps).astype(jnp.int32), process.steps - 1)


def network_time(process: Process, t: jax.Array) -> jax.Array:
    """t as the network sees it: float32 in [0, 1000)."""
    scale = NETWORK_TIME if process.is_flow else NETWORK_TIME / process.steps
    return t.astype(jnp.float32) * jnp.float32(scale)


def timestep_quartile(process: Process, t: jax.Array) -> jax.Array:
    """Which quarter of the timesteps: int32 0 (least noise) .. 3 (most)."""
    span = 1.0 if process.is_flow else process.steps
    return jnp.clip((t.astype(jnp.float32) * (4.0 / span)).astype(jnp.int32), 0, 3)


def log_snr_table(process: Process) -> tuple[np.ndarray, np.ndarray]:
    """Continuous time for samplers of the discrete schedules: nodes (T,) at (i + 1) / T and log a_t there, float64."""
    bar = schedule.alphas_cumprod(process.schedule, process.steps)
    times = np.linspace(0.0, 1.0, process.steps + 1)[1:]
    return times, 0.5 * np.log(bar)
