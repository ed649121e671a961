"""The table of figures of one run on one target."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

from lumos_jax.planning.ahead import gib
from lumos_jax.planning.chips import GIB
from lumos_jax.planning.figures import Figures, times_of
from lumos_jax.planning.measured import Measured, load, nearest

DAY = 86_400.0


def rows(f: Figures) -> list[tuple[str, str]]:
    """The table of one target: (name, figure)."""
    s, step, chip = f.job.settings, f.step, f.target.chip
    axes = ", ".join(f"{axis}={size}" for axis, size in f.job.mesh.shape.items() if size > 1) or "one chip"
    counts = [sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (f.job.state.params, f.job.experiment.frozen)]
    held = f.job.resident_bytes()
    state, size = held["parameters"] + held["ema"] + held["optimizer"], {name: gib(b) for name, b in held.items()}
    over = "" if f.fits else f", {gib(step.memory.total - chip.usable)} over"
    lines = [
        ("run", f"batch {f.batch_size} ({f.batch_size / f.target.chips:g} a chip) in {s.optimizer.accumulate} part(s), "
                f"remat {s.model.remat}, {s.model.dtype}, mesh {axes}; "
                f"{'cached features' if f.job.cached else 'records, encoded in the step'}"),
        ("parameters", f"{counts[0]:,} of the network, {counts[1]:,} of frozen networks"),
        ("memory a chip", f"{'fits' if f.fits else 'does NOT fit'}: {gib(step.memory.total)} of {gib(chip.usable)}{over}"),
        ("  state", f"{gib(state)} (parameters {size['parameters']}, EMA {size['ema']}, optimizer {size['optimizer']})"),
        ("  frozen, batch", f"{size['frozen']}, {size['batch']}"),
    ]  # fmt: skip
    if f.job.host_bytes:
        lines.append(("  on its host", f"{gib(f.job.host_bytes)} of the state, copied to the chip and back every step"))
    if step.program is not None:
        activations = f"{gib(step.memory.temporaries)} (activations, gradients, copies)"
        rest = f"outputs {gib(step.memory.outputs)}, code {gib(step.memory.code)}"
        lines.append(("  temporaries", f"{activations}; {rest}"))
    each, frozen = f.model_flops / f.batch_size, f.frozen_flops / f.batch_size
    lines.append(
        ("model FLOPs", f"{f.model_flops:.4g} a step, {each:.4g} a record; frozen networks {frozen:.4g} a record")
    )
    if step.program is not None:
        for kind, moved in step.program.collectives.items():
            beside = f"{moved.exposed / 1e6:,.1f} MB of it beside no computing"
            lines.append(
                (f"  {kind}", f"{moved.count} a step, {moved.received / 1e6:,.1f} MB received a chip, {beside}")
            )
        lines.append(("links at least", f"{step.program.received / chip.links * 1e3:.1f} ms a step"))
    like = nearest(s, f.target, load()) if f.fits and f.job.cached else None
    return [
        *lines,
        *_speed(f),
        *(_measured(f, like) if like else []),
        *([("sampler", _sampler(f))] if f.sampler else []),
    ]


def _measured(f: Figures, like: Measured) -> list[tuple[str, str]]:
    """A run that was measured on this kind of chip, and how far the figures of this plan are from it.

    Where this run is another one, its step would take so long at the same model FLOP/s of each chip, without collectives.
    """
    s, flops = f.job.settings, f.model_flops / f.target.chips
    seconds = flops / (like.teraflops * 1e12)
    same = (f.batch_size, s.model.remat, f.target.chips) == (like.images, like.remat, 1)
    same &= math.isclose(seconds, like.milliseconds / 1e3, rel_tol=0.01)
    lines = [("measured", f"{like}: {like.milliseconds:.1f} ms a step, {like.memory_gib:.1f} GiB (jax {like.jax})")]
    mfu = f"MFU {like.teraflops * 1e12 / f.target.chip.peak:.1%}"
    lines.append(("  at that speed", mfu if same else f"{seconds * 1e3:.1f} ms a step, {mfu}"))
    if f.seconds is not None:
        lines.append(("  estimate", f"{f.seconds / seconds - 1:+.1%} of that time"))
    if same and like.memory_gib:
        lines.append(("  memory", f"{f.step.memory.total / GIB / like.memory_gib - 1:+.1%} of what was measured"))
    return lines


def _speed(f: Figures) -> list[tuple[str, str]]:
    steps, chip, times = f.job.settings.train.steps, f.target.chip, f.times
    if f.seconds is None:
        why = "the step does not fit" if not f.fits else f"the compiler estimates no times for {chip.name}"
        return [("step time", f"unknown: {why}")]
    lines = []
    if kernels := f.step.program.kernels:
        lines.append(("kernels at least", f"{times.kernels * 1e3:.1f} ms a step, {sum(k.count for k in kernels)} runs"))
    images, days = f.images_per_second, steps * f.seconds / DAY
    record = (
        sum(a.size * a.dtype.itemsize for a in f.job.batch.values()) / f.batch_size
    )  # bytes on its way to the device
    return [
        *lines,
        ("step time", f"{f.seconds * 1e3:.1f} ms estimated, {times.computing * 1e3:.1f} ms of it computing"),
        ("MFU", f"{f.mfu:.1%} of {chip.peak / 1e12:g} TFLOP/s"),
        ("speed", f"{images / f.target.chips:.1f} images/s a chip, {images:,.0f} in all"),
        ("whole run", f"{steps:,} steps, {steps * f.batch_size:,} images: {days:.2f} days, "
                      f"{days * 24 * f.target.chips:,.0f} chip-hours"),
        ("input", f"{images / f.hosts:,.0f} records/s and {images / f.hosts * record / 1e6:,.1f} MB/s on each of "
                  f"{f.hosts} host(s)"),
    ]  # fmt: skip


def _sampler(f: Figures) -> str:
    e, needed, usable = f.job.settings.eval, f.sampler.memory.total, f.target.chip.usable
    what = f"{math.prod(e.sheet)} images, {e.steps} steps of {e.sampler}"
    if f.sampler.program is None or needed > usable:
        return f"{what}: does NOT fit even alone, {gib(needed)}"
    resident, times = f.job.resident_bytes(), times_of(f.sampler.program, f.target.chip)
    beside = needed + resident["ema"] + resident["optimizer"]  # its arguments are the weights alone
    seconds = f", {times.total:.2f} s estimated" if times else ""
    room = "fits" if beside <= usable else "does NOT fit"
    return f"{what}: {gib(needed)} a chip, {room} beside the state ({gib(beside)}){seconds}"


def table(heading: str, lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join([heading, *(f"  {name:<{width}}  {value}" for name, value in lines)])
