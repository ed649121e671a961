"""What a plan comes to: figures of one compiled run on one target, and the table of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lumos_jax.planning.ahead import Compiled, gib
from lumos_jax.planning.build import Job
from lumos_jax.planning.chips import Target
from lumos_jax.planning.program import Program

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of a run on a target. Times are the compiler's estimates: None where it makes none (CUDA), or the step did not fit.

    Attributes:
      target, job: what was planned.
      step, sampler: what the compiler made of the two programs; sampler None if it was not asked for.
      model_flops, frozen_flops: of one step of the global batch (see flops).
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

    def _seconds(self, compiled: Compiled | None) -> float | None:
        """Computing, and collectives that nothing runs beside; at the least the time on the links."""
        chip, program = self.target.chip, None if compiled is None else compiled.program
        if program is None or not chip.clock or not program.cycles:
            return None
        computing = program.cycles / chip.clock + self._kernels(program)
        return max(computing + program.exposed / chip.links, program.received / chip.links)

    def _kernels(self, program: Program) -> float:
        """Seconds that kernels take at the least, by the chip's peak and the bandwidth of its memory."""
        chip = self.target.chip
        return sum(k.count * max(k.flops / chip.peak, k.bytes / chip.bandwidth) for k in program.kernels)

    @property
    def computing(self) -> float | None:
        """Seconds of one step without collectives."""
        program, clock = self.step.program, self.target.chip.clock
        if program is None or not clock or not program.cycles:
            return None
        return program.cycles / clock + self._kernels(program)

    @property
    def kernels(self) -> float | None:
        """Seconds of one step that kernels take at the least, which `computing` includes."""
        return None if self.step.program is None else self._kernels(self.step.program)

    @property
    def on_links(self) -> float | None:
        """Seconds that the links need at the least for one step."""
        return None if self.step.program is None else self.step.program.received / self.target.chip.links

    @property
    def seconds(self) -> float | None:
        return self._seconds(self.step) if self.fits else None

    @property
    def sampler_seconds(self) -> float | None:
        return self._seconds(self.sampler)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs of the network that trains over what the chips could do in that time; frozen networks count nothing."""
        if self.seconds is None:
            return None
        return self.model_flops / (self.seconds * self.target.chips * self.target.chip.peak)

    @property
    def images_per_second(self) -> float | None:
        return None if self.seconds is None else self.batch_size / self.seconds

    @property
    def batch_bytes(self) -> float:
        """Of one record as it goes to the device."""
        return sum(a.size * a.dtype.itemsize for a in self.job.batch.values()) / self.batch_size

    def verdict(self) -> str:
        """Whether it fits, in a line."""
        needed, usable = self.step.memory.total, self.target.chip.usable
        if self.fits:
            return f"fits: {gib(needed)} of {gib(usable)}"
        return f"does NOT fit: {gib(needed)} of {gib(usable)}, {gib(needed - usable)} over"


def rows(f: Figures) -> list[tuple[str, str]]:
    """The table of one target: (what, figure)."""
    s, chip, resident = f.job.settings, f.target.chip, f.job.resident_bytes()
    state = resident["parameters"] + resident["ema"] + resident["optimizer"]
    mesh = ", ".join(f"{axis}={size}" for axis, size in f.job.mesh.shape.items() if size > 1) or "one chip"
    lines = [
        ("run", f"batch {f.batch_size} ({f.batch_size / f.target.chips:g} a chip) in {s.optimizer.accumulate} part(s), "
                f"remat {s.model.remat}, {s.model.dtype}, mesh {mesh}; "
                f"{'cached features' if f.job.cached else 'records, encoded in the step'}"),
        ("parameters", f"{f.job.parameters:,} that train or stay, {f.job.frozen_parameters:,} of frozen networks"),
        ("memory a chip", f.verdict()),
        ("  state", f"{gib(state)} (parameters {gib(resident['parameters'])}, EMA {gib(resident['ema'])}, optimiser "
                    f"{gib(resident['optimizer'])})"),
        ("  frozen, batch", f"{gib(resident['frozen'])}, {gib(resident['batch'])}"),
    ]  # fmt: skip
    if f.job.host_bytes:
        lines.append(("  on its host", f"{gib(f.job.host_bytes)} of the state, to the chip and back in every step"))
    if f.step.program is not None:
        m = f.step.memory
        lines += [
            ("  temporaries", f"{gib(m.temporaries)} (activations, gradients, copies); outputs {gib(m.outputs)}, "
                              f"code {gib(m.code)}"),
        ]  # fmt: skip
    lines.append(
        ("model FLOPs", f"{f.model_flops:.4g} a step, {f.model_flops / f.batch_size:.4g} a record; frozen networks "
                        f"{f.frozen_flops / f.batch_size:.4g} a record")
    )  # fmt: skip
    if f.step.program is not None:
        for kind, moved in f.step.program.collectives.items():
            lines.append(
                (f"  {kind}", f"{moved.count} a step, {moved.received / 1e6:,.1f} MB received a chip, "
                              f"{moved.exposed / 1e6:,.1f} MB of it beside no computing")
            )  # fmt: skip
        lines.append(("links at least", f"{f.on_links * 1e3:.1f} ms a step"))
    if f.seconds is None:
        why = "the step does not fit" if not f.fits else f"the compiler estimates no times for {chip.name}"
        lines.append(("step time", f"unknown: {why}"))
    else:
        images, steps = f.images_per_second, s.train.steps
        kernels = f.step.program.kernels
        if kernels:
            lines.append(("kernels at least", f"{f.kernels * 1e3:.1f} ms a step, {sum(k.count for k in kernels)} runs"))
        days = steps * f.seconds / DAY
        lines += [
            ("step time", f"{f.seconds * 1e3:.1f} ms estimated, {f.computing * 1e3:.1f} ms of it computing"),
            ("MFU", f"{f.mfu:.1%} of {chip.peak / 1e12:g} TFLOP/s"),
            ("speed", f"{images / f.target.chips:.1f} images/s a chip, {images:,.0f} in all"),
            ("whole run", f"{steps:,} steps, {steps * f.batch_size:,} images: {days:.2f} days, "
                          f"{days * 24 * f.target.chips:,.0f} chip-hours"),
            ("input", f"{images / f.hosts:,.0f} records/s and {images / f.hosts * f.batch_bytes / 1e6:,.1f} MB/s on each of "
                      f"{f.hosts} host(s)"),
        ]  # fmt: skip
    if f.sampler is not None:
        lines.append(("sampler", _sampler(f)))
    return lines


def _sampler(f: Figures) -> str:
    e, m = f.job.settings.eval, f.sampler.memory.total
    what = f"{e.rows * e.samples} pictures, {e.steps} steps of {e.sampler}"
    if f.sampler.program is None or m > f.target.chip.usable:
        return f"{what}: does NOT fit even alone, {gib(m)}"
    resident = f.job.resident_bytes()
    beside = m + resident["ema"] + resident["optimizer"]  # of the state it is given the weights alone
    room = "fits" if beside <= f.target.chip.usable else "does NOT fit"
    time = "" if f.sampler_seconds is None else f", {f.sampler_seconds:.2f} s estimated"
    return f"{what}: {gib(m)} a chip, {room} beside the state ({gib(beside)}){time}"


def table(heading: str, lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join([heading, *(f"  {name:<{width}}  {value}" for name, value in lines)])
