"""Figures of one compiled run on one target, and their table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax

from lumos_jax.planning.ahead import Compiled, gib
from lumos_jax.planning.chips import Chip, Target
from lumos_jax.planning.job import Job
from lumos_jax.planning.program import Program

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one run of a program, by the compiler's estimates.

    Attributes:
      kernels: lower bound for our own kernels, by the chip's peak and memory bandwidth.
      computing: kernels included, collectives not.
      links: lower bound for the links.
      total: computing, and collectives beside which nothing runs; at least `links`.
    """

    kernels: float
    computing: float
    links: float
    total: float


def times_of(program: Program | None, chip: Chip) -> Times | None:
    """None where the compiler estimates no cycles (CUDA, CPU), or there is no program."""
    if program is None or not chip.clock or not program.cycles:
        return None
    kernels = sum(k.count * max(k.flops / chip.peak, k.bytes / chip.bandwidth) for k in program.kernels)
    computing, links = program.cycles / chip.clock + kernels, program.received / chip.links
    return Times(kernels, computing, links, max(computing + program.exposed / chip.links, links))


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of a run on a target.

    Attributes:
      target, job: what was planned.
      step, sampler: the two compiled programs; sampler None if it was not compiled.
      model_flops, frozen_flops: of one step of the global batch; see `flops`.
      hosts: how many the target has.
    """

    target: Target
    job: Job
    step: Compiled
    sampler: Compiled | None
    model_flops: float
    frozen_flops: float
    hosts: int

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
        if self.seconds is None:
            return None
        return self.model_flops / (self.seconds * self.target.chips * self.target.chip.peak)

    @property
    def images_per_second(self) -> float | None:
        return None if self.seconds is None else self.batch_size / self.seconds

    @property
    def record_bytes(self) -> float:
        """Bytes of one record on the way to the device."""
        return sum(a.size * a.dtype.itemsize for a in self.job.batch.values()) / self.batch_size

    def verdict(self) -> str:
        """Whether it fits, in a line."""
        needed, usable = self.step.memory.total, self.target.chip.usable
        if self.fits:
            return f"fits: {gib(needed)} of {gib(usable)}"
        return f"does NOT fit: {gib(needed)} of {gib(usable)}, {gib(needed - usable)} over"


def rows(f: Figures) -> list[tuple[str, str]]:
    """The table of one target: (name, figure)."""
    sampler = [] if f.sampler is None else [("sampler", _sampler(f))]
    return [*_run(f), *_memory(f), *_program(f), *_speed(f), *sampler]


def _run(f: Figures) -> list[tuple[str, str]]:
    s, experiment = f.job.settings, f.job.experiment
    mesh = ", ".join(f"{axis}={size}" for axis, size in f.job.mesh.shape.items() if size > 1) or "one chip"
    parameters, frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (f.job.state.params, experiment.frozen)
    )
    return [
        ("run", f"batch {f.batch_size} ({f.batch_size / f.target.chips:g} a chip) in {s.optimizer.accumulate} part(s), "
                f"remat {s.model.remat}, {s.model.dtype}, mesh {mesh}; "
                f"{'cached features' if f.job.cached else 'records, encoded in the step'}"),
        ("parameters", f"{parameters:,} of the network, {frozen:,} of frozen networks"),
    ]  # fmt: skip


def _memory(f: Figures) -> list[tuple[str, str]]:
    size = {name: gib(held) for name, held in f.job.resident_bytes().items()}
    state = sum(f.job.resident_bytes()[name] for name in ("parameters", "ema", "optimizer"))
    lines = [
        ("memory a chip", f.verdict()),
        ("  state", f"{gib(state)} (parameters {size['parameters']}, EMA {size['ema']}, optimizer {size['optimizer']})"),
        ("  frozen, batch", f"{size['frozen']}, {size['batch']}"),
    ]  # fmt: skip
    if f.job.host_bytes:
        lines.append(("  on its host", f"{gib(f.job.host_bytes)} of the state, copied to the chip and back every step"))
    if f.step.program is not None:
        m = f.step.memory
        lines.append(
            ("  temporaries", f"{gib(m.temporaries)} (activations, gradients, copies); outputs {gib(m.outputs)}, "
                              f"code {gib(m.code)}")
        )  # fmt: skip
    return lines


def _program(f: Figures) -> list[tuple[str, str]]:
    """FLOPs and collectives."""
    lines = [
        ("model FLOPs", f"{f.model_flops:.4g} a step, {f.model_flops / f.batch_size:.4g} a record; frozen networks "
                        f"{f.frozen_flops / f.batch_size:.4g} a record")
    ]  # fmt: skip
    if f.step.program is None:
        return lines
    for kind, moved in f.step.program.collectives.items():
        lines.append(
            (f"  {kind}", f"{moved.count} a step, {moved.received / 1e6:,.1f} MB received a chip, "
                          f"{moved.exposed / 1e6:,.1f} MB of it beside no computing")
        )  # fmt: skip
    return [*lines, ("links at least", f"{f.step.program.received / f.target.chip.links * 1e3:.1f} ms a step")]


def _speed(f: Figures) -> list[tuple[str, str]]:
    steps, chip, times = f.job.settings.train.steps, f.target.chip, f.times
    if f.seconds is None:
        why = "the step does not fit" if not f.fits else f"the compiler estimates no times for {chip.name}"
        return [("step time", f"unknown: {why}")]
    lines = []
    if kernels := f.step.program.kernels:
        lines.append(("kernels at least", f"{times.kernels * 1e3:.1f} ms a step, {sum(k.count for k in kernels)} runs"))
    images, days = f.images_per_second, steps * f.seconds / DAY
    return [
        *lines,
        ("step time", f"{f.seconds * 1e3:.1f} ms estimated, {times.computing * 1e3:.1f} ms of it computing"),
        ("MFU", f"{f.mfu:.1%} of {chip.peak / 1e12:g} TFLOP/s"),
        ("speed", f"{images / f.target.chips:.1f} images/s a chip, {images:,.0f} in all"),
        ("whole run", f"{steps:,} steps, {steps * f.batch_size:,} images: {days:.2f} days, "
                      f"{days * 24 * f.target.chips:,.0f} chip-hours"),
        ("input", f"{images / f.hosts:,.0f} records/s and {images / f.hosts * f.record_bytes / 1e6:,.1f} MB/s on each of "
                  f"{f.hosts} host(s)"),
    ]  # fmt: skip


def _sampler(f: Figures) -> str:
    e, needed, usable = f.job.settings.eval, f.sampler.memory.total, f.target.chip.usable
    what = f"{math.prod(e.sheet)} images, {e.steps} steps of {e.sampler}"
    if f.sampler.program is None or needed > usable:
        return f"{what}: does NOT fit even alone, {gib(needed)}"
    resident, times = f.job.resident_bytes(), times_of(f.sampler.program, f.target.chip)
    beside = needed + resident["ema"] + resident["optimizer"]  # its arguments are the weights alone
    room = "fits" if beside <= usable else "does NOT fit"
    return (
        f"{what}: {gib(needed)} a chip, {room} beside the state ({gib(beside)})"
        f"{f', {times.total:.2f} s estimated' if times else ''}"
    )


def table(heading: str, lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join([heading, *(f"  {name:<{width}}  {value}" for name, value in lines)])
