"""Histograms of what the criteria compare, and how many records would satisfy all of them at other thresholds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lumos_jax.preparation import criteria as rules
from lumos_jax.preparation.page import Histogram
from lumos_jax.preparation.settings import Criteria

_BINS = 46
_RESCAN = "Thresholds looser than those of the scan need another scan; their counts are upper bounds."


@dataclasses.dataclass(frozen=True)
class Shown:
    """How a criterion is shown.

    Attributes:
      field: of Criteria; value: the argument of `values`, and the reason.
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
)
NAMES = frozenset(one.value for one in SHOWN)
_QUANTILES = (0.01, 0.05, 0.1)  # what a criterion that is off would reject at the thresholds shown


def histograms(
    table: Any, reasons: Sequence[str], chosen: Criteria, scanned: Criteria, scale: float
) -> list[Histogram]:
    """One histogram for each criterion with values.

    Args:
      table: rows of scan files.
      reasons: of the selection, by code.
      chosen: the criteria; scanned: those of the scan, which decided what was decoded.
      scale: records for each row.
    """
    made = []
    for one in SHOWN:
        column = values(table, one.value)
        known = column[np.isfinite(column)]
        if not len(known):
            continue
        limit = getattr(chosen, one.field)
        off = limit == one.off
        tried = _thresholds(one, limit, off, known)
        moves = [(t, int(scale * _satisfying(table, reasons, chosen, one, t))) for t in tried]
        looser = one.value in rules.SCORE_LIMITS and any(
            _looser(t, getattr(scanned, one.field), one.upper) for t in tried
        )
        edges, counts = _bins(one, known, None if off else limit)
        made.append(Histogram(
            label=one.label, field=one.field, limit=limit, off=off, upper=one.upper, edges=edges,
            counts=counts * scale, logarithmic=one.logarithmic, unknown=int(scale * (len(column) - len(known)))
            if one.value in rules.SCORE_LIMITS else 0, moves=moves, remark=_RESCAN if looser else "",
        ))  # fmt: skip
    return made


def values(table: Any, name: str) -> np.ndarray:
    """(N,) float64, what a criterion compares; NaN where it is unknown or was not measured."""
    import pyarrow.compute

    if name == "words":
        count = pyarrow.compute.count_substring_regex(table["caption"], r"\S+").to_numpy().astype(np.float64)
        return np.where(count > 0, count, np.nan)
    if name in table.column_names:
        column = table[name].to_numpy().astype(np.float64)
        return column if name in rules.SCORE_LIMITS or name == "bytes" else np.where(_decoded(table), column, np.nan)
    height, width = (table[side].to_numpy().astype(np.float64) for side in ("height", "width"))
    with np.errstate(divide="ignore", invalid="ignore"):
        column = {
            "short_side": np.minimum(height, width),
            "ratio": np.maximum(height, width) / np.minimum(height, width),
            "pixels": height * width,
        }[name]
    return np.where(_decoded(table), column, np.nan)


def _decoded(table: Any) -> np.ndarray:
    return table["height"].to_numpy() > 0


def _satisfying(table: Any, reasons: Sequence[str], chosen: Criteria, one: Shown, limit: float) -> int:
    """Rows that satisfy all criteria with another limit of one. Where that is a score's, looser than in the scan, what it lets
    in was not decoded and counts as if it satisfied the rest."""
    moved = dataclasses.replace(chosen, **{one.field: limit})
    count = int((rules.codes(table, moved, reasons) == 0).sum())
    if one.value in rules.SCORE_LIMITS:
        scores = table[one.value].to_numpy()
        rejected = table["reason"].to_numpy(zero_copy_only=False) == one.value
        count += int((rejected & ~(scores > limit if one.upper else scores < limit)).sum())
    return count


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
    if isinstance(limit, int):
        others = [int(value) for value in others]
    if one.off is not None:
        others = [value for value in others if not _looser(value, one.off, one.upper)]
    return sorted({*others, limit})


def _rounded(value: float) -> float:
    """To three digits."""
    return float(f"{value:.3g}")


def _bins(one: Shown, known: np.ndarray, limit: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Edges (B + 1,) around most values and the threshold, and counts (B,); what lies outside is in the outermost bins."""
    most = known[known > 0] if one.logarithmic and (known > 0).any() else known
    low, high = (float(v) for v in np.quantile(most, (0.001, 0.999)))
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
