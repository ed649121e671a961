"""Cameras as 3x4 world-to-camera matrices [R | t], x right, y down, z forward, world Z up; the center is -R^T t.

    relative camera = (polar_t - polar_c, sin(azimuth_t - azimuth_c), cos(azimuth_t - azimuth_c), radius_t - radius_c)

of a target's and a condition's camera centers, polar from +Z, in radians, as Zero-1-to-3 (Liu et al. 2023) has it.
"""

from __future__ import annotations

import math

import numpy as np

CAMERA_DIM = 4
# How far R R^T may be from the identity: float32 files of a renderer are within 1e-6, those rounded to four digits within 1e-3.
ROTATION_TOLERANCE = 1e-3
LARGEST = 1e9  # squares of it, and float32, are far from overflow


def check_matrix(matrix: np.ndarray) -> np.ndarray:
    """A world-to-camera matrix as float64.
    Raises ValueError: it is not 3x4 and finite, its left part is no rotation, or its camera stands at the origin."""
    if matrix.shape != (3, 4) or matrix.dtype.kind not in "fiu":
        raise ValueError(f"{matrix.dtype} of shape {matrix.shape} is no 3x4 world-to-camera matrix")
    matrix = matrix.astype(np.float64)
    if not (np.abs(matrix) < LARGEST).all():  # false of NaN too
        raise ValueError(f"a matrix with numbers that are not finite, or beyond {LARGEST:.0e}")
    rotation = matrix[:, :3]
    off = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if off > ROTATION_TOLERANCE:
        raise ValueError(f"its left part is no rotation: R R^T differs from the identity by {off:.2g}")
    if np.linalg.det(rotation) < 0:
        raise ValueError("its left part is no rotation: it mirrors, its determinant is -1")
    if np.linalg.norm(matrix[:, 3]) < 1e-6:
        raise ValueError("its camera stands at the origin")
    return matrix


def spherical(matrix: np.ndarray) -> tuple[float, float, float]:
    """A matrix -> (azimuth from +X, polar angle from +Z, radius) of the camera's center."""
    x, y, z = -matrix[:, :3].T @ matrix[:, 3]
    flat = math.hypot(x, y)
    return math.atan2(y, x), math.atan2(flat, z), math.hypot(flat, z)


def relative_camera(target: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """World-to-camera matrices (3, 4) of two views -> (4,) float32, as at the top."""
    azimuth, polar, radius = (a - b for a, b in zip(spherical(target), spherical(condition), strict=True))
    return np.array([polar, math.sin(azimuth), math.cos(azimuth), radius], np.float32)
