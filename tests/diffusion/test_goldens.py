"""Parity with the reference implementation: schedule, corruption, hybrid loss and DPM-Solver++."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax import config, diffusion, models
from lumos_jax.diffusion import loss, process, schedule
from lumos_jax.weights.official import from_official
from lumos_jax.weights.rules import parameter_shapes

CLOSE = dict(rtol=0, atol=1e-5)
PAPER = diffusion.make_process(config.Diffusion())


def channels_last(x):
    return np.moveaxis(x, 1, -1)


@pytest.fixture
def golden(goldens):
    return dict(np.load(goldens / "diffusion.npz"))


def test_linear_schedule(golden):
    np.testing.assert_allclose(schedule.betas("linear", 1000), golden["betas"], rtol=1e-12)
    np.testing.assert_allclose(schedule.alphas_cumprod("linear", 1000), golden["alphas_cumprod"], rtol=1e-12)


def test_corruption_loss_and_reverse_step(golden):
    x0, noise, out = (channels_last(golden[name]) for name in ("x0", "noise", "model_out"))
    t = jnp.asarray(golden["t"].astype(np.int32))
    x_t = diffusion.corrupt(PAPER, x0, noise, t)
    np.testing.assert_allclose(x_t, channels_last(golden["x_t"]), **CLOSE)
    # Compiled, as in training: op by op, the tests' compiler options give a tanh with four times the error.
    terms = jax.jit(functools.partial(diffusion.loss_terms, PAPER))(out, x_t, x0, t, noise)
    np.testing.assert_allclose(terms["mse"], golden["mse"], **CLOSE)
    np.testing.assert_allclose(terms["loss"], golden["loss"], rtol=1e-5)
    # At t = 0 the likelihood of a level is a difference of two tanh, which magnifies rounding (1.06e-5); see float64 below.
    np.testing.assert_allclose(terms["vlb"], golden["vb"], rtol=1.2e-5)
    np.testing.assert_allclose(terms["vlb"][t > 0], golden["vb"][t > 0], rtol=2e-6)

    prediction, logits = process.split_output(PAPER, jnp.asarray(out))
    signal, sigma = process.coefficients(PAPER, t, x_t)
    x0_hat, _ = process.to_x0_noise("noise", signal, sigma, x_t, prediction)
    expected = channels_last(golden["pred_xstart"])
    np.testing.assert_allclose(x0_hat, expected, rtol=1e-5, atol=1e-5)
    mean = process.posterior_mean(PAPER, x0_hat, x_t, t)
    np.testing.assert_allclose(mean, channels_last(golden["p_mean"]), rtol=1e-5, atol=1e-5)
    log_variance = process.model_log_variance(PAPER, logits, t)
    np.testing.assert_allclose(log_variance, channels_last(golden["p_log_variance"]), rtol=1e-5, atol=1e-5)


def test_variational_bound_in_float64(golden):
    with jax.enable_x64(True):
        x0, noise, out = (channels_last(golden[name]).astype(np.float64) for name in ("x0", "noise", "model_out"))
        t = jnp.asarray(golden["t"].astype(np.int32))
        x_t = diffusion.corrupt(PAPER, x0, noise, t)
        terms = diffusion.loss_terms(PAPER, jnp.asarray(out), x_t, x0, t, noise)
        np.testing.assert_allclose(terms["vlb"], golden["vb"], rtol=2e-6)
        np.testing.assert_allclose(terms["loss"], golden["loss"], rtol=2e-6)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("name", "lower_last"), [("dpms", False), ("dpms_inter", True)])
def test_dpm_solver_with_the_reference_network(goldens, steps, name, lower_last):
    golden, network = np.load(goldens / "dpm_solver.npz"), np.load(goldens / "lumos_i2i.npz")
    size = config.Model(size="48x2x4", dtype="float32")
    dit = models.make_dit(size, latent_shape=(8, 8, 4), out_channels=8, token_shape=(1, 24))
    state = {key.removeprefix("param/"): network[key] for key in network if key.startswith("param/")}
    params, _ = from_official(state, parameter_shapes(dit), origin="golden")

    @jax.jit
    def sampled(z, cond, null):
        denoise = diffusion.guided(
            lambda x, time, tokens: dit.apply(params, x, time, models.Condition(tokens=tokens)),
            cond,
            null,
            scale=float(golden["cfg_scale"]),
            process=PAPER,
        )
        key = jax.random.key(0)
        return diffusion.sample(PAPER, denoise, z, key, sampler="dpm++", steps=steps, lower_last=lower_last)

    result = sampled(channels_last(golden["z"]), golden["cond"][:, 0], golden["null"][:, 0])
    expected = channels_last(golden[f"{name}_{steps}"])
    # The random network's trajectories end at values in the hundreds, where float32 itself is spaced 3e-5 apart.
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_two_last_step_rules_differ_where_they_should(goldens):
    golden = np.load(goldens / "dpm_solver.npz")
    assert np.array_equal(golden["dpms_5"], golden["dpms_inter_5"])
    assert not np.allclose(golden["dpms_20"], golden["dpms_inter_20"], atol=1e-4)


def test_discretized_likelihood_sums_to_one():
    levels = np.linspace(-1, 1, 256, dtype=np.float32)
    log_p = loss.discretized_log_likelihood(levels, jnp.float32(0.3), jnp.float32(np.log(0.1)))
    assert np.isclose(np.exp(log_p).sum(), 1.0, atol=1e-4)
