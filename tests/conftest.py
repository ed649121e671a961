"""Strict globals for every test: 8 fake CPU devices, float32 matmuls, warnings as errors (see pyproject.toml)."""

import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # configs/ is no part of the package
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["LUMOS_JAX_WEIGHTS_CACHE"] = ""  # tests leave nothing in home directories
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.fixture
def goldens():
    """The directory of reference numbers."""
    return pathlib.Path(__file__).parent / "goldens"
