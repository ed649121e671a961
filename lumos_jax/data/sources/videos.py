"""Video files, by WebVid's or OpenVid's csv or from a folder, decoded with PyAV (FFmpeg).

Frames are numbered by their time stamps and the frame rate. What a container says of its length and where a seek lands are
checked against the packets and frames themselves.
"""

from __future__ import annotations

import csv
import errno
import importlib.util
import math
import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from lumos_jax.data.base import Clip, CorruptRecord, Data, HasClips, digest, register, start_of
from lumos_jax.data.captions import open_text
from lumos_jax.data.files import FilesSource, Names, file_size, files_below, open_regular

VIDEO_ENDINGS = frozenset((".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"))
PACKAGES = {"av": "PyAV", "cv2": "OpenCV"}  # to decode videos, and to measure how much moves in a clip
MOTION = "motion score"  # OpenVid's column
# Columns that say where a video lies, of WebVid and of OpenVid, and how.
_PLACES = {("videoid", "page_dir"): "{page_dir}/{videoid}.mp4", ("video",): "{video}"}
_BACK = (0, 1, 4, 16)  # seconds before the wanted frame to which a seek goes, until one lands early enough


@register("videos")
class VideosSource(FilesSource, HasClips):
    """Videos of a csv, in its order, or every video file below a directory, by sorted relative name.

    The videos of a csv lie beside it or in a folder `videos` there: WebVid's as <page_dir>/<videoid>.mp4, OpenVid's as the
    column `video` names them. A row whose file is absent is a record that cannot be read, as is a file that is no video.
    OpenVid's column "motion score" is taken as the clips' motion; it is in units of its own.
    Raises ValueError: nothing there, no videos, or a csv of other columns or with a motion score that is no finite number.
    """

    def __init__(self, path: str):
        given = pathlib.Path(path).expanduser().absolute()
        motion: list[float] = []
        if given.is_dir():
            self.root, names = given, sorted(_videos_below(given, path))
            self._content = digest((name, file_size(given / name)) for name in names)
        elif given.is_file():
            beside = given.parent / "videos"
            self.root = beside if beside.is_dir() else given.parent
            names, motion = _read_csv(given, path)
            self._content = digest((*names, *motion))
        else:
            raise ValueError(f"config.data.path={path!r} is neither a directory nor a csv file")
        self.names, self.motion = Names(names), np.array(motion, np.float32)

    @classmethod
    def open(cls, data: Data) -> VideosSource:
        missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise ValueError(f"config.data.source=videos needs {' and '.join(missing)}: pip install '.[video]'")
        return cls(data.path)

    def read(self, index: int) -> np.ndarray:
        """The video's first frame, where images are asked for."""
        return self.clip(index, 1, 1, 0.0, 0).frames[0]

    def clip(self, index: int, frames: int, stride: int, share: float, size: int) -> Clip:
        path = self.path(index)
        with _opened(path) as video:
            stated, rate = _stated_length(video), video.rate

        def images(total: int) -> list[np.ndarray]:
            start = start_of(share, total, frames, stride)
            return _frames(path, [start + i * stride for i in range(frames)])

        try:
            found = images(stated or _measured_length(path))
        except _EndsEarly:
            if not stated:
                raise
            found = images(_measured_length(path))  # the header promised too much
        return Clip(found, float(rate) / stride, float(self.motion[index]) if len(self.motion) else None)

    def fingerprint(self) -> str:
        return self._content


def _videos_below(root: pathlib.Path, path: str) -> list[str]:
    files = [os.path.relpath(name, root) for name in files_below(root)]
    found = [name for name in files if os.path.splitext(name)[1].lower() in VIDEO_ENDINGS]
    if not found:
        tables = sorted(name for name in files if name.endswith(".csv"))
        hint = f"; to read the videos that a csv lists, give its path, as {root / tables[0]}" if tables else ""
        raise ValueError(
            f"config.data.path={path!r} and its folders hold no videos ({', '.join(sorted(VIDEO_ENDINGS))}){hint}"
        )
    if len(files) > len(found):
        logging.warning("%s: %d files are no videos and are left out", root, len(files) - len(found))
    return found


