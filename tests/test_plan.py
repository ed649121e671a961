"""The command itself; what it prints is tested in tests/planning."""

import importlib.util

import pytest

from tests.running import finish, start

PLAN = ("lumos_jax.plan", "--config=configs/i2i.py:test")


def test_a_target_that_is_none_is_a_users_error(program):
    output = finish(start(program(*PLAN, "--target=v5e:4x4", "--target=v5e:4x4x4")), code=2)
    assert output.splitlines()[-1].startswith("error: --target=v5e:4x4x4: v5e takes 2 number(s)")
    assert "Traceback" not in output


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed")
def test_a_plan_for_a_tpu(program):
    output = finish(start(program(*PLAN, "--target=v5e:2x2", "--features=cached", "--nosampler")))
    assert "v5e:2x2, on cached features" in output
    assert "step time" in output
    assert "ms estimated" in output
