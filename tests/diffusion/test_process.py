"""Round trips over every parameterization, the weights of the losses, timesteps and guidance."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax import config, diffusion
from lumos_jax.diffusion import process as p
from lumos_jax.diffusion import schedule

DISCRETE = tuple(itertools.product(("linear", "cosine"), ("noise", "x0", "v")))
ALL = (*DISCRETE, ("flow", "flow"))


def make(kind, prediction, **more):
    return diffusion.make_process(config.Diffusion(schedule=kind, prediction=prediction, loss="simple", **more))


def random_inputs(process, size=6):
    x0, noise = (jax.random.normal(jax.random.key(i), (size, 4, 4, 3)) for i in (0, 1))
    t = jnp.linspace(0.05, 0.95, size) if process.is_flow else jnp.linspace(30, 900, size).astype(jnp.int32)
    return x0, noise, t


@pytest.mark.parametrize(("kind", "prediction"), ALL)
def test_the_target_gives_back_image_and_noise(kind, prediction):
    process = make(kind, prediction)
    x0, noise, t = random_inputs(process)
    x_t = diffusion.corrupt(process, x0, noise, t)
    wanted = diffusion.target(process, x0, noise, t)
    got = p.to_x0_noise(prediction, *p.coefficients(process, t, x0), x_t, wanted)
    np.testing.assert_allclose(got[0], x0, atol=1e-4)
    np.testing.assert_allclose(got[1], noise, atol=1e-4)


@pytest.mark.parametrize(("kind", "prediction"), ALL)
def test_loss_is_zero_for_the_target_and_its_distance_otherwise(kind, prediction):
    process = make(kind, prediction)
    x0, noise, t = random_inputs(process)
    wanted = diffusion.target(process, x0, noise, t)
    x_t = diffusion.corrupt(process, x0, noise, t)
    perfect = diffusion.loss_terms(process, wanted, x_t, x0, t, noise)
    off = diffusion.loss_terms(process, wanted + 0.5, x_t, x0, t, noise)
    np.testing.assert_allclose(perfect["loss"], 0.0, atol=1e-10)
    np.testing.assert_allclose(off["loss"], 0.25, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_min_snr_weights_the_same_x0_error_alike(kind):
    """Hang et al. 2023: whatever is predicted, the loss is min(SNR, gamma) times the squared x0 error."""
    for prediction in ("noise", "x0", "v"):
        process = make(kind, prediction, min_snr_gamma=5.0)
        x0, noise, t = random_inputs(process)
        signal, sigma = p.coefficients(process, t, x0)
        x_t = diffusion.corrupt(process, x0, noise, t)
        wrong = x0 + 0.1
        output = p.from_x0_noise(prediction, signal, sigma, wrong, (x_t - signal * wrong) / sigma)
        terms = diffusion.loss_terms(process, output, x_t, x0, t, noise)
        snr = p.signal_to_noise(process)[np.asarray(t)]
        np.testing.assert_allclose(terms["loss"], 0.01 * np.minimum(snr, 5.0), rtol=2e-3)


def test_cosine_schedule_is_clipped_and_decreasing():
    bar = schedule.alphas_cumprod("cosine", 1000)
    assert schedule.betas("cosine", 1000).max() == 0.999
    assert np.all(np.diff(bar) < 0)
    expected = np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert np.isclose(bar[499], expected, rtol=1e-9)
    with pytest.raises(ValueError, match="no betas"):
        schedule.betas("flow", 10)


def test_linear_schedule_keeps_its_noise_at_other_step_counts():
    few, many = schedule.alphas_cumprod("linear", 100)[-1], schedule.alphas_cumprod("linear", 1000)[-1]
    assert np.isclose(np.log(few), np.log(many), rtol=0.15)


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
@pytest.mark.parametrize("kind", ["linear", "flow"])
def test_timesteps_have_their_distribution(kind, timesteps):
    process = make(kind, "flow" if kind == "flow" else "noise", timesteps=timesteps, logit_mean=0.5)
    t = np.asarray(diffusion.sample_timesteps(process, jax.random.key(0), (20_000,)), np.float64)
    share = t if process.is_flow else (t + 0.5) / process.steps
    assert share.min() > 0
    assert share.max() < 1
    median = 0.5 if timesteps == "uniform" else 1 / (1 + np.exp(-0.5))
    assert np.isclose(np.median(share), median, atol=0.01)
    inner = np.mean((share > 0.25) & (share < 0.75))
    assert np.isclose(inner, 0.5 if timesteps == "uniform" else 0.668, atol=0.015)
    quartile = np.asarray(diffusion.timestep_quartile(process, jnp.asarray(share if process.is_flow else t)))
    assert np.array_equal(quartile, np.minimum((share * 4).astype(int), 3))


def test_network_time_runs_to_a_thousand():
    np.testing.assert_allclose(diffusion.network_time(make("linear", "noise"), jnp.array([0, 999])), [0.0, 999.0])
    np.testing.assert_allclose(diffusion.network_time(make("flow", "flow"), jnp.array([0.25])), [250.0])


def linear_net(x, time, condition):
    return x * condition[:, None, None, None]


def test_guidance_extrapolates_from_the_null_and_costs_nothing_at_one():
    process, x, time = make("linear", "noise"), jnp.ones((2, 2, 2, 3)), jnp.array([100.0, 900.0])
    cond, null = jnp.array([1.0, 2.0]), jnp.array([0.5, 0.5])
    out = diffusion.guided(linear_net, cond, null, scale=3.0, process=process)(x, time)
    np.testing.assert_allclose(out[:, 0, 0, 0], [0.5 + 3 * 0.5, 0.5 + 3 * 1.5])
    sizes = []

    def counting(x, time, condition):
        sizes.append(x.shape[0])
        return linear_net(x, time, condition)

    diffusion.guided(counting, cond, null, scale=1.0, process=process)(x, time)
    diffusion.guided(counting, cond, null, scale=2.0, process=process)(x, time)
    assert sizes == [2, 4]


def test_guidance_interval_and_rescale():
    process, time = make("linear", "noise"), jnp.array([100.0, 900.0])
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    cond, null = jnp.array([1.0, 1.0]), jnp.array([0.5, 0.5])
    within = diffusion.guided(linear_net, cond, null, scale=3.0, interval=(0.5, 1.0), process=process)(x, time)
    np.testing.assert_allclose(within[0], x[0], rtol=1e-6)
    np.testing.assert_allclose(within[1], 2 * x[1], rtol=1e-6)
    rescaled = diffusion.guided(linear_net, cond, null, scale=3.0, rescale=1.0, process=process)(x, time)
    np.testing.assert_allclose(rescaled.std((1, 2, 3)), x.std((1, 2, 3)), rtol=1e-5)


def test_guidance_leaves_the_variance_half_alone():
    process = diffusion.make_process(config.Diffusion())
    x, time = jnp.ones((1, 2, 2, 4)), jnp.array([5.0])

    def net(x, time, condition):
        return jnp.concatenate([x * condition[:, None, None, None]] * 2, axis=-1)

    out = diffusion.guided(net, jnp.array([2.0]), jnp.array([1.0]), scale=4.0, process=process)(x, time)
    assert out.shape == (1, 2, 2, 8)
    np.testing.assert_allclose(out[..., :4], 5.0)
    np.testing.assert_allclose(out[..., 4:], 2.0)
