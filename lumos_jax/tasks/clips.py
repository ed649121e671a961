"""Clips as files: GIF, which any viewer loops, and MP4 (H.264), which any player plays. MP4 needs PyAV (extra `video`)."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
from PIL import Image


@contextmanager
def _written(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary name beside `path`, which takes its place at the end: a reader never sees half a file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    partial.replace(path)


def save(frames: np.ndarray, out: str, fps: float = 8.0) -> list[str]:
    """Writes (F, H, W, 3) uint8 as a GIF and an MP4 named as `out` but for its suffix; returns their names.

    Without PyAV there is no MP4, and a line says so.

    Raises:
      ValueError: `out` asks for an MP4, and PyAV is not installed. The GIF is written nevertheless.
    """
    root, suffix = os.path.splitext(out)
    stem = root if suffix in (".gif", ".mp4", ".png") else out
    save_gif(frames, f"{stem}.gif", fps)
    if importlib.util.find_spec("av") is None:
        missing = f"{stem}.mp4 is not written: MP4 needs PyAV, pip install '.[video]'"
        if suffix == ".mp4":
            raise ValueError(f"{missing}; {stem}.gif holds the same")
        print(missing, file=sys.stderr)
        return [f"{stem}.gif"]
    save_mp4(frames, f"{stem}.mp4", fps)
    return [f"{stem}.gif", f"{stem}.mp4"]


def save_gif(frames: np.ndarray, path: str | os.PathLike, fps: float = 8.0) -> None:
    """Writes (F, H, W, 3) uint8 as a GIF that loops; each frame has 256 colours of its own. GIF counts in hundredths of a
    second, so that 50 frames a second are the most."""
    pictures = [Image.fromarray(frame) for frame in frames]
    with _written(path) as partial:
        pictures[0].save(
            partial, format="GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0
        )


def save_mp4(frames: np.ndarray, path: str | os.PathLike, fps: float = 8.0) -> None:
    """Writes (F, H, W, 3) uint8 as H.264 in 4:2:0, which has even sides: an odd one repeats its last row or column."""

    import av  # its libraries take a moment to load, and only this needs them

    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with _written(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
