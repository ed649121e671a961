"""Exact labels of scenes, for probes of what features hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lumos_jax.scenes.scene import COLORS, KINDS, Scene, largest


def labels(scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Labels of scenes: name -> int64 (len(scenes),), whole numbers from 0.

    `shape` and `colour` of the largest solid, and `count` of solids.
    """
    solids = [largest(scene) for scene in scenes]
    return {
        "shape": np.array([KINDS.index(solid.kind) for solid in solids]),
        "colour": np.array([list(COLORS).index(solid.color) for solid in solids]),
        "count": np.array([len(scene.solids) for scene in scenes]),
    }
