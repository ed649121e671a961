"""Compiles ahead of time for a target that does not exist here. Running out of memory is an answer, not a failure."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from lumos_jax.planning.chips import GIB, Target
from lumos_jax.planning.program import Program, read_program

# libtpu asks a cloud's metadata server for the machine's type, and logs at length that there is none.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so that two plans may run at once
}
# Autotuning needs a GPU; without one the compiler takes its defaults, which for Triton may not compile.
_OPTIONS = {"tpu": {}, "cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}}
# Platform -> packages of its compiler, one of which is enough, and what to install.
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_COMPILERS = {
    "tpu": (
        ("libtpu",),
        "the TPU's compiler is in the package libtpu, which is not installed: pip install '.[plan]', or pip install "
        "'jax[tpu]' (x86-64 Linux, 140 MB to download; no TPU is needed)",
    ),
    "cuda": (
        CUDA_PLUGINS,
        "the compiler for CUDA is in jax's plugin, which is not installed: pip install '.[plan-cuda]' (x86-64 Linux, 625 MB "
        "to download; no GPU is needed)",
    ),
}

# Device descriptions for the compiler: compute capability, cores, FPUs a core, shared memory per core and per block at most, L2
# bytes, clock in GHz, name.
_GPUS = {
    "h100": ((9, 0), 132, 128, 233_472, 232_448, 52_428_800, 1.98, "NVIDIA H100 80GB HBM3"),
    "a100": ((8, 0), 108, 64, 167_936, 166_912, 41_943_040, 1.41, "NVIDIA A100-SXM4-80GB"),
}


class Memory(NamedTuple):
    """Bytes on one chip. total: what the program needs. The parts are 0 if it did not fit."""

    total: float
    arguments: float
    outputs: float  # without those that alias arguments
    temporaries: float
    code: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program. If the compiler ran out of memory, `program` is None and `text` is its message."""

    memory: Memory
    program: Program | None
    text: str


def devices_of(target: Target) -> list[Any]:
    """The target's devices, to compile for only. Raises ValueError if the compiler is not installed, or does not know them."""
    packages, install = _COMPILERS[target.chip.platform]
    if not any(map(importlib.util.find_spec, packages)):
        raise ValueError(f"--target={target}: {install}")
    if target.chip.platform == "tpu":
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        wanted = {"topology_name": str(target)}
    else:
        layout = {"topology": f"1x1x{target.chips}", "target_config": _gpu_description(target)}
        wanted = {"topology_name": ""} | layout
    try:
        devices = topologies.get_topology_desc(platform=target.chip.platform, **wanted).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:300]
        raise ValueError(f"--target={target}: its compiler knows no such machine: {reason}") from error
    if target.chip.platform == "cuda":
        try:
            ctypes.CDLL("libcudnn.so.9")  # which the plugin has loaded where it comes from a package
        except OSError as error:
            raise ValueError(
                f"--target={target}: cuDNN, of whose version jax asks before it takes cuDNN's attention, is not installed: "
                "pip install '.[plan-cuda]', or nvidia-cudnn-cu13 alone (493 MB to download; no GPU is needed)"
            ) from error
    return devices


def _gpu_description(target: Target) -> str:
    capability, cores, units, shared, optin, cache, clock, name = _GPUS[target.chip.name]
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
      core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock} l2_cache_size: {cache}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      memory_bandwidth: {int(target.chip.bandwidth)} device_memory_size: {target.chip.usable}
      cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    runtime_version {{ major: 12 minor: 8 patch: 0 }}
    device_description_str: "{name}"
    """


def compile_for(target: Target, lowered: Any) -> Compiled:
    """Compiles the result of `jax.jit(...).lower`. Raises JaxRuntimeError if that fails for another reason than memory."""
    try:
        compiled = lowered.compile(compiler_options=_OPTIONS.get(target.chip.platform))
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return Compiled(Memory(needed, 0, 0, 0, 0), None, str(error))
    text = compiled.as_text()
    return Compiled(memory_of(compiled), read_program(text, target.chips), text)


def memory_of(compiled: Any) -> Memory:
    """What a compiled program needs on one chip."""
    sizes = compiled.memory_analysis()
    parts = (
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.generated_code_size_in_bytes,
    )
    return Memory(sum(parts), *parts)


def needed_bytes(message: str) -> float | None:
    """Bytes that a program needed, from the compiler's message that it ran out of memory; None for other messages."""
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    for pattern in (r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", r"required for [^()]*\(([\d.]+)([KMGT]?)i?B?\)"):
        if found := re.search(pattern, message):
            return float(found[1]) * 1024.0 ** " KMGT".index(found[2] or " ")
    return None


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
