"""What a source of records is, and the registry of sources.

A source gives random access to records by number. What it knows besides an image is told by the classes that it inherits from:
HasCaptions, HasLabels, HasClips, HasViews. `config.data.source` names an entry of SOURCES; a new source is a file in sources/.
"""

from __future__ import annotations

import abc
import bisect
import dataclasses
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np

Data = Any  # config.Data. Not imported: the settings' rules read the registries of this package
Captions = tuple[str, str]  # (raw, detailed), either of which may be empty
SOURCES: dict[str, type[Source]] = {}


class CorruptRecord(Exception):
    """A record is damaged; the message says why. It is counted and named, and has weight 0."""


class TombstonedRecord(CorruptRecord):
    """A record was taken out of a prepared data set. It keeps its number, has weight 0, and is no fault."""


class Part(NamedTuple):
    """A source of a mixture: the number of its first record in the mixture, and its weight."""

    first: int
    source: Source
    weight: float


class Fetched(NamedTuple):
    """Record number -> encoded image or pixels, and -> captions; an exception stands in the place of what cannot be read."""

    images: dict[int, bytes | np.ndarray | Exception]
    captions: dict[int, Captions | Exception]


class Source(abc.ABC):
    """Random access to `len(source)` records; picklable, since worker processes open files of their own.

    needs: the field of config.data without which the source cannot be opened.
    in_mixture: whether it may be a part of a mixture.
    remote: whether reads wait for a network; then the loader takes whole batches by `fetch`.
    """

    registry: ClassVar[dict[str, type]] = SOURCES
    needs: ClassVar[str] = ""
    in_mixture: ClassVar[bool] = True
    remote: bool = False

    @classmethod
    def open(cls, data: Data) -> Source:
        """The source that config.data describes. Raises ValueError: nothing there, or not readable; says what to do."""
        return cls(data.path)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, index: int) -> bytes | np.ndarray:
        """An encoded image, or its pixels (H, W, 3) uint8. Raises OSError or CorruptRecord if it cannot be read."""

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """A name for messages: the file, or the shard and the place in it. Always printable."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A hash of what decides content and order: names, sizes, counts; behind a dash, if there is one, that of a sample of
        the content, which runs of older versions did not record (`same_fingerprint`)."""

    def open_image(self, index: int) -> BinaryIO:
        """An encoded image as a file, of which the beginning will be read. Raises as `read`."""
        return io.BytesIO(self.read(index))

    def fetch(self, images: Sequence[int], captions: Sequence[int] = ()) -> Fetched:
        """The images of some records and the captions of others, as `read` and `captions` give them, with many reads in
        flight. Batches of remote sources are fetched so, and decoded then."""
        return fetched(self, images, captions)

    def sizes(self, records: np.ndarray) -> np.ndarray | None:
        """(height, width) of the images of records (N,): int (N, 2), if they are known without reading them."""
        return None

    @property
    def parts(self) -> Sequence[Part]:
        """The sources of a mixture; of any other source, itself."""
        return (Part(0, self, 1.0),)


def fetched(source: Any, images: Sequence[int], captions: Sequence[int]) -> Fetched:
    """What `source.read` and `source.captions` give of records, one after the other."""

    def value_or_error(read: Callable[[int], Any], index: int) -> Any:
        try:
            return read(index)
        except (MemoryError, ImportError):  # of the machine and of its installation
            raise
        except Exception as error:  # noqa: BLE001
            return error

    found = {index: value_or_error(source.read, index) for index in images}
    return Fetched(found, {index: value_or_error(source.captions, index) for index in captions})


class HasCaptions(abc.ABC):
    @abc.abstractmethod
    def captions(self, index: int) -> Captions:
        """(raw, detailed). Raises OSError or CorruptRecord for a record that has none."""


class HasLabels(abc.ABC):
    """Records belong to classes. Both raise ValueError where these records have none."""

    @property
    @abc.abstractmethod
    def classes(self) -> Sequence[str]:
        """The names of the classes."""

    @abc.abstractmethod
    def label(self, index: int) -> int:
        """A record's class, a number from 0."""


class HasViews(abc.ABC):
    @abc.abstractmethod
    def posed_views(self, index: int, rng: np.random.Generator, count: int) -> list[tuple[Any, np.ndarray]]:
        """`count` different views, chosen at random: (as `read` gives an image, world-to-camera matrix (3, 4) float64).
        Raises CorruptRecord or OSError: fewer views than that, or one that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """frames: F images (H, W, 3) uint8. fps: of the clip. motion: its motion score; None to measure it."""

    frames: Sequence[np.ndarray]
    fps: float
    motion: float | None


class HasClips(abc.ABC):
    clip_frames: ClassVar[int | None] = None  # frames of every video of the source, if they all have the same

    @abc.abstractmethod
    def clip(self, index: int, frames: int, stride: int, share: float, size: int) -> Clip:
        """`frames` frames of a video, every `stride`-th; see config.data.clips.

        share: where the clip begins, 0 .. 1 (exclusive) of the places where it can.
        size: side of the square that the images will be cut to; what is smaller on disk may stay so.
        Raises CorruptRecord or OSError: it cannot be decoded, or is shorter than that.
        """


def start_of(share: float, total: int, frames: int, stride: int) -> int:
    """The first frame of a clip in a video of `total` frames. Raises CorruptRecord if the video is too short."""
    room = total - ((frames - 1) * stride + 1)
    if room < 0:
        raise CorruptRecord(f"{total} frames are too few for {frames} with a stride of {stride}")
    return int(share * (room + 1))


def register(name: str) -> Callable[[type], type]:
    """Decorator: makes a source the value `name` of config.data.source, or a loader that of config.data.sample_type."""

    def add(cls: type) -> type:
        cls.registry[name] = cls
        return cls

    return add


def make_source(data: Data) -> Source:
    """The source that config.data names. Raises ValueError: nothing there, or not readable; says what to do."""
    return chosen(SOURCES, "source", data.source).open(data)


def chosen(registry: dict[str, type], field: str, name: str) -> type:
    """What config.data names in that field. Raises ValueError: nothing."""
    if name not in registry:
        raise ValueError(f"config.data.{field}={name!r} is not one of {', '.join(sorted(registry))}")
    return registry[name]


def locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """A number in sequences that stand one after the other, and end there -> (which sequence, the number in it)."""
    which = bisect.bisect_right(ends, index)
    return which, index - (ends[which - 1] if which else 0)


def digest(parts: Iterable[Any]) -> str:
    """A short hash, the same in every process."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(f"{part}\n".encode(errors="surrogateescape"))
    return state.hexdigest()


def same_fingerprint(before: str, now: str) -> bool:
    """Whether two fingerprints are of the same data; one without a hash of content says nothing of it."""
    (names, _, content), (other_names, _, other_content) = before.partition("-"), now.partition("-")
    return names == other_names and (content == other_content or "" in (content, other_content))


def joint_fingerprint(fingerprints: Iterable[str], weights: Iterable[float]) -> str:
    """Of several sources and their weights."""
    parts, weights = [fingerprint.partition("-") for fingerprint in fingerprints], list(weights)
    names = digest(zip((names for names, _, _ in parts), weights, strict=True))
    contents = [content for _, _, content in parts]
    return f"{names}-{digest(contents)}" if any(contents) else names


def printable(name: str) -> str:
    """A file name for messages: bytes that are no UTF-8 are written as escapes, so that any terminal can show it."""
    return os.fsencode(name).decode(errors="backslashreplace")
