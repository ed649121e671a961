"""What a reader is: it lists the input files of a source, and yields the images of one input in file order.

A candidate's identity is (input, row): keys repeat within collections. Names of columns and JSON fields are those of LAION,
COYO, img2dataset and Hugging Face data sets, in any case.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, BinaryIO, ClassVar

from lumos_jax.data import storage
from lumos_jax.data.base import CorruptRecord
from lumos_jax.data.captions import decode_text, one_line
from lumos_jax.preparation.scan_rows import NO_CAPTION, SCORES
from lumos_jax.preparation.settings import Source

READERS: dict[str, Reader] = {}
NAMES = {
    "url": ("url", "image_url"),
    "caption": ("caption", "text", "txt", "prompt"),
    "detailed": ("detailed", "caption_detailed", "caption/detailed", "long_caption"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2"),
    "watermark": ("pwatermark", "watermark", "watermark_score"),
    "unsafe": ("punsafe", "unsafe", "nsfw_score_opennsfw2"),
    "similarity": ("similarity", "clip_similarity_vitb32"),
}
COLUMNS = frozenset(name for names in NAMES.values() for name in names)
_BLOCK, _BLOCKS_AHEAD = 8 << 20, 4  # of remote files


class DamagedInput(Exception):
    """An input file cannot be read to its end; the message says why. It is listed, and none of its images are kept."""


@dataclasses.dataclass(frozen=True)
class Input:
    """A file to read, or a slice of a directory's files.

    Attributes:
      source: label of the source.
      etag: changes when the file does.
      metadata: a file with scores or captions for this one; None where there is none.
      part: the slice's first and last file name.
    """

    number: int
    source: str
    kind: str
    path: str
    bytes: int
    etag: str
    metadata: str | None = None
    part: tuple[str, str] | None = None


@dataclasses.dataclass(slots=True)
class Candidate:
    """An image and what is known about it. Captions and scores that stand later in the file are added afterwards."""

    row: int
    key: str
    data: bytes | None
    offset: int = -1
    url: str = ""
    caption: str = ""
    detailed: str = ""
    caption_offset: int = -1
    caption_size: int = 0
    caption_kind: int = NO_CAPTION
    scores: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, fields: Mapping[str, Any]) -> None:
        """Takes over what is known by any of the usual names, unless it is known already."""
        lower = {name.lower(): value for name, value in fields.items() if isinstance(name, str)}
        for name in ("url", "caption", "detailed"):
            found = next((lower[n] for n in NAMES[name] if isinstance(lower.get(n), str)), "")
            if found and not getattr(self, name):
                setattr(self, name, one_line(found))
        for name in SCORES:
            value = next((lower[n] for n in NAMES[name] if lower.get(n) is not None), None)
            if name not in self.scores and isinstance(value, (int, float)) and math.isfinite(value):
                self.scores[name] = float(value)


class Reader(abc.ABC):
    """One kind of source. patterns: of its files below a directory."""

    patterns: ClassVar[tuple[str, ...]]

    def list(self, source: Source, task_bytes: int) -> list[Input]:
        """The inputs, numbered from 0. Raises ValueError: none, or shards are missing; OSError: storage fails."""
        entries = list_entries(source, self.patterns)
        check_complete([entry.path for entry in entries])
        return [
            Input(number, source.label, source.kind, entry.path, entry.size, entry.etag)
            for number, entry in enumerate(entries)
        ]

    def etag(self, given: Input) -> str:
        """What the input's etag is now. Raises OSError: it is gone."""
        return storage.stat(given.path).etag

    @abc.abstractmethod
    def read(self, given: Input) -> Iterator[Candidate]:
        """The images in file order. Raises DamagedInput, OSError."""

    def images(self, given: Input, places: Sequence[tuple[int, int, int]]) -> Iterator[bytes]:
        """The encoded images of (row, offset, bytes) each, rows ascending, as a scan found them."""
        wanted = iter(places)
        row = next(wanted, None)
        for candidate in self.read(given):
            if row is None:
                return
            data, candidate.data = candidate.data, None  # the reader may hold the candidate for what comes later
            if candidate.row == row[0]:
                yield data
                row = next(wanted, None)
        if row is not None:
            raise DamagedInput(f"it has no image {row[0]} now")


def register(*kinds: str) -> Callable[[type[Reader]], type[Reader]]:
    def add(cls: type[Reader]) -> type[Reader]:
        READERS.update(dict.fromkeys(kinds, cls()))
        return cls

    return add


def list_entries(source: Source, patterns: Sequence[str]) -> list[storage.Entry]:
    """Raises ValueError: nothing there."""
    try:
        entries = storage.list_files(source.path, *patterns)
    except FileNotFoundError:
        entries = []
    if not entries:
        raise ValueError(
            f"source {source.label}: no {' or '.join(patterns)} at {source.path!r}, which is searched for kind={source.kind}"
        )
    return entries


def check_complete(paths: Iterable[str]) -> None:
    """Raises ValueError: of shards NAME-00000-of-00005 some are missing."""
    sets: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
    for path in paths:
        if found := re.search(r"(.*)-(\d{5,})-of-(\d{5,})", path):
            sets[found[1], found[3]].add(int(found[2]))
    for (stem, count), numbers in sets.items():
        if missing := sorted(set(range(int(count))) - numbers):
            raise ValueError(
                f"{stem}-{missing[0]:05d}-of-{count} is missing ({len(missing)} of {int(count)} shards are): fetch it again"
            )


def parse_json(data: bytes) -> dict[str, Any]:
    """An object, {} for anything else."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def text_of(data: bytes) -> str:
    """A text on one line, "" for what is none."""
    try:
        return decode_text(data)
    except CorruptRecord:
        return ""


def open_sequential(path: str) -> BinaryIO:
    """A file that is read from its beginning to its end; of a remote one, blocks are fetched ahead. Raises OSError."""
    if storage.is_remote(path):
        return io.BufferedReader(_Ahead(path), 1 << 20)
    return io.BufferedReader(storage.open_read(path).detach(), 1 << 20)


class _Ahead(storage.RemoteFile):
    """A remote file whose next blocks are under way while one is read; seeking forward skips within them."""

    def __init__(self, path: str):
        super().__init__(storage.stat(path))
        self._pool, self._blocks = futures.ThreadPoolExecutor(_BLOCKS_AHEAD), {}

    def read_at(self, offset: int, size: int) -> bytes:
        number, within = divmod(offset, _BLOCK)
        self._blocks = {n: block for n, block in self._blocks.items() if n >= number}
        for n in range(number, min(number + _BLOCKS_AHEAD, -(-self.entry.size // _BLOCK))):
            if n not in self._blocks:
                self._blocks[n] = self._pool.submit(storage.read, self.entry.path, n * _BLOCK, _BLOCK)
        return self._blocks[number].result()[within : within + size] if size else b""

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()


@functools.lru_cache(maxsize=4)
def read_table(path: str) -> Any:
    """A small parquet file's columns of the usual names, and `key`, as a pyarrow.Table. Raises DamagedInput, OSError."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with storage.open_read(path) as file:
            opened = parquet.ParquetFile(file)
            names = [name for name in opened.schema_arrow.names if name.lower() in COLUMNS or name == "key"]
            return opened.read(columns=names)
    except pa.ArrowInvalid as error:
        raise DamagedInput(f"{path} is no parquet file, or a damaged one ({error})") from error
