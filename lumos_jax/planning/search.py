"""Searches settings that make a run fit a target and run fast, by compiling them, and writes the winner as a config file."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lumos_jax import config, fileio
from lumos_jax.planning.advice import REMAT, ways_over, with_fsdp
from lumos_jax.planning.chips import Target
from lumos_jax.planning.estimate import estimate
from lumos_jax.planning.job import make_job
from lumos_jax.planning.report import Figures

# What the search may change.
FIELDS = ("train.batch_size", "optimizer.accumulate", "model.remat", "model.dtype", "mesh.fsdp")


def search(
    settings: config.Settings, target: Target, devices: Sequence[Any], cached: bool, say: Callable[[str], None]
) -> list[Figures]:
    """Tries mesh splits, remat policies, batches and precisions; returns every run that was compiled, fitting or not.

    First every policy on every split, with the config's batch: saving more is not always faster. Then, with the best of these,
    other batches, and bfloat16 where the config has float32. If none fits, the batch in two parts on every split.

    Args:
      settings: where the search starts.
      target, devices, cached: as for `estimate`.
      say: called with a line about each run that was compiled.
    """
    found: list[Figures] = []

    def attempt(tried: config.Settings) -> None:
        found.append(estimate(tried, target, devices, cached=cached))
        say(line(found[-1]))

    splits = _splits(settings, target, devices, cached)
    for split in splits:
        for remat in REMAT:
            attempt(config.replace(split, {"model.remat": remat}))
    best = winner(found, settings)
    if best is None:
        for split in splits:
            for halved in _halved(config.replace(split, {"model.remat": REMAT[-1]}), target):
                attempt(halved)
        return found
    start = best.job.settings
    for other in (*_halved(start, target), config.replace(start, {"train.batch_size": 2 * start.train.batch_size})):
        attempt(other)
    if start.model.dtype != "bfloat16":
        attempt(config.replace(start, {"model.dtype": "bfloat16"}))
    return found


def _splits(settings: config.Settings, target: Target, devices: Sequence[Any], cached: bool) -> list[config.Settings]:
    """Mesh splits that leave memory for a step: the smallest, one in the middle, the largest."""
    ways = [n for n in ways_over(target.chips // settings.mesh.context) if n == 1 or settings.train.batch_size % n == 0]
    roomy = []
    for fsdp in ways:
        held = sum(make_job(with_fsdp(settings, fsdp), devices, cached).resident_bytes().values())
        if held < 0.75 * target.chip.usable:
            roomy.append(fsdp)
    chosen = dict.fromkeys([*roomy[:1], *roomy[len(roomy) // 2 :][:1], *roomy[-1:]])
    return [with_fsdp(settings, fsdp) for fsdp in chosen]


def _halved(settings: config.Settings, target: Target) -> list[config.Settings]:
    """The batch in twice as many parts: the same gradient in less memory; none where it does not divide."""
    parts = 2 * settings.optimizer.accumulate
    if settings.train.batch_size % (parts * (target.chips // settings.mesh.context)):
        return []
    return [config.replace(settings, {"optimizer.accumulate": parts})]


def chosen(figures: Figures) -> dict[str, Any]:
    """The fields that the search chose."""
    flat = config.flatten_settings(dataclasses.asdict(figures.job.settings))
    return {name: flat[name] for name in FIELDS}


def line(f: Figures) -> str:
    """A run of the search in one line."""
    s = f.job.settings
    what = (f"batch {f.batch_size:>5} in {s.optimizer.accumulate}, remat {s.model.remat:<4}, {s.model.dtype}, "
            f"fsdp {s.mesh.fsdp:>3}: {f.step.memory.total / 2**30:6.2f} GiB")  # fmt: skip
    if not f.fits:
        return f"{what}, does not fit"
    if f.seconds is None:
        return f"{what}, fits"
    return f"{what}, {f.seconds * 1e3:7.1f} ms, {f.images_per_second / f.target.chips:7.1f} images/s a chip, MFU {f.mfu:.1%}"


def _cost(f: Figures) -> tuple[float, float]:
    """To be minimized: seconds an image, or the amount of recomputation where times are unknown; then memory."""
    if f.seconds is not None:
        return f.seconds / f.batch_size, f.step.memory.total
    return REMAT.index(f.job.settings.model.remat), f.step.memory.total


def pareto(found: Sequence[Figures]) -> list[Figures]:
    """Those that fit and that no other beats in both speed and memory, fastest first."""
    fitting = sorted((f for f in found if f.fits), key=_cost)
    front: list[Figures] = []
    for f in fitting:
        if not front or _cost(f)[1] < _cost(front[-1])[1]:
            front.append(f)
    return front


def winner(found: Sequence[Figures], settings: config.Settings) -> Figures | None:
    """The fastest that fits at the config's batch and precision, which are part of a recipe; else at any."""
    fitting = [f for f in found if f.fits]
    own = [
        f
        for f in fitting
        if f.batch_size == settings.train.batch_size and f.job.settings.model.dtype == settings.model.dtype
    ]
    return min(own or fitting, key=_cost, default=None)


def write_config(path: str, base: str, overrides: Mapping[str, Any], best: Figures) -> None:
    """Writes a config file: the one planned, with the changes of the command line and those of the search.

    Args:
      path: the file, which ends in .py.
      base: the config that was planned, with its size, as configs/i2i.py or configs/i2i.py:desk.
      overrides: what the command line changed, as "group.field" -> value.
      best: whose settings are written.
    """
    file, _, size = base.partition(":")
    values = dict(overrides) | chosen(best)
    lines = [
        f'"""{base} as `lumos_jax.plan --search` fitted it to {best.target}."""',
        "",
        "import runpy",
        "",
        "",
        f"def get_config(size={size!r}):",
        f'    config = runpy.run_path({str(pathlib.Path(file).absolute())!r})["get_config"](size)',
        *(f"    config.{name} = {value!r}" for name, value in values.items()),
        "    return config",
        "",
    ]
    fileio.write_whole(path, "\n".join(lines))
