"""Losses per example.

    mse  = mean over dims of (prediction - target)^2            the paper's eq. (1) for noise prediction                   (1)
    vlb  = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the negative log likelihood of 8-bit images, in bits per
           dim, with the predicted mean detached, so that it trains the variance alone     Nichol & Dhariwal 2021, sec. 3.1 (2)
    loss = mse (simple), or mse + vlb (hybrid), without a weight on vlb                                                    (3)
    min-SNR weight of mse: min(SNR, gamma) for x0, min(SNR, gamma) / SNR for noise, min(SNR, gamma) / (SNR + 1) for v,
           all of them min(SNR, gamma) on the x0 error                                     Hang et al. 2023                (4)

Axis letters: B batch, T timesteps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lumos_jax.diffusion.process import (
    LOG_2,
    Process,
    at_timestep,
    coefficients,
    model_log_variance,
    posterior_mean,
    signal_to_noise,
    split_output,
    target,
    to_x0_noise,
)
from lumos_jax.diffusion.schedule import posterior


def loss_terms(
    process: Process, output: jax.Array, x_t: jax.Array, x0: jax.Array, t_B: jax.Array, noise: jax.Array
) -> dict[str, jax.Array]:
    """The losses of a network's output, float32 (B,) each: `loss`, `mse` and, for the hybrid loss, `vlb` (bits per dim).

    output: (B, ..., c_out), of x_t = `corrupt`(process, x0, noise, t) at `network_time`(process, t); x_t, x0, noise:
    (B, ..., c); t_B: as `sample_timesteps` gives it.
    """
    prediction, logits = split_output(process, output.astype(jnp.float32))
    terms = {"mse": _mean(jnp.square(prediction - target(process, x0, noise, t_B)))}
    terms["loss"] = terms["mse"] * min_snr_weight(process, t_B) if process.min_snr_gamma else terms["mse"]
    if process.loss == "hybrid":
        terms["vlb"] = variational_bound(process, jax.lax.stop_gradient(prediction), logits, x_t, x0, t_B)
        terms["loss"] = terms["loss"] + terms["vlb"]
    return terms


def min_snr_weight(process: Process, t_B: jax.Array) -> jax.Array:
    """(B,) weights of the mse by (4)."""
    snr_T = signal_to_noise(process)
    ratio_T = {"x0": 1.0, "noise": snr_T, "v": snr_T + 1.0}[process.prediction]
    weight_T = jnp.minimum(snr_T, process.min_snr_gamma) / ratio_T
    return jnp.asarray(weight_T, jnp.float32)[t_B]


def variational_bound(process: Process, prediction, logits, x_t, x0, t_B) -> jax.Array:
    """(B,) bits per dim: the term (2) of each example's timestep."""
    signal, sigma = coefficients(process, t_B, x_t)
    x0_hat, _ = to_x0_noise(process.prediction, signal, sigma, x_t, prediction)
    mean = posterior_mean(process, x0_hat, x_t, t_B)
    log_variance = model_log_variance(process, logits, t_B)
    true_log_variance = at_timestep(posterior(process.schedule, process.steps)["log_variance"], t_B, x_t)
    kl_B = _mean(normal_kl(posterior_mean(process, x0, x_t, t_B), true_log_variance, mean, log_variance)) / LOG_2
    nll_B = _mean(-discretized_log_likelihood(x0, mean, 0.5 * log_variance)) / LOG_2
    return jnp.where(t_B == 0, nll_B, kl_B)


def normal_kl(mean1, log_variance1, mean2, log_variance2) -> jax.Array:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))), elementwise, in nats."""
    ratio = jnp.exp(log_variance1 - log_variance2)
    distance = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1.0 + ratio + distance)


def discretized_log_likelihood(x, mean, log_scale) -> jax.Array:
    """log P of x in [-1, 1], quantized to 256 levels, under N(mean, exp(log_scale)^2); the outer bins extend to infinity.

    Ho et al. 2020, eq. 13, with their implementation's tanh approximation of the normal CDF.
    """

    def cdf(z):
        return 0.5 * (1.0 + jnp.tanh(jnp.sqrt(2.0 / jnp.pi) * (z + 0.044715 * z**3)))

    centered, inverse = x - mean, jnp.exp(-log_scale)
    upper = cdf(inverse * (centered + 1.0 / 255.0))
    lower = cdf(inverse * (centered - 1.0 / 255.0))
    inner, first, last = (jnp.log(jnp.maximum(share, 1e-12)) for share in (upper - lower, upper, 1.0 - lower))
    return jnp.where(x < -0.999, first, jnp.where(x > 0.999, last, inner))


def _mean(x: jax.Array) -> jax.Array:
    """Mean over all dims but the first."""
    return x.reshape(x.shape[0], -1).mean(axis=1)
