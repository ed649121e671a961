"""Image grids and files: PNG, GIF, which any viewer loops, and MP4 (H.264), which any player plays; it needs PyAV (extra
`video`)."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pathlib
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from lumos_jax import fileio

_FONT_SIZE, _LINE, _TITLE_LINES = 13, 16, 3  # pixels, pixels, lines


def image_grid(rows: np.ndarray, *, titles: Sequence[str] = (), gap: int = 2, min_side: int = 128) -> np.ndarray:
    """Images (R, C, H, W, 3) uint8 -> one image with R rows and C columns on white.

    titles: a text above each row; what does not fit on three lines is cut. Small images are enlarged by an integer factor
    (nearest pixel) until their side reaches `min_side` pixels, so that a 32 px sample can be judged by eye.
    """
    factor = max(1, -(-min_side // rows.shape[2]))
    rows = rows.repeat(factor, axis=2).repeat(factor, axis=3)
    gap *= factor
    cells = np.pad(rows, ((0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255)  # above and to the left
    strips = cells.transpose(0, 2, 1, 3, 4).reshape(len(rows), cells.shape[2], -1, 3)
    strips = list(np.pad(strips, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255))
    width = strips[0].shape[1]
    if titles:
        pairs = zip((_title(text, width, gap) for text in titles), strips, strict=True)
        strips = itertools.chain.from_iterable(pairs)
    return np.concatenate([*strips, np.full((gap, width, 3), 255, np.uint8)])


def _title(text: str, width: int, margin: int) -> np.ndarray:
    """A line or more of black text on white, (H, width, 3) uint8."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT_SIZE)
    columns = int((width - 2 * margin) / font.getlength("o"))
    lines = textwrap.wrap(text, max(columns, 8), max_lines=_TITLE_LINES, placeholder=" ...")
    image = Image.new("RGB", (width, margin + len(lines) * _LINE), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((margin, margin + number * _LINE), line, fill="black", font=font)
    return np.asarray(image)


def check_writable(path: str | os.PathLike, given: str) -> None:
    """Raises ValueError, which begins with `given`, unless that file can be written; a missing folder is made."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"{given}: {path} is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise fileio.failure(error, f"{given} cannot be written: {error.strerror or error}: {path.parent}") from error


def clip_files(out: str) -> list[str]:
    """The GIF and MP4 named as `out` but for its ending; without PyAV the GIF alone, and ValueError for an `out` in .mp4."""
    root, ending = os.path.splitext(out)
    if importlib.util.find_spec("av") is not None:
        return [f"{root}.gif", f"{root}.mp4"]
    if ending.lower() == ".mp4":
        raise ValueError(f"{out}: MP4 needs PyAV, pip install '.[video]'; give a name in .gif for a GIF")
    return [f"{root}.gif"]


def save_clip(frames: np.ndarray, out: str, fps: float = 8.0) -> list[str]:
    """Writes (F, H, W, 3) uint8 as `clip_files(out)` and returns these names."""
    files = clip_files(out)
    save_gif(frames, files[0], fps)
    if len(files) == 1:
        print("no MP4 is written: it needs PyAV, pip install '.[video]'", file=sys.stderr)
    else:
        save_mp4(frames, files[1], fps)
    return files


def save_gif(frames: np.ndarray, path: str | os.PathLike, fps: float = 8.0) -> None:
    """Writes (F, H, W, 3) uint8 as a GIF that loops; each frame has 256 colors of its own. GIF counts in hundredths of a
    second, so that 50 frames a second are the most."""
    from PIL import Image

    first, *others = [Image.fromarray(frame) for frame in frames]
    with fileio.replacing(path) as partial:
        first.save(partial, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


def save_mp4(frames: np.ndarray, path: str | os.PathLike, fps: float = 8.0) -> None:
    """Writes (F, H, W, 3) uint8 as H.264 in 4:2:0, which has even sides: an odd one repeats its last row or column."""
    import av  # its libraries take a moment to load, and only this needs them

    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with fileio.replacing(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
