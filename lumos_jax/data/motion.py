"""How much moves in a clip: the mean length of the optical flow over half a second, in pixels of a picture whose shortest side
is 16 (the measure by which SVD's data were sorted)."""

from __future__ import annotations

import numpy as np
from PIL import Image

FPS = 2  # pictures a second between which flow is taken
SIDE = 16


def pairs(frames: int, fps: float) -> tuple[list[tuple[int, int]], float]:
    """Which frames to compare, and what flow between them times this is flow over half a second."""
    gap = max(1, min(round(fps / FPS), frames - 1))
    return [(i, i + gap) for i in range(0, frames - gap, gap)], fps / FPS / gap


def measured(frames: np.ndarray, fps: float) -> float:
    """The motion score of a clip (F, S, S, 3) uint8, by Farneback's flow (2003)."""
    import cv2  # its libraries take a moment to load, and only this needs them

    grey = [np.asarray(Image.fromarray(f).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)) for f in frames]
    compared, scale = pairs(len(frames), fps)
    # Two levels and windows of 5: on 16 pixels more would only average everything.
    flows = [cv2.calcOpticalFlowFarneback(grey[a], grey[b], None, 0.5, 2, 5, 3, 5, 1.1, 0) for a, b in compared]
    return float(np.mean([np.linalg.norm(flow, axis=-1).mean() for flow in flows])) * scale if flows else 0.0
