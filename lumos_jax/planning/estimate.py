"""Settings and a target -> figures: builds the run, compiles what it is made of, reads what the compiler says."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent import futures
from typing import Any

from lumos_jax import config
from lumos_jax.planning.ahead import Compiled, Memory, compile_for
from lumos_jax.planning.build import Job, make_job
from lumos_jax.planning.chips import Target
from lumos_jax.planning.report import Figures


def estimate(
    settings: config.Settings, target: Target, devices: Sequence[Any], *, cached: bool, sampler: bool
) -> Figures:
    """The figures of one run on one target.

    Args:
      settings: of the run.
      target: the machine.
      devices: the target's, as `ahead.devices_of` gives them.
      cached: whether batches hold what the frozen encoders made of records.
      sampler: whether the sampler is compiled too.

    Raises:
      ValueError: settings that do not fit the devices, or records that are not cached.
    """
    job = make_job(settings, list(devices), cached)
    hosts = len({device.process_index for device in devices})
    flops = job.model_flops()
    held = sum(job.resident_bytes().values())
    if held > target.chip.usable:  # hopeless, and the compiler need not be asked
        step = Compiled(Memory(held, held, 0, 0, 0), None, "what stays between steps alone is more than there is")
        return Figures(target, job, step, None, *flops, hosts)
    # Compilers use one core for the most part.
    with futures.ThreadPoolExecutor(2) as pool:
        drawn = pool.submit(_sampler, target, job) if sampler else None
        step = pool.submit(lambda: compile_for(target, job.lower())).result()
        return Figures(target, job, step, None if drawn is None else drawn.result(), *flops, hosts)


def _sampler(target: Target, job: Job) -> Compiled | None:
    lowered = job.lower_sampler()
    return None if lowered is None else compile_for(target, lowered)
