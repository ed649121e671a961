"""Samplers against Gaussian data, for which the exact denoiser is known: mean and spread must come out, at the right order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax import config, diffusion
from lumos_jax.diffusion import process as p
from lumos_jax.diffusion import schedule

MEAN, STD = 0.7, 0.3


def make(kind, prediction, learned=False):
    loss = "hybrid" if learned else "simple"
    return diffusion.make_process(config.Diffusion(schedule=kind, prediction=prediction, loss=loss))


def exact_denoiser(process):
    """The posterior mean of x0 ~ N(MEAN, STD^2), written as the process's prediction."""

    def denoise(x, time):
        share = (time / 1000)[:, None, None, None]
        if process.is_flow:
            signal, sigma = 1 - share, share
        else:
            nodes = np.linspace(0.0, 1.0, process.steps + 1)[1:]
            log_signal = 0.5 * np.log(schedule.alphas_cumprod(process.schedule, process.steps))
            log_a = jnp.interp(
                share + 1 / process.steps, jnp.asarray(nodes, jnp.float32), jnp.asarray(log_signal, jnp.float32)
            )
            signal = jnp.exp(log_a)
            sigma = jnp.sqrt(-jnp.expm1(2 * log_a))
        gain = STD**2 * signal / (signal**2 * STD**2 + sigma**2)
        x0 = MEAN + gain * (x - signal * MEAN)
        return p.from_x0_noise(process.prediction, signal, sigma, x0, (x - signal * x0) / sigma)

    return denoise


def run(process, sampler, steps, **options):
    noise = jax.random.normal(jax.random.key(1), (64, 8, 8, 3))

    @jax.jit
    def sampled(noise):
        key = jax.random.key(2)
        return diffusion.sample(process, exact_denoiser(process), noise, key, sampler=sampler, steps=steps, **options)

    return np.asarray(noise), np.asarray(sampled(noise))


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
@pytest.mark.parametrize(("sampler", "steps"), [("dpm++", 160), ("ddim", 200), ("ddpm", 1000)])
def test_discrete_samplers_reach_the_distribution(sampler, steps, prediction):
    _, x = run(make("linear", prediction), sampler, steps)
    assert np.isclose(x.mean(), MEAN, atol=0.01)
    assert np.isclose(x.std(), STD, rtol=0.04)


@pytest.mark.parametrize(("sampler", "steps", "tolerance"), [("euler", 200, 0.03), ("heun", 20, 0.03)])
def test_flow_samplers_reach_the_distribution(sampler, steps, tolerance):
    noise, x = run(make("flow", "flow"), sampler, steps)
    assert np.isclose(x.mean(), MEAN, atol=0.01)
    np.testing.assert_allclose(x, MEAN + STD * noise, atol=tolerance)


def test_second_order_beats_first_and_converges():
    def error(sampler, steps):
        noise, x = run(make("flow", "flow"), sampler, steps)
        return np.abs(x - (MEAN + STD * noise)).mean()

    assert error("heun", 10) < 0.3 * error("euler", 10)
    assert error("euler", 40) < 0.6 * error("euler", 20)

    process = make("linear", "noise")
    exact = run(process, "dpm++", 640)[1]
    coarse, fine = (np.abs(run(process, "dpm++", n)[1] - exact).mean() for n in (80, 160))
    assert fine < 0.35 * coarse


def test_eta_one_adds_noise_and_keeps_the_spread():
    process = make("linear", "noise")
    _, still = run(process, "ddim", 200)
    _, noisy = run(process, "ddim", 200, eta=1.0)
    assert not np.allclose(still, noisy, atol=0.1)
    assert np.isclose(noisy.std(), STD, rtol=0.08)


