"""Losses per example.

simple: ||prediction - target||^2 averaged over dims: eq. (1) of the paper for noise prediction.
hybrid: that plus the variational bound's term in bits per dim, with the mean detached so that it trains the variance alone
        (Nichol & Dhariwal 2021, section 3.1); no extra weight.
min-SNR (Hang et al. 2023): min(SNR, gamma) on the x0 error, written for each parameterisation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lumos_jax.diffusion.process import (
    LOG_2,
    Process,
    coefficients,
    from_x0_noise,
    gather,
    model_log_variance,
    posterior_mean,
    signal_to_noise,
    split_output,
    to_x0_noise,
)
from lumos_jax.diffusion.schedule import posterior


def loss_terms(
    process: Process, output: jax.Array, x_t: jax.Array, x0: jax.Array, t: jax.Array, noise: jax.Array
) -> dict[str, jax.Array]:
    """Compares a network's output with its target.

    Args:
      process: see `make_process`.
      output: (B, h, w, c_out), of x_t = `corrupt`(process, x0, noise, t) at `network_time`(process, t).
      x_t, x0, noise: (B, h, w, c). t: (B,) as `sample_timesteps` gives it.

    Returns:
      float32 (B,) each: `loss`, `mse` and, for the hybrid loss, `vlb` (bits per dim).
    """
    prediction, logits = split_output(process, output.astype(jnp.float32))
    signal, sigma = coefficients(process, t, x0)
    target = from_x0_noise(process.prediction, signal, sigma, x0, noise)
    terms = {"mse": _mean(jnp.square(prediction - target))}
    terms["loss"] = terms["mse"] * min_snr_weight(process, t) if process.min_snr_gamma else terms["mse"]
    if process.loss == "hybrid":
        terms["vlb"] = variational_bound(process, jax.lax.stop_gradient(prediction), logits, x_t, x0, t)
        terms["loss"] = terms["loss"] + terms["vlb"]
    return terms


def min_snr_weight(process: Process, t: jax.Array) -> jax.Array:
    """(B,) weights of the MSE: min(SNR, gamma) for x0, over SNR for noise, over SNR + 1 for v."""
    snr = signal_to_noise(process)
    over = {"x0": 1.0, "noise": snr, "v": snr + 1.0}[process.prediction]
    table = jnp.minimum(snr, process.min_snr_gamma) / over
    return jnp.asarray(table, jnp.float32)[t]


def variational_bound(process: Process, prediction, logits, x_t, x0, t) -> jax.Array:
    """(B,) bits per dim: KL(q(x_{t-1} | x_t, x_0) || p), or at t = 0 the negative log likelihood of 256 grey levels."""
    signal, sigma = coefficients(process, t, x_t)
    x0_hat, _ = to_x0_noise(process.prediction, signal, sigma, x_t, prediction)
    mean = posterior_mean(process, x0_hat, x_t, t)
    log_variance = model_log_variance(process, logits, t)
    true_mean = posterior_mean(process, x0, x_t, t)
    true_log_variance = gather(posterior(process.schedule, process.steps)["log_variance"], t, x_t)
    kl = _mean(normal_kl(true_mean, true_log_variance, mean, log_variance)) / LOG_2
    nll = _mean(-discretized_log_likelihood(x0, mean, 0.5 * log_variance)) / LOG_2
    return jnp.where(t == 0, nll, kl)


def normal_kl(mean1, log_variance1, mean2, log_variance2) -> jax.Array:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))), elementwise, in nats."""
    ratio = jnp.exp(log_variance1 - log_variance2)
    distance = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1.0 + ratio + distance)


def discretized_log_likelihood(x, mean, log_scale) -> jax.Array:
    """log P of x in [-1, 1], seen as 256 levels, under N(mean, exp(log_scale)^2); the outer bins reach to infinity.

    The normal's distribution function is the tanh approximation that the reference uses.
    """

    def cdf(z):
        return 0.5 * (1.0 + jnp.tanh(jnp.sqrt(2.0 / jnp.pi) * (z + 0.044715 * z**3)))

    centred, inverse = x - mean, jnp.exp(-log_scale)
    upper = cdf(inverse * (centred + 1.0 / 255.0))
    lower = cdf(inverse * (centred - 1.0 / 255.0))
    floor = 1e-12
    inner = jnp.log(jnp.maximum(upper - lower, floor))
    first = jnp.log(jnp.maximum(upper, floor))
    last = jnp.log(jnp.maximum(1.0 - lower, floor))
    return jnp.where(x < -0.999, first, jnp.where(x > 0.999, last, inner))


def _mean(x: jax.Array) -> jax.Array:
    """Over all dims but the first."""
    return x.reshape(x.shape[0], -1).mean(axis=1)
