"""What a whole preparation will keep, take and cost, from one of a sample (config.sample, config.sample_inputs)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from lumos_jax.preparation.plan import Plan
from lumos_jax.preparation.scan import Done
from lumos_jax.preparation.settings import Prices

_GB, _HOUR = 1e9, 3600


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Of one source, or of all.

    Attributes:
      files, read_bytes: input files.
      candidates: images in them; kept, kept_bytes: records that are kept. Duplicates that a sample cannot see are among those.
      core_hours: of the scan. A sample by hash reads all images and measures some, which is taken into account.
    """

    source: str
    files: float
    read_bytes: float
    candidates: float
    kept: float
    kept_bytes: float
    core_hours: float

    def dollars(self, prices: Prices) -> tuple[float, float]:
        """(once, for the scan; a month, for what is kept)."""
        scan = self.core_hours * prices.core_hour + self.read_bytes / _GB * prices.gb_read
        return scan, self.kept_bytes / _GB * prices.gb_month


def make(made: Plan, done: Sequence[Done], kept: np.ndarray) -> list[Forecast]:
    """One a source, then their sum.

    Args:
      done: what each task of the scan found.
      kept: (inputs, 2 or more) records kept of each input, and bytes of their images.
    """
    share, forecasts = made.settings.sample, []
    for label, (files, size) in made.totals.items():
        own = [one.number for one in made.inputs if one.source == label]
        tasks = [task for task, inputs in enumerate(made.tasks) if made.inputs[inputs[0]].source == label]
        seen = sum(made.inputs[number].bytes for number in own)
        scale = size / seen if seen else files / max(len(own), 1)
        records, size_kept = kept[own, :2].sum(axis=0)
        # Of the images in the sample, not of its nominal share, which a small sample misses.
        candidates, sampled = scale * sum(done[task].read for task in tasks), sum(done[task].rows for task in tasks)
        forecasts.append(
            Forecast(
                source=label,
                files=files,
                read_bytes=size,
                candidates=candidates,
                kept=candidates * records / max(sampled, 1),
                kept_bytes=candidates * size_kept / max(sampled, 1),
                core_hours=scale * sum(_seconds(done[task], share) for task in tasks) / _HOUR,
            )
        )
    sums = {
        field.name: sum(getattr(one, field.name) for one in forecasts)
        for field in dataclasses.fields(Forecast)
        if field.name != "source"
    }
    return [*forecasts, Forecast("all", **sums)]


def _seconds(one: Done, share: float) -> float:
    return one.seconds + (1 / share - 1) * one.decode_seconds


def describe(forecasts: Sequence[Forecast], prices: Prices) -> Iterator[str]:
    """A table: what the whole keeps, takes and costs."""
    yield "forecast of the whole, from this sample; duplicates that a sample cannot see are counted as kept"
    yield f"  {'source':<16}{'files':>12}{'GB read':>14}{'images':>16}{'kept':>16}{'GB kept':>14}{'core-hours':>12}"
    for one in forecasts:
        yield (
            f"  {one.source:<16}{one.files:>12,.0f}{one.read_bytes / _GB:>14,.3f}{one.candidates:>16,.0f}"
            f"{one.kept:>16,.0f}{one.kept_bytes / _GB:>14,.3f}{one.core_hours:>12,.2f}"
        )
    once, monthly = forecasts[-1].dollars(prices)
    yield (
        f"  scan: ${once:,.2f}, at ${prices.core_hour:g} a core-hour and ${prices.gb_read:g} a GB read; "
        f"what is kept: ${monthly:,.2f} a month, at ${prices.gb_month:g} a GB"
    )
