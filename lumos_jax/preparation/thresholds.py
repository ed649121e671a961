"""Histograms of what the criteria compare, and how many records would satisfy all of them at other thresholds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lumos_jax.preparation import criteria as rules
from lumos_jax.preparation.page import Histogram
from lumos_jax.preparation.settings import Criteria

_BINS = 46


@dataclasses.dataclass(frozen=True)
class Shown:
    """How a criterion is shown.

    Attributes:
      field: of Criteria; value: of the columns of `values`.
      off: the threshold that rejects nothing.
      steps: other thresholds, as differences, or as factors where the axis is logarithmic.
    """

    field: str
    value: str
    label: str
    upper: bool
    off: float | None
    steps: Sequence[float]
    logarithmic: bool = False


SHOWN = (
    Shown("min_aesthetic", "aesthetic", "aesthetic score", False, None, (-0.5, -0.25, 0.25, 0.5)),
    Shown("max_watermark", "watermark", "watermark probability", True, 1.0, (-0.2, -0.1, 0.1, 0.2)),
    Shown("max_unsafe", "unsafe", "unsafe probability", True, 1.0, (-0.2, -0.1, 0.1, 0.2)),
    Shown("min_similarity", "similarity", "similarity of image and caption", False, -1.0, (-0.02, -0.01, 0.01, 0.02)),
    Shown("short_side", "short_side", "shorter side, pixels", False, 1, (0.5, 0.75, 1.5, 2), True),
    Shown("max_ratio", "ratio", "longer over shorter side", True, None, (0.5, 0.75, 1.5), True),
    Shown("max_pixels", "pixels", "height x width, pixels", True, 1 << 28, (0.25, 0.5), True),
    Shown("min_bytes", "bytes", "bytes of the file", False, 0, (0.5, 2), True),
    Shown("min_blur", "blur", "sharpness (variance of the Laplacian)", False, 0.0, (0.5, 0.75, 1.5, 2), True),
    Shown("min_entropy", "entropy", "entropy of luma, bits", False, 0.0, (-1, -0.5, 0.5, 1)),
    Shown("max_border", "border", "share of the area in borders", True, 1.0, (-0.2, -0.1, 0.1, 0.2)),
    Shown("min_words", "words", "words of the caption", False, 0, (0.5, 2), True),
    Shown("max_repetition", "repetition", "share of repeated words", True, 1.0, (-0.2, -0.1, 0.1, 0.2)),
)
_QUANTILES = (0.01, 0.05, 0.1)  # what a criterion that is off would reject at the thresholds shown


def histograms(
    values: Mapping[str, np.ndarray], decoded: np.ndarray, chosen: Criteria, scanned: Criteria, scale: float
) -> list[Histogram]:
    """One histogram for each criterion with values.

    Args:
      values: `Shown.value` -> (N,) float, NaN where unknown.
      decoded: (N,) bool, whether the image was decoded, without which only scores are known.
      chosen: the criteria; scanned: those of the scan, which decided what was decoded.
      scale: records for each of the N.
    """
    shown = [one for one in SHOWN if np.isfinite(values[one.value]).any()]
    passes = {one.field: _passes(values[one.value], getattr(chosen, one.field), one.upper) for one in shown}
    score_fields = {field for field, _ in rules.SCORE_LIMITS.values()}
    made = []
    for one in shown:
        known = values[one.value][np.isfinite(values[one.value])]
        others = np.ones(len(decoded), bool)
        for field, satisfied in passes.items():
            if field != one.field:
                others &= satisfied
        # What a looser threshold on a score would let in was not decoded; it counts as if it satisfied the rest.
        candidates = others if one.field in score_fields else others & decoded
        limit = getattr(chosen, one.field)
        off = limit == one.off
        moves = [(t, int(scale * (candidates & _passes(values[one.value], t, one.upper)).sum()))
                 for t in _thresholds(one, limit, off, known)]  # fmt: skip
        remark = ""
        if one.field in score_fields and any(_looser(t, getattr(scanned, one.field), one.upper) for t, _ in moves):
            remark = "Thresholds looser than those of the scan need another scan; their counts are upper bounds."
        edges, counts = _bins(one, known, None if off else limit)
        unknown = int(scale * (decoded & ~np.isfinite(values[one.value])).sum())
        made.append(Histogram(one.label, one.field, None if off else float(limit), one.upper, edges, counts * scale,
                              one.logarithmic, unknown, moves, remark))  # fmt: skip
    return made


def _passes(values: np.ndarray, limit: float, upper: bool) -> np.ndarray:
    """Whether each value satisfies the limit; unknown ones do."""
    return ~(values > limit) if upper else ~(values < limit)


def _looser(limit: float, than: float, upper: bool) -> bool:
    return limit > than if upper else limit < than


def _thresholds(one: Shown, limit: float, off: bool, known: np.ndarray) -> list[float]:
    """Round thresholds around the present one, ascending; where that is off, such as reject some of the records."""
    if off:
        places = [1 - q for q in _QUANTILES] if one.upper else list(_QUANTILES)
        others = [_rounded(float(value)) for value in np.quantile(known, places)]
    elif one.logarithmic:
        others = [_rounded(limit * step) for step in one.steps]
    else:
        others = [round(limit + step, 6) for step in one.steps]
    whole = isinstance(limit, int)
    kept = (
        {int(value) if whole else value for value in others if not _looser(value, one.off, one.upper)}
        if one.off is not None
        else set(others)
    )
    return sorted(kept | {limit})


def _rounded(value: float) -> float:
    """To two digits."""
    return float(f"{value:.2g}")


def _bins(one: Shown, known: np.ndarray, limit: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Edges (B + 1,) around most values and the threshold, and counts (B,); what lies outside is in the outermost bins."""
    low, high = (float(v) for v in np.quantile(known, (0.001, 0.999)))
    if limit is not None:
        low, high = min(low, limit), max(high, limit)
    if one.logarithmic:
        low = max(low, 1e-3)
        high = max(high, 1.1 * low)
        edges = np.geomspace(low / 1.05, high * 1.05, _BINS + 1)
    else:
        margin = 0.04 * (high - low) or 0.5
        edges = np.linspace(low - margin, high + margin, _BINS + 1)
    if limit is not None:  # the threshold lies between two bins
        edges = np.sort(np.append(np.delete(edges, 1 + np.abs(edges[1:-1] - limit).argmin()), limit))
    return edges, np.histogram(np.clip(known, edges[0], edges[-1]), edges)[0]