def test_learned_variance_is_used_by_ddpm():
    process = make("linear", "noise", learned=True)
    exact = exact_denoiser(process)

    def sampled(logit):
        def denoise(x, time):
            return jnp.concatenate([exact(x, time), jnp.full_like(x, logit)], axis=-1)

        noise = jax.random.normal(jax.random.key(1), (64, 8, 8, 3))
        return diffusion.sample(process, denoise, noise, jax.random.key(2), sampler="ddpm", steps=50)

    low, high = float(sampled(-1.0).std()), float(sampled(1.0).std())
    assert low < STD < high


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_with_a_key_a_row_its_noise_is_its_own(sampler, eta):
    process, keys = make("linear", "x0"), jax.random.split(jax.random.key(3), 6)

    def sampled(keys):
        noise = diffusion.normal_rows(keys, (len(keys), 4, 4, 3))
        return diffusion.sample(process, exact_denoiser(process), noise, keys, sampler=sampler, steps=4, eta=eta)

    x = np.asarray(sampled(keys))
    np.testing.assert_allclose(sampled(keys[4:1:-1]), x[4:1:-1], atol=1e-6)
    assert np.abs(x[0] - x[1]).max() > 0.1
    alone = diffusion.normal_rows(keys[0], (4, 4, 3), 7)
    np.testing.assert_array_equal(diffusion.normal_rows(keys, (6, 4, 4, 3), 7)[0], alone)
    np.testing.assert_array_equal(alone, jax.random.normal(jax.random.fold_in(keys[0], 7), (4, 4, 3)))


def test_one_step_is_the_prediction_of_x0():
    process = make("cosine", "x0")
    noise = jnp.ones((1, 2, 2, 3))
    for sampler in ("ddim", "ddpm"):
        x = diffusion.sample(
            process, lambda x, t: jnp.full_like(x, 0.25), noise, jax.random.key(0), sampler=sampler, steps=1
        )
        np.testing.assert_allclose(x, 0.25, atol=2e-3)
    assert schedule.alphas_cumprod("cosine", 1000)[-1] < 1e-6


@pytest.mark.parametrize(
    ("kind", "sampler", "steps", "message"),
    [
        ("linear", "heun", 5, "does not solve"),
        ("flow", "ddim", 5, "does not solve"),
        ("linear", "ddim", 1001, "from 1 to 1000"),
        ("linear", "plms", 5, "not one of"),
    ],
)
def test_impossible_requests_are_refused(kind, sampler, steps, message):
    process = make(kind, "flow" if kind == "flow" else "noise")
    with pytest.raises(ValueError, match=message):
        diffusion.sample(process, None, jnp.ones((1, 2, 2, 3)), jax.random.key(0), sampler=sampler, steps=steps)


@pytest.mark.parametrize(
    ("kind", "sampler", "options"),
    [
        ("linear", "dpm++", {}),
        ("linear", "dpm++", {"lower_last": True}),
        ("linear", "ddim", {}),
        ("linear", "ddim", {"eta": 0.5}),
        ("linear", "ddpm", {}),
        ("flow", "euler", {}),
        ("flow", "heun", {}),
    ],
)
def test_single_steps_give_the_same_and_show_x0(kind, sampler, options):
    process, key = make(kind, "flow" if kind == "flow" else "noise"), jax.random.key(2)
    noise, whole = run(process, sampler, 12, **options)
    carry, seen = diffusion.start(jnp.asarray(noise)), []
    for name, tables in diffusion.stages(process, sampler=sampler, steps=12, **options):
        step = jax.jit(functools.partial(diffusion.step, process, exact_denoiser(process), name=name, key=key))
        for index in range(len(tables["index"])):
            carry = step(carry, {column: table[index] for column, table in tables.items()})
            seen.append(np.asarray(carry[1]))
    np.testing.assert_allclose(carry[0], whole, atol=1e-6)  # the compiler may round a step of its own otherwise
    assert len(seen) == 12
    assert np.isclose(seen[-1].mean(), MEAN, atol=0.02)
    assert seen[0].std() < 0.5 * STD  # from pure noise, the mean is predicted
