"""Settings and a target -> figures: builds the run, compiles its programs, reads what the compiler says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lumos_jax import config
from lumos_jax.planning.ahead import Compiled, Memory, compile_for
from lumos_jax.planning.chips import Target
from lumos_jax.planning.job import make_job
from lumos_jax.planning.report import Figures


def estimate(settings: config.Settings, target: Target, devices: Sequence[Any], *, cached: bool) -> Figures:
    """The figures of one run on one target, without its sampler.

    Args:
      settings: of the run.
      target: the machine.
      devices: the target's, from `ahead.devices_of`.
      cached: whether it trains on a cache of its frozen encoders' features.

    Raises:
      ValueError: settings that do not fit the devices, or records that cannot be cached.
    """
    job = make_job(settings, devices, cached)
    hosts = len({device.process_index for device in devices})
    held = sum(job.resident_bytes().values())
    if held > target.chip.usable:  # the compiler need not be asked
        step = Compiled(Memory(held, held, 0, 0, 0), None, "what is resident between steps is more than the memory")
    else:
        step = compile_for(target, job.lower())
    return Figures(target, job, step, None, *job.model_flops(), hosts)


def compile_sampler(
    settings: config.Settings, target: Target, devices: Sequence[Any], *, cached: bool
) -> Compiled | None:
    """The compiled sampler of the evaluation's sheet; None for a task without samples. Arguments as of `estimate`."""
    lowered = make_job(settings, devices, cached).lower_sampler()
    return None if lowered is None else compile_for(target, lowered)
