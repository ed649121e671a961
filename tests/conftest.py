"""Strict globals for every test: 8 fake CPU devices, float32 matmuls, warnings as errors (see pyproject.toml).

Most of the time of a tiny network is its compilation, and tests make the same tiny networks again and again: what a process has
compiled once, it and all others read back from a directory that ends with the run of the tests.
"""

import os
import pathlib
import sys
import tempfile
import tracemalloc  # noqa: F401 (pytest imports it when an object was not closed, which fails while TFDS imports modules lazily)

# What tests compile runs a few times, which does not win back the time of LLVM's optimization, nor that of XLA's MLIR
# emitters for fusions: with the older ones a train step compiles in a third of the time (jaxlib 0.12 has no others). Weights
# of `random:0` differ in their last bits with these flags, so the processes that tests start have the same.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_force_host_platform_device_count=8",
    )
)
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # configs/ is no part of the package
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

from tests import compiled, forks, running

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")

# LUMOS_JAX_TEST_CACHE=DIR keeps compiled programs from one run of the tests to the next. Else the first process makes a
# directory, and the processes of `pytest -n` find it in their environment.
_CREATED = None
if not os.environ.get("LUMOS_JAX_TEST_CACHE"):
    _CREATED = tempfile.TemporaryDirectory(prefix="lumos_jax_tests_")
    os.environ["LUMOS_JAX_TEST_CACHE"] = _CREATED.name
_COMPILED = pathlib.Path(os.environ["LUMOS_JAX_TEST_CACHE"])
os.environ["LUMOS_JAX_CACHE"] = ""  # nothing is kept in the home directory
compiled.write_whole()
jax.config.update("jax_compilation_cache_dir", str(_COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# What takes longest comes first, or one process would work on it alone at the end.
_LONGEST = (
    "test_task_runs.py", "test_runs.py", "test_demo.py", "test_cache.py", "test_invariants.py", "test_faults.py",
    "test_evaluate.py", "test_nvs.py", "test_finetune.py", "test_dit.py", "test_dino.py", "test_clip_steps.py",
    "test_priors.py", "test_encoders.py", "test_precision.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))


def pytest_collection_finish():
    compiled.collect_rarely()


def pytest_unconfigure():
    jax.config.update("jax_compilation_cache_dir", None)
    forks.close()
    if _CREATED:
        del os.environ["LUMOS_JAX_TEST_CACHE"]
        _CREATED.cleanup()


@pytest.fixture(scope="session")
def process_environment():
    """(devices) -> the environment of the commands that tests start; they have one compilation cache among them."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(_COMPILED / "processes"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def build(devices=1):
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
        root = str(pathlib.Path(__file__).parent.parent)
        return os.environ | cache | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root, "XLA_FLAGS": flags}

    return build


@pytest.fixture(scope="session")
def program(process_environment):
    """(module, *arguments) -> what Popen needs for `python -m module arguments`."""

    def build(*arguments, devices=1):
        return {"args": [sys.executable, "-m", *arguments], "env": process_environment(devices), "cwd": running.ROOT}

    return build


@pytest.fixture(scope="session")
def command(program):
    """What Popen needs for a training run; with `killed`, for one that dies at that moment of tests/killed.py."""

    def build(workdir, *fields, config="configs/i2i.py:test", devices=1, flags=(), killed=None):
        module = ["tests.killed", killed, "lumos_jax.main"] if killed else ["lumos_jax.main"]
        fields = [f"--config.{field}" for field in fields]
        return program(*module, f"--config={config}", f"--workdir={workdir}", *flags, *fields, devices=devices)

    return build


@pytest.fixture(scope="session")
def in_two(command):
    """Runs a training run in two processes; returns what each of them printed."""

    def run(workdir, *fields, **how):
        port = running.free_port()
        flags = [(f"--coordinator=localhost:{port}", "--processes=2", f"--process={i}") for i in range(2)]
        both = [running.start(command(workdir, *fields, flags=f, **how)) for f in flags]
        return [running.finish(process) for process in both]

    return run


@pytest.fixture
def one_device():
    """Runs in this process use one device of the eight."""
    with running.on_one_device():
        yield


@pytest.fixture
def goldens():
    """The directory of reference numbers."""
    return pathlib.Path(__file__).parent / "goldens"
