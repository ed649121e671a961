"""The exact motion of scenes: optical flow by projecting what each pixel shows at a later time.

The motion score of a clip is the mean length of the optical flow over half a second, in pixels of an image whose shortest
side is 16: the measure by which the data of Stable Video Diffusion were filtered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lumos_jax.scenes.render import FAR, camera_matrix, cast, cover, ground_depth
from lumos_jax.scenes.scene import FOV, Scene, moved

SCORE_FPS = 2  # frames a second between which a motion score takes flow
SCORE_SIDE = 16  # pixels a side of the images that it takes flow of


def score(flow_between: Callable[[Any, Any], np.ndarray], frames: Sequence, fps: float) -> float:
    """The motion score of frames that follow each other at `fps`, by the flow (side, side, 2) between two of them."""
    gap = max(1, min(round(fps / SCORE_FPS), len(frames) - 1))
    flows = [flow_between(frames[i], frames[i + gap]) for i in range(0, len(frames) - gap, gap)]
    lengths = [np.linalg.norm(each, axis=-1).mean() for each in flows]
    return float(np.mean(lengths)) * (fps / SCORE_FPS / gap) if lengths else 0.0


def flow(scene: Scene, before: float, after: float, size: int) -> np.ndarray:
    """Optical flow (size, size, 2) float32 from one time of the scene's clip to another, in pixels right and down.

    Where what a pixel shows is hidden afterwards, the flow says where it went all the same. The sky stands still.
    """
    old, new = moved(scene, before), moved(scene, after)
    matrix = camera_matrix(old.camera)
    rays, centre = cast(matrix, size, size)
    depth = ground_depth(rays[2], centre).astype(np.float32)
    owner = cover(old, matrix, rays, centre, depth)
    x, y, z = (c + ray.astype(np.float64) * depth for c, ray in zip(centre, rays, strict=True))
    there_x, there_y = x.copy(), y.copy()
    for number, (first, last) in enumerate(zip(old.solids, new.solids, strict=True)):
        at = owner == number
        cos, sin = math.cos(last.yaw - first.yaw), math.sin(last.yaw - first.yaw)
        there_x[at] = last.x + cos * (x[at] - first.x) - sin * (y[at] - first.y)
        there_y[at] = last.y + sin * (x[at] - first.x) + cos * (y[at] - first.y)
    went = _project(camera_matrix(new.camera), there_x, there_y, z) - _project(matrix, x, y, z)
    return (np.where((depth < FAR)[..., None], went, 0.0) * (size / (2 * math.tan(FOV / 2)))).astype(np.float32)


def _project(matrix: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """World coordinates -> (..., 2) on the plane at depth 1."""
    right, down, forward = (row[0] * x + row[1] * y + row[2] * z + row[3] for row in matrix)
    return np.stack([right, down], axis=-1) / np.maximum(forward, 1e-6)[..., None]
