"""Strict globals for every test: 8 fake CPU devices, float32 matmuls, warnings as errors (see pyproject.toml).

Most of the time of a tiny network is its compilation, and tests make the same tiny networks again and again: what a process has
compiled once it reads back from a directory that ends with it. Each process of `pytest -n` has its own, since jax does not
write entries in one piece.
"""

import os
import pathlib
import sys
import tempfile

# What tests compile runs a few times, which does not win back the time that LLVM's optimisation takes. Weights of `random:0`
# differ in their last bits with it, so the processes that tests start have the same flags.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
)
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # configs/ is no part of the package
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

from tests import forks, running
from tests.ports import free_port

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")

_COMPILED = tempfile.TemporaryDirectory(prefix="lumos_jax_tests_")
# LUMOS_JAX_TEST_CACHE=DIR keeps compiled programs from one run of the tests to the next, for one process at a time.
jax.config.update("jax_compilation_cache_dir", os.environ.get("LUMOS_JAX_TEST_CACHE") or _COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure():
    jax.config.update("jax_compilation_cache_dir", None)
    _COMPILED.cleanup()
    forks.close()


@pytest.fixture(scope="session")
def process_environment(tmp_path_factory):
    """(devices) -> the environment of the commands that tests start; they have one compilation cache among them."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def build(devices=1):
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
        root = str(pathlib.Path(__file__).parent.parent)
        return os.environ | cache | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root, "XLA_FLAGS": flags}

    return build


@pytest.fixture(scope="session")
def command(process_environment):
    """What Popen needs for a training run; with `killed`, for one that dies at that moment of tests/killed.py."""

    def build(workdir, *fields, config="configs/i2i.py:test", devices=1, flags=(), killed=None):
        program = ["tests.killed", killed, "lumos_jax.main"] if killed else ["lumos_jax.main"]
        arguments = [sys.executable, "-m", *program, f"--config={config}", f"--workdir={workdir}", *flags]
        arguments += ["--config.train.compilation_cache=", "--config.log.tensorboard=False"]
        arguments += [f"--config.{field}" for field in fields]
        return {"args": arguments, "env": process_environment(devices), "cwd": running.ROOT}

    return build


@pytest.fixture(scope="session")
def in_two(command):
    """Runs a training run in two processes; returns what each of them printed."""

    def run(workdir, *fields, **how):
        port = free_port()
        flags = [(f"--coordinator=localhost:{port}", "--processes=2", f"--process={i}") for i in range(2)]
        both = [running.start(command(workdir, *fields, flags=f, **how)) for f in flags]
        return [running.finish(process) for process in both]

    return run


@pytest.fixture
def goldens():
    """The directory of reference numbers."""
    return pathlib.Path(__file__).parent / "goldens"
