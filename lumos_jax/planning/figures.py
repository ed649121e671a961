"""Settings and a target -> figures: builds the run, compiles its programs, reads what the compiler says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from lumos_jax import config
from lumos_jax.planning.ahead import Compiled, Memory, compile_for
from lumos_jax.planning.chips import Chip, Target
from lumos_jax.planning.job import Job, make_job
from lumos_jax.planning.program import Program


class Times(NamedTuple):
    """Seconds of one run of a program, by the compiler's estimates."""

    kernels: float  # lower bound for our own kernels, by the chip's peak and memory bandwidth
    computing: float  # kernels included, collectives not
    total: float  # computing, and what it does not hide of collectives; at least the lower bound for the links


def times_of(program: Program | None, chip: Chip) -> Times | None:
    """None where the compiler estimates no cycles (CUDA, CPU), or there is no program."""
    if program is None or not chip.clock or not program.cycles:
        return None
    kernels = sum(k.count * max(k.flops / chip.peak, k.bytes / chip.bandwidth) for k in program.kernels)
    computing = program.cycles / chip.clock + kernels
    overlapped = ((one.count, one.received / chip.links - one.cycles / chip.clock) for one in program.overlapped)
    exposed = program.exposed / chip.links + sum(count * max(0.0, seconds) for count, seconds in overlapped)
    return Times(kernels, computing, max(computing + exposed, program.received / chip.links))


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of a run on a target."""

    target: Target
    job: Job
    step: Compiled
    sampler: Compiled | None  # None if it was not compiled
    model_flops: float  # of one step of the global batch; see `flops`
    frozen_flops: float
    hosts: int  # of the target

    @property
    def batch_size(self) -> int:
        return self.job.settings.train.batch_size

    @property
    def fits(self) -> bool:
        return self.step.program is not None and self.step.memory.total <= self.target.chip.usable

    @property
    def times(self) -> Times | None:
        """Of the step."""
        return times_of(self.step.program, self.target.chip)

    @property
    def seconds(self) -> float | None:
        """Of the step, if it fits."""
        return self.times.total if self.fits and self.times else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs of the trained network over the chips' peak in that time; frozen networks do not count."""
        peak = self.target.chips * self.target.chip.peak
        return None if self.seconds is None else self.model_flops / (self.seconds * peak)

    @property
    def images_per_second(self) -> float | None:
        return None if self.seconds is None else self.batch_size / self.seconds


def estimate(settings: config.Settings, target: Target, devices: Sequence[Any], *, cached: bool) -> Figures:
    """The figures of one run on one target, without its sampler. devices: from `ahead.devices_of`. Otherwise as `make_job`."""
    job = make_job(settings, devices, cached)
    hosts = len({device.process_index for device in devices})
    if job.held > target.chip.usable:  # the compiler need not be asked
        memory = Memory(job.held, job.held, 0, 0, 0)
        step = Compiled(memory, None, "what is resident between steps is more than the memory")
    else:
        step = compile_for(target, job.lower())
    return Figures(target, job, step, None, *job.model_flops(), hosts)


def compile_sampler(
    settings: config.Settings, target: Target, devices: Sequence[Any], *, cached: bool
) -> Compiled | None:
    """The compiled sampler of the evaluation's sheet; None for a task without samples. Arguments as of `estimate`."""
    lowered = make_job(settings, devices, cached).lower_sampler()
    return None if lowered is None else compile_for(target, lowered)
