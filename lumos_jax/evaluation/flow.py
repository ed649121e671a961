"""Optical flow between consecutive frames, and how far it is from the true flow.

Flow is Farneback's ("Two-Frame Motion Estimation Based on Polynomial Expansion", 2003) as OpenCV has it, with a window small
enough for scenes of 32 to 64 pixels. A flow (H, W, 2) holds the displacement of each pixel from one frame to the next, right
(0) and down (1), in pixels. The end-point error is the length of the difference between two flows, averaged over pixels (Baker
et al. 2011, "A Database and Evaluation Methodology for Optical Flow").

Axes: F frames, H height, W width.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys

import numpy as np

# A pyramid of three levels follows shifts of about a tenth of 64 pixels; larger windows smear the edges of small solids.
_FARNEBACK = {"pyr_scale": 0.5, "levels": 3, "winsize": 9, "iterations": 5, "poly_n": 5, "poly_sigma": 1.1, "flags": 0}


@functools.cache
def has_optical_flow() -> bool:
    """Whether OpenCV is installed; if not, says once what is therefore not measured."""
    found = importlib.util.find_spec("cv2") is not None
    if not found:
        print("flow_error is not measured: optical flow needs OpenCV, pip install '.[video]'", file=sys.stderr)
    return found


def optical_flow(frames: np.ndarray) -> np.ndarray:
    """Flow from each frame to the next, (F - 1, H, W, 2) float32 in pixels.

    Args:
      frames: (F, H, W, 3) uint8, two or more.

    Raises:
      ValueError: frames of another shape or dtype.
      ModuleNotFoundError: OpenCV, of the extra `video`, is not installed.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or len(frames) < 2:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}: give uint8 (F, H, W, 3) with two frames or more")
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("optical flow needs OpenCV: pip install '.[video]'") from error
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    pairs = itertools.pairwise(gray)
    return np.stack([cv2.calcOpticalFlowFarneback(first, second, None, **_FARNEBACK) for first, second in pairs])


def end_point_error(flow: np.ndarray, truth: np.ndarray) -> float:
    """Mean length of the difference between two flows (..., 2), in pixels. Raises ValueError for empty or different shapes."""
    if np.shape(flow) != np.shape(truth) or np.shape(flow)[-1:] != (2,) or not np.size(flow):
        raise ValueError(f"flow {np.shape(flow)} and true flow {np.shape(truth)} must both be (..., 2), and not empty")
    return float(np.linalg.norm(np.subtract(flow, truth, dtype=np.float64), axis=-1).mean())
