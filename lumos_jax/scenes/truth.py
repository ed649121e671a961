"""What a source knows about its pictures: of scenes everything, of other sources nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lumos_jax import config
from lumos_jax.data.sources import Source
from lumos_jax.scenes.scene import COLORS, KINDS, Scene, ScenesSource, largest, make_scene


def truth_of(data: config.Data, source: Source, records: Sequence[int]) -> dict[str, np.ndarray]:
    """Labels of records: name -> int64 (len(records),), whole numbers from 0; empty where the source has no ground truth.

    Of scenes: `shape` and `colour` of the largest solid, and `count` of solids.
    """
    if data.source != "scenes":
        return {}
    scenes = scenes_of(source, records)
    solids = [largest(scene) for scene in scenes]
    return {
        "shape": np.array([KINDS.index(solid.kind) for solid in solids]),
        "colour": np.array([list(COLORS).index(solid.color) for solid in solids]),
        "count": np.array([len(scene.solids) for scene in scenes]),
    }


def scenes_of(source: Source, records: Sequence[int]) -> list[Scene]:
    """The scenes that a source of scenes renders as these records.

    Raises:
      ValueError: another source.
    """
    if not isinstance(source, ScenesSource):
        raise ValueError(
            f"the records of a {type(source).__name__} are no scenes whose solids are known; config.data.source must be scenes"
        )
    return [make_scene(int(record), seed=source.seed) for record in records]
