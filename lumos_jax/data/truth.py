"""What a source knows about its pictures, as labels: of scenes everything, of other sources nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lumos_jax import config
from lumos_jax.data.sources import Source


def truth_of(data: config.Data, source: Source, records: Sequence[int]) -> dict[str, np.ndarray]:
    """Labels of records: name -> int64 (len(records),), whole numbers from 0; empty where the source has no ground truth.

    Of scenes: `shape` and `colour` of the largest solid, and `count` of solids.
    """
    if data.source != "scenes":
        return {}
    from lumos_jax.data.scenes import COLORS, KINDS, largest, make_scene

    scenes = [make_scene(record, seed=source.seed) for record in records]
    solids = [largest(scene) for scene in scenes]
    return {
        "shape": np.array([KINDS.index(solid.kind) for solid in solids]),
        "colour": np.array([list(COLORS).index(solid.color) for solid in solids]),
        "count": np.array([len(scene.solids) for scene in scenes]),
    }
