"""Video files, by WebVid's or OpenVid's csv or from a folder, decoded with PyAV (FFmpeg)."""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from absl import logging

from lumos_jax.data.clips import Clip, start_of
from lumos_jax.data.decode import UndecodableImage
from lumos_jax.data.sources import Names, digest, file_size, files_below, printable

VIDEO_ENDINGS = frozenset((".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"))
MOTION = "motion score"  # OpenVid's column
# Columns that say where a video lies, as (WebVid) <page_dir>/<videoid>.mp4 or (OpenVid) <video>.
_WEBVID, _OPENVID = ("videoid", "page_dir"), ("video",)


class VideosSource:
    """Videos of a csv, in its order, or every video file below a directory, by sorted relative name.

    The videos of a csv lie beside it or in a folder `videos` there: WebVid's as <page_dir>/<videoid>.mp4, OpenVid's as the
    column `video` names them. A row whose file is absent is a record that cannot be read, as is a file that is no video.
    OpenVid's column "motion score" is taken as the clips' motion; it is in units of its own.

    Raises:
      ValueError: nothing there, no videos, or a csv of other columns.
    """

    def __init__(self, path: str):
        given = pathlib.Path(path).expanduser().absolute()
        self.motion: np.ndarray | None = None
        if given.is_dir():
            self.root = given
            self.names = Names(sorted(_videos_below(given, path)))
            self._content = digest((name, file_size(given / name)) for name in self.names)
        elif given.is_file():
            self.root = given.parent / "videos" if (given.parent / "videos").is_dir() else given.parent
            names, motion = _read_csv(given, path)
            self.names = Names(names)
            self.motion = np.array(motion, np.float32) if motion else None
            self._content = digest((*names, *(motion or ())))
        else:
            raise ValueError(f"config.data.path={path!r} is neither a directory nor a csv file")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> np.ndarray:
        """The video's first frame, where pictures are asked for."""
        return self.clip(index, 1, 1, 0.0, 0).frames[0]

    def clip(self, index: int, frames: int, stride: int, share: float, size: int) -> Clip:
        """See `clips.ClipSource`; `size` is not used."""
        with _opened(os.path.join(self.root, self.names[index])) as (container, stream):
            rate = stream.average_rate or stream.guessed_rate
            total = _length(container, stream, rate)
            start = start_of(share, total, frames, stride)
            pictures = _frames(container, stream, rate, [start + i * stride for i in range(frames)])
        motion = None if self.motion is None else float(self.motion[index])
        return Clip(pictures, float(rate) / stride, motion)

    def describe(self, index: int) -> str:
        return printable(os.path.join(self.root, self.names[index]))

    def fingerprint(self) -> str:
        return self._content


def _videos_below(root: pathlib.Path, path: str) -> list[str]:
    found, others = [], []
    for name in files_below(root):
        is_video = os.path.splitext(name)[1].lower() in VIDEO_ENDINGS
        (found if is_video else others).append(os.path.relpath(name, root))
    if not found:
        tables = sorted(name for name in others if name.endswith(".csv"))
        told = f"; to read the videos that a csv lists, give its path, as {root / tables[0]}" if tables else ""
        raise ValueError(
            f"config.data.path={path!r} and its folders hold no videos ({', '.join(sorted(VIDEO_ENDINGS))}){told}"
        )
    if others:
        logging.warning("%s: %d files are no videos and are left out", root, len(others))
    return found


def _read_csv(file: pathlib.Path, path: str) -> tuple[list[str], list[float]]:
    """Names of the videos, and their motion scores, if there are any."""
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as lines:
        rows = csv.DictReader(lines)
        columns = rows.fieldnames or ()
        kind = _WEBVID if set(_WEBVID) <= set(columns) else _OPENVID if set(_OPENVID) <= set(columns) else None
        if kind is None:
            raise ValueError(
                f"config.data.path={path!r} has the columns {', '.join(columns) or '(none)'}; needed are videoid and page_dir "
                "(WebVid) or video (OpenVid)"
            )
        names, motion = [], []
        for number, row in enumerate(rows, 2):
            if any(not row[column] for column in kind):
                raise ValueError(f"{file}, line {number}: {' and '.join(kind)} must not be empty")
            names.append(f"{row['page_dir']}/{row['videoid']}.mp4" if kind is _WEBVID else row["video"])
            if MOTION in columns:
                motion.append(_number(row[MOTION], f"{file}, line {number}: {MOTION}"))
    if not names:
        raise ValueError(f"config.data.path={path!r} lists no videos")
    return names, motion


def _number(text: str | None, where: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {text!r}, not a number") from None


@contextmanager
def _opened(path: str) -> Iterator[tuple]:
    """(container, video stream); whatever FFmpeg finds wrong within is UndecodableImage."""
    import av  # its libraries take a moment to load, and only videos need them

    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise UndecodableImage("no video in it")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the loader has threads of its own
            yield container, stream
    except OSError:
        raise  # not there, or not to be read
    except (av.FFmpegError, ValueError, ArithmeticError, MemoryError) as error:
        raise UndecodableImage(f"{type(error).__name__}: {error}") from error


def _length(container, stream, rate) -> int:
    """How many frames a video has, by its header or by its duration. Raises UndecodableImage if it does not say."""
    if stream.frames:
        return stream.frames
    seconds = 0.0
    if stream.duration:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration:
        seconds = container.duration / 1e6
    if not rate or seconds <= 0:
        raise UndecodableImage("no duration")
    return int(seconds * float(rate) + 0.5)


def _frames(container, stream, rate, wanted: list[int]) -> list[np.ndarray]:
    """The frames of these ascending numbers, by their time stamps; of one that is missing, the next that there is."""
    begin = stream.start_time or 0
    if not rate:
        raise UndecodableImage("no frame rate")
    if wanted[0]:
        container.seek(begin + int(wanted[0] / rate / stream.time_base), stream=stream)  # to a key frame before it
    found: list[np.ndarray] = []
    for frame in container.decode(stream):
        if frame.pts is None:
            raise UndecodableImage("frames without time stamps")
        number = round((frame.pts - begin) * stream.time_base * rate)
        if number < wanted[len(found)]:
            continue
        pixels = frame.to_ndarray(format="rgb24")
        while len(found) < len(wanted) and wanted[len(found)] <= number:
            found.append(pixels)
        if len(found) == len(wanted):
            return found
    raise UndecodableImage(f"it ends before frame {wanted[len(found)]}")
