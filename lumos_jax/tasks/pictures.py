"""Sheets of pictures, as people look at them."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lumos_jax import fileio

_FONT_SIZE, _LINE, _TITLE_LINES = 13, 16, 3  # pixels, pixels, lines


def sheet(rows: np.ndarray, *, titles: Sequence[str] = (), gap: int = 2, min_side: int = 128) -> np.ndarray:
    """Pictures (R, C, H, W, 3) uint8 -> one picture with R rows and C columns on white.

    titles: a text above each row, broken into lines; what does not fit on three lines is cut.

    Small pictures are enlarged by a whole factor (nearest pixel) until their side reaches `min_side` pixels, so that a
    32 px sample can be judged by eye.
    """
    factor = max(1, -(-min_side // rows.shape[2]))
    rows = rows.repeat(factor, axis=2).repeat(factor, axis=3)
    count_r, count_c, height, width, _ = rows.shape
    gap *= factor
    whole = count_c * (width + gap) + gap
    strips = []
    for r in range(count_r):
        if titles:
            strips.append(_title(titles[r], whole, gap))
        strip = np.full((height + gap, whole, 3), 255, np.uint8)
        for c in range(count_c):
            left = gap + c * (width + gap)
            strip[gap:, left : left + width] = rows[r, c]
        strips.append(strip)
    return np.concatenate([*strips, np.full((gap, whole, 3), 255, np.uint8)])


def _title(text: str, width: int, margin: int) -> np.ndarray:
    """A line or more of black text on white, (H, width, 3) uint8."""
    font = ImageFont.load_default(_FONT_SIZE)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - 2 * margin:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > _TITLE_LINES:
        lines = [*lines[: _TITLE_LINES - 1], f"{lines[_TITLE_LINES - 1]} ..."]
    image = Image.new("RGB", (width, margin + len(lines) * _LINE), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((margin, margin + number * _LINE), line, fill="black", font=font)
    return np.asarray(image)


def save_png(picture: np.ndarray, path: str | os.PathLike) -> None:
    """Writes (H, W, 3) uint8; through a temporary name, so that a reader never sees half a file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG")
    fileio.write_whole(path, content.getvalue())
