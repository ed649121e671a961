"""State that is kept in bfloat16, or in the host's memory, against the same in float32 on the device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import i2i
from lumos_jax import config
from lumos_jax.config import io as config_io
from lumos_jax.planning.job import make_job
from lumos_jax.train import state as train_state
from lumos_jax.train.optimizer import make_optimizer
from lumos_jax.train.step import update_ema

LOW = {"state_dtype": "bfloat16"}


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be():
    x = jnp.asarray([1.0, -3.0, 1.0 + 2**-10, -(1.0 + 3 * 2**-9), 1e-20, 3e38, jnp.inf, jnp.nan], jnp.float32)
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(0), n))(jnp.arange(4096))
    drawn = np.asarray(jax.jit(jax.vmap(train_state.stochastic_round, (None, 0)))(x, keys).astype(jnp.float32))
    nearest = np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(drawn[:, [0, 1, 6, 7]], np.broadcast_to(nearest[[0, 1, 6, 7]], (4096, 4)))
    for column in (2, 3, 4):  # two neighbors, their mean within four deviations
        low, high = np.unique(drawn[:, column])
        assert min(abs(low), abs(high)) < abs(x[column]) < max(abs(low), abs(high))
        assert abs(drawn[:, column].mean() - x[column]) < 2 * abs(high - low) / 64


def test_a_slow_average_in_bfloat16_follows_the_one_in_float32():
    """Plain bfloat16 stays where it began: a step of decay 0.9999 is less than it resolves."""
    size, steps, decay = 4096, 4000, 0.9999
    start = {"w": jnp.linspace(0.5, 1.5, size), "null": jnp.linspace(0.5, 1.5, size)}
    target = {"w": start["w"] + 0.5, "null": start["null"]}
    low = train_state.init_ema(config.Optimizer(state_dtype="bfloat16"), start, {"w": True, "null": False})
    assert (low["w"].dtype, low["null"].dtype) == (jnp.bfloat16, jnp.float32)

    def step(carry, number):
        kept, plain, exact = carry
        moved = update_ema(train_state.to_float32(kept), target, decay)
        kept = train_state.to_state_dtype(moved, kept, 0, "ema", number)
        plain = update_ema(train_state.to_float32(plain), target, decay)["w"].astype(jnp.bfloat16)
        return (kept, {"w": plain, "null": start["null"]}, update_ema(exact, target, decay)), None

    first = (low, {"w": low["w"], "null": start["null"]}, start)
    kept, plain, exact = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps))[0])(first)
    np.testing.assert_array_equal(plain["w"], low["w"])
    np.testing.assert_array_equal(kept["null"], start["null"])
    moved = np.asarray(exact["w"] - start["w"])
    np.testing.assert_allclose(moved, 0.5 * (1 - decay**steps), rtol=1e-3)
    error = np.asarray(kept["w"].astype(jnp.float32) - exact["w"])
    assert abs(error.mean()) < 0.01 * moved.mean()
    # The rounding adds up to a deviation of sqrt(u d / 2), with u a unit in the last place and d how far the average is behind.
    assert error.std() < np.sqrt(2**-7 * 0.4 / 2)


def test_moments_in_bfloat16_shrink_with_the_gradient():
    """After gradients of 1, gradients of 0.1: rounded to the nearest, the second moment would stay where it was."""
    settings = config.Optimizer(learning_rate=1e-3, **LOW)
    params = {"w": jnp.ones(256)}
    optimizer = make_optimizer(settings, 10, {"w": True})
    states = [train_state.cast_moments(s, optimizer.init(params)) for s in (settings, config.Optimizer())]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(states[0]) if leaf.ndim} == {"bfloat16"}

    def step(states, number):
        grads = {"w": jnp.where(number < 500, 1.0, 0.1) * jnp.ones(256)}
        both = [optimizer.update(grads, train_state.to_float32(state), params) for state in states]
        kept = [
            train_state.to_state_dtype(new, old, 0, "x", number) for (_, new), old in zip(both, states, strict=True)
        ]
        return kept, [updates["w"] for updates, _ in both]

    (low, exact), updates = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(1500)))(states)
    np.testing.assert_allclose(low[0].nu["w"].astype(jnp.float32).mean(), exact[0].nu["w"].mean(), rtol=0.02)
    assert exact[0].nu["w"].mean() < 0.5 * (1 - 0.999**500)
    np.testing.assert_allclose(updates[0].mean(axis=1), updates[1].mean(axis=1), rtol=0.04)
    np.testing.assert_allclose(updates[0][-1], updates[1][-1], rtol=0.2)


def test_what_is_kept_is_counted_where_it_is():
    settings = config_io.resolve(i2i.get_config("test"))
    state = {}
    for name, fields in {
        "plain": {},
        "low": LOW,
        "host": {"ema_memory": "host"},
        "muon": LOW | {"name": "muon"},
    }.items():
        optimizer = dataclasses.replace(settings.optimizer, **fields)
        job = make_job(dataclasses.replace(settings, optimizer=optimizer), jax.devices()[:1], cached=True)
        state[name] = job.resident_bytes() | {"host": job.host_bytes}
    weights = state["plain"]["parameters"]
    assert state["low"]["optimizer"] == weights + 8
    assert weights / 2 <= state["low"]["ema"] < 0.55 * weights  # null tables stay float32
    assert (state["host"]["ema"], state["host"]["host"], state["plain"]["host"]) == (0, weights, 0)
    assert state["host"]["optimizer"] == state["plain"]["optimizer"]
    assert weights / 2 <= state["muon"]["optimizer"] < 0.9 * weights


def test_dtypes_of_checkpoints_cannot_change_within_a_run():
    settings = config_io.resolve(i2i.get_config("test"))
    allowed = dataclasses.replace(settings.checkpoint, allow_change=("optimizer.state_dtype",))
    with pytest.raises(ValueError, match="with init_from only"):
        config.validate(dataclasses.replace(settings, checkpoint=allowed))
