"""Criteria on the rows of a scan, and the order in which they decide.

Scores of the metadata are compared twice: by `scan` before it decodes an image (`score_reason`), and by `select` on the rows,
with all other criteria (`codes`). A row that violates several criteria counts under the first: what `scan` wrote (undecodable,
crash, a score), then REASONS in their order. An unknown score (NaN) or caption satisfies its criterion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lumos_jax.preparation.settings import Criteria

# Reason, which is also the score's column in a scan file -> the field of Criteria, and whether that is an upper limit.
SCORE_LIMITS = {
    "aesthetic": ("min_aesthetic", False),
    "watermark": ("max_watermark", True),
    "unsafe": ("max_unsafe", True),
    "similarity": ("min_similarity", False),
}
EXACT, NEAR, SEMANTIC = "exact_duplicate", "near_duplicate", "semantic_duplicate"
CAP, CONTAMINATED = "cap", "evaluation"
_RULES = (
    "short_side", "ratio", "pixels", "bytes", "blur", "entropy", "border", "no_caption", "words", "repetition", "banned",
)  # fmt: skip
REASONS = (*SCORE_LIMITS, *_RULES, CONTAMINATED, EXACT, NEAR, SEMANTIC, CAP)
_CAPTIONS = ("caption", "detailed")


def score_reason(criteria: Criteria, scores: Mapping[str, float]) -> str:
    """The first score outside its limit, "" if there is none."""
    for reason, (field, upper) in SCORE_LIMITS.items():
        value, limit = scores.get(reason, math.nan), getattr(criteria, field)
        if (value > limit) if upper else (value < limit):
            return reason
    return ""


def loosened(scanned: Criteria, wanted: Criteria) -> list[str]:
    """Fields that `wanted` has looser than `scanned`: records that they would keep were not decoded."""
    fields = SCORE_LIMITS.values()
    limits = {name: (getattr(scanned, name), getattr(wanted, name), upper) for name, upper in fields}
    return [name for name, (old, new, upper) in limits.items() if (new > old if upper else new < old)]


def columns(criteria: Criteria) -> list[str]:
    """The columns of a scan file that `codes` reads."""
    named = ["reason", *SCORE_LIMITS, "height", "width", "bytes", "blur", "entropy", "border"]
    return named + list(_CAPTIONS) * any(
        rule in ("no_caption", "words", "repetition", "banned") for rule in _rules(criteria)
    )


def codes(table: Any, criteria: Criteria, reasons: Sequence[str]) -> np.ndarray:
    """(N,) uint8: the place in `reasons` of the first that holds, 0 (which is "") for a row that satisfies all criteria.
    Raises ValueError: a reason of the scan that is not in `reasons`."""
    found = table["reason"].combine_chunks().dictionary_encode()
    names = found.dictionary.to_pylist()
    if unknown := set(names) - set(reasons):
        raise ValueError(f"a scan file gives the unknown reason {min(unknown)!r}: scan again")
    numbers = np.array([reasons.index(name) for name in names], np.uint8)
    result = numbers[found.indices.to_numpy()] if len(names) else np.zeros(len(table), np.uint8)
    with np.errstate(invalid="ignore", divide="ignore"):
        for reason, violated in _rules(criteria).items():
            left = result == 0
            result[left & violated(table)] = reasons.index(reason)
    return result


def _rules(criteria: Criteria) -> Mapping[str, Callable[[Any], np.ndarray]]:
    """Reason -> which rows violate it; of captions, those alone that reject anything."""
    limits = criteria

    def score(name: str) -> Callable[[Any], np.ndarray]:
        field, upper = SCORE_LIMITS[name]
        limit = np.float32(getattr(limits, field))
        return lambda table: _numbers(table, name) > limit if upper else _numbers(table, name) < limit

    def sides(table: Any) -> tuple[np.ndarray, np.ndarray]:
        height, width = _numbers(table, "height").astype(np.int64), _numbers(table, "width").astype(np.int64)
        return np.minimum(height, width), np.maximum(height, width)

    rules = {name: score(name) for name in SCORE_LIMITS} | {
        "short_side": lambda table: sides(table)[0] < limits.short_side,
        "ratio": lambda table: sides(table)[1] > limits.max_ratio * sides(table)[0],
        "pixels": lambda table: np.multiply(*sides(table)) > limits.max_pixels,
        "bytes": lambda table: _numbers(table, "bytes") < limits.min_bytes,
        "blur": lambda table: _numbers(table, "blur") < np.float32(limits.min_blur),
        "entropy": lambda table: _numbers(table, "entropy") < np.float32(limits.min_entropy),
        "border": lambda table: _numbers(table, "border") > np.float32(limits.max_border),
    }
    if limits.need_caption:
        rules["no_caption"] = lambda table: ~np.logical_or(*(_lengths(table, name) > 0 for name in _CAPTIONS))
    if limits.min_words > 0 or limits.max_words < Criteria.max_words:
        rules["words"] = lambda table: _words(table, limits)
    if limits.max_repetition < 1:
        rules["repetition"] = lambda table: np.array(
            [_repetition(text) > limits.max_repetition for text in table["caption"].to_pylist()], bool
        )
    if limits.banned:
        rules["banned"] = lambda table: _banned(table, limits.banned)
    return rules


def _numbers(table: Any, name: str) -> np.ndarray:
    return table[name].to_numpy()


def _lengths(table: Any, name: str) -> np.ndarray:
    import pyarrow.compute

    return pyarrow.compute.binary_length(table[name]).to_numpy()


def _words(table: Any, limits: Criteria) -> np.ndarray:
    import pyarrow.compute

    count = pyarrow.compute.count_substring_regex(table["caption"], r"\S+").to_numpy()
    return ((count > 0) & (count < limits.min_words)) | (count > limits.max_words)


def _repetition(text: str) -> float:
    words = text.lower().split()
    return 1 - len(set(words)) / len(words) if words else 0.0


def _banned(table: Any, phrases: Sequence[str]) -> np.ndarray:
    import pyarrow.compute

    pattern = r"(?i)(?:^|\W)(?:" + "|".join(map(re.escape, phrases)) + r")(?:\W|$)"
    hits = [pyarrow.compute.match_substring_regex(table[name], pattern).to_numpy() for name in _CAPTIONS]
    return np.logical_or(*hits)
