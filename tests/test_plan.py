"""The command itself; what it prints is tested in tests/planning."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(environment, *args):
    command = [sys.executable, "-m", "lumos_jax.plan", "--config=configs/i2i.py:test", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_target_that_is_none_is_a_users_error(process_environment):
    done = run(process_environment(), "--target=v5e:4x4", "--target=v5e:4x4x4")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --target=v5e:4x4x4: v5e takes 2 number(s)")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed")
def test_a_plan_for_a_tpu(process_environment):
    done = run(process_environment(), "--target=v5e:2x2", "--features=cached", "--nosampler")
    assert done.returncode == 0, done.stderr
    assert "v5e:2x2, on cached features" in done.stdout
    assert "step time" in done.stdout
    assert "ms estimated" in done.stdout
