"""Settings and a target -> figures: builds the run, compiles what it is made of, reads what the compiler says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lumos_jax import config
from lumos_jax.planning.ahead import Compiled, Memory, compile_for
from lumos_jax.planning.build import make_job
from lumos_jax.planning.chips import Target
from lumos_jax.planning.report import Figures


def estimate(settings: config.Settings, target: Target, devices: Sequence[Any], *, cached: bool) -> Figures:
    """The figures of one run on one target; those of its sampler are left open.

    Args:
      settings: of the run.
      target: the machine.
      devices: the target's, as `ahead.devices_of` gives them.
      cached: whether batches hold what the frozen encoders made of records.

    Raises:
      ValueError: settings that do not fit the devices, or records that are not cached.
    """
    job = make_job(settings, list(devices), cached)
    hosts = len({device.process_index for device in devices})
    held = sum(job.resident_bytes().values())
    if held > target.chip.usable:  # hopeless, and the compiler need not be asked
        step = Compiled(Memory(held, held, 0, 0, 0), None, "what stays between steps alone is more than there is")
    else:
        step = compile_for(target, job.lower())
    return Figures(target, job, step, None, *job.model_flops(), hosts)


def compile_sampler(
    settings: config.Settings, target: Target, devices: Sequence[Any], *, cached: bool
) -> Compiled | None:
    """What the compiler made of the sheet of samples; None for a task that draws nothing. Arguments as of `estimate`."""
    lowered = make_job(settings, list(devices), cached).lower_sampler()
    return None if lowered is None else compile_for(target, lowered)
