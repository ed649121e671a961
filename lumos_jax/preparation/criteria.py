"""Criteria on scores of the metadata, which `scan` applies before it decodes an image and `select` applies again.

A score that is unknown (NaN) satisfies its criterion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lumos_jax.preparation.settings import Criteria

# Reason, which is also the score's column in a scan file -> the field of Criteria, and whether that is an upper limit.
SCORE_LIMITS = {
    "aesthetic": ("min_aesthetic", False),
    "watermark": ("max_watermark", True),
    "unsafe": ("max_unsafe", True),
    "similarity": ("min_similarity", False),
}


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
