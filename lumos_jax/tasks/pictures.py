"""Sheets of pictures, as people look at them."""

from __future__ import annotations

import os
import pathlib

import numpy as np
from PIL import Image


def sheet(rows: np.ndarray, *, gap: int = 2, min_side: int = 128) -> np.ndarray:
    """Pictures (R, C, H, W, 3) uint8 -> one picture with R rows and C columns on white.

    Small pictures are enlarged by a whole factor (nearest pixel) until their side reaches `min_side` pixels, so that a
    32 px sample can be judged by eye.
    """
    factor = max(1, -(-min_side // rows.shape[2]))
    rows = rows.repeat(factor, axis=2).repeat(factor, axis=3)
    count_r, count_c, height, width, _ = rows.shape
    gap *= factor
    canvas = np.full((count_r * (height + gap) + gap, count_c * (width + gap) + gap, 3), 255, np.uint8)
    for r in range(count_r):
        for c in range(count_c):
            top, left = gap + r * (height + gap), gap + c * (width + gap)
            canvas[top : top + height, left : left + width] = rows[r, c]
    return canvas


def save_png(picture: np.ndarray, path: str | os.PathLike) -> None:
    """Writes (H, W, 3) uint8; through a temporary name, so that a reader never sees half a file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(picture).save(partial, format="PNG")
    partial.replace(path)
