"""GenEval (Ghosh et al. 2023) on scenes: whether a sample shows what its prompt asks for, judged by the scene reader.

The prompts have GenEval's six categories (tag) and its metadata: `include`, a list of {class, count, color, position}, and
`exclude`. A sample is correct if for every included entry at least `count` objects of the class, of the color and in the
position are found, and for no excluded entry as many as its count. A position is [relation, index of another entry], whose
objects it must hold to. The score is the mean over categories of the share of correct samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lumos_jax.scenes.reader import Found, find_solids

_SLACK = 0.1  # share of both boxes' sides by which centers must be apart


def correct(images: np.ndarray, prompts: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """1 or 0 for each of images (B, H, W, 3) uint8 and their prompts' metadata: (B,) float64.

    Raises:
      ValueError: prompts without metadata, images of another shape or dtype.
    """
    if not all("include" in prompt for prompt in prompts):
        raise ValueError(
            "scenes needs prompts with GenEval's metadata, as those of `evaluate sample --set=scenes-geneval`"
        )
    return np.array([_shows(*pair) for pair in zip(find_solids(images), prompts, strict=True)], np.float64)


def _shows(found: Sequence[Found], prompt: Mapping[str, Any]) -> bool:
    matched: list[list[Found]] = []
    for wanted in prompt["include"]:
        count = wanted["count"]
        objects = [solid for solid in found if solid.kind == wanted["class"]]
        if "color" in wanted:
            objects = [solid for solid in objects if solid.color == wanted["color"]]
        if "position" in wanted:
            relation, index = wanted["position"]
            others = matched[index]
            objects = [one for one in objects if all(relation in relations(one, other) for other in others)]
        if len(objects) < count:
            return False
        matched.append(objects)
    return all(sum(s.kind == no["class"] for s in found) < no["count"] for no in prompt.get("exclude", ()))


def relations(one: Found, other: Found) -> set[str]:
    """Where the first solid is, seen from the second: of left of, right of, above and below, those that are clear."""
    boxes = np.array([one.box, other.box], np.float64)
    centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    offset = centers[0] - centers[1]
    clear = np.sign(offset) * np.maximum(np.abs(offset) - _SLACK * sides.sum(0), 0)
    x, y = clear / max(np.linalg.norm(offset), 1e-9)
    named = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in named.items() if holds}