def _read_csv(file: pathlib.Path, path: str) -> tuple[list[str], list[float]]:
    """Names of the videos, and their motion scores, if there are any."""
    names, motion, number = [], [], 1
    with open_text(file, "surrogateescape", newline="") as lines:
        try:
            rows = csv.DictReader(lines)
            columns = rows.fieldnames or ()
            needed = next((needed for needed in _PLACES if set(needed) <= set(columns)), None)
            if needed is None:
                raise ValueError(
                    f"config.data.path={path!r} has the columns {', '.join(columns) or '(none)'}; needed are videoid and "
                    "page_dir (WebVid) or video (OpenVid)"
                )
            for number, row in enumerate(rows, 2):
                if not all(row[column] for column in needed):
                    raise ValueError(f"{file}, line {number}: {' and '.join(needed)} must not be empty")
                names.append(_PLACES[needed].format(**{column: row[column] for column in needed}))
                if MOTION in columns:
                    motion.append(_number(row[MOTION], f"{file}, line {number}: {MOTION}"))
        except csv.Error as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    if not names:
        raise ValueError(f"config.data.path={path!r} lists no videos")
    return names, motion


def _number(text: str | None, where: str) -> float:
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):  # false of NaN too
        raise ValueError(f"{where} is {text!r}, not a number that is finite in float32")
    return number


class _Video(NamedTuple):
    """An open file: PyAV's container and stream, the frame rate, and the time stamp of frame 0."""

    container: Any
    stream: Any
    rate: Any
    begin: int

    def number(self, timestamp: int) -> int:
        """Which frame that is."""
        return round((timestamp - self.begin) * self.stream.time_base * self.rate)


class _EndsEarly(CorruptRecord):
    """The video has no frame of that number."""


@contextmanager
def _opened(path: str) -> Iterator[_Video]:
    """Whatever FFmpeg finds wrong within is a CorruptRecord."""
    import av  # its libraries take a moment to load, and only videos need them

    open_regular(path).close()  # what the system has against the file, it says here
    try:
        # A file must not make FFmpeg wait for another one, or for the network.
        with av.open(path, options={"protocol_whitelist": "file"}) as container:
            cover = av.stream.Disposition.attached_pic
            stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
            if stream is None:
                raise CorruptRecord("no video in it")
            if stream.codec_context is None:
                raise CorruptRecord("FFmpeg has no decoder for its codec")
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise CorruptRecord("no frame rate")
            stream.codec_context.thread_count = 1  # the loader has threads of its own
            yield _Video(container, stream, rate, stream.start_time or 0)
    except av.FFmpegError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise OSError(error.errno, os.strerror(error.errno)) from error
        with open_regular(path) as file:  # FFmpeg's errors do not tell a failing disk from a damaged file; this does
            while file.read(1 << 20):
                pass
        raise CorruptRecord(f"{type(error).__name__}: {error}") from error


def _stated_length(video: _Video) -> int:
    """How many frames the video has, as its stream says; 0 if it does not. What a container says, it says of sound too."""
    stream = video.stream
    if stream.frames or not stream.duration:
        return stream.frames
    return int(float(stream.duration * stream.time_base) * float(video.rate) + 0.5)


def _measured_length(path: str) -> int:
    """How many frames the video has, by the packets at its end, or by all of them where a seek finds no end."""
    import av

    for seek in (True, False):
        with _opened(path) as video:
            if seek:
                try:
                    video.container.seek((video.container.start_time or 0) + (video.container.duration or 0))
                except av.FFmpegError:
                    continue
            stamps = [packet.pts for packet in video.container.demux(video.stream) if packet.pts is not None]
            if stamps:
                return video.number(max(stamps)) + 1
    raise CorruptRecord("no frames with time stamps")


def _frames(path: str, wanted: list[int]) -> list[np.ndarray]:
    """The frames of these ascending numbers; of one that is missing, the next that there is."""
    import av

    with _opened(path) as video:
        for back in _BACK:
            time = wanted[0] / video.rate - back
            if time <= 0:
                break
            try:  # to a key frame before it, if the container knows where they are
                video.container.seek(video.begin + int(time / video.stream.time_base), stream=video.stream)
            except av.FFmpegError:
                break
            found = _decode(video, wanted, whole=False)
            if found is not None:
                return found
    with _opened(path) as video:
        return _decode(video, wanted, whole=True)


def _decode(video: _Video, wanted: list[int], *, whole: bool) -> list[np.ndarray] | None:
    """The frames from where the file stands, which is the beginning if `whole`; None if the first wanted one is before that."""
    found: list[np.ndarray] = []
    early = whole
    for frame in video.container.decode(video.stream):
        if frame.pts is None:
            raise CorruptRecord("frames without time stamps")
        number = video.number(frame.pts)
        early = early or number <= wanted[0]
        if number < wanted[len(found)]:
            continue
        if not early or (frame.is_corrupt and not whole):
            return None
        if frame.is_corrupt:
            raise CorruptRecord(f"frame {number} is damaged")
        found += [frame.to_ndarray(format="rgb24")] * sum(number >= place for place in wanted[len(found) :])
        if len(found) == len(wanted):
            return found
    if whole or found:
        raise _EndsEarly(f"it ends before frame {wanted[len(found)]}")
    return None
