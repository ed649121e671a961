"""Sources: records by number. `read` gives bytes or pixels, `describe` a name for people, `fingerprint` what decides the order.

Sources are picklable (worker processes open their own files) and hold no more than names. ArrayRecord shards and TFDS data
sets are in `shards`, .tar shards in `tars`, video files in `videos`, the embedded scenes in `scenes`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from lumos_jax import config
from lumos_jax.data import captions

IMAGE_ENDINGS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))


class Source(Protocol):
    """Random access to `len(source)` records.

    Sources that know more of their records than a picture have methods for it: `captions(index)` gives (raw, detailed), either
    of which may be empty, and raises OSError for a record that has none; `sizes(records)` gives (height, width) of pictures
    without reading them, `file(index)` the path of one.

    Sources whose records belong to classes have `classes`, a sequence of their names, and `label(index)`, a record's class as a
    number from 0. Both raise ValueError where these records have none.
    """

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | np.ndarray:
        """An encoded image, or its pixels (H, W, 3) uint8. Raises OSError if it cannot be read."""
        ...

    def describe(self, index: int) -> str:
        """A name for messages: the file, or the shard and the place in it. Always printable."""
        ...

    def fingerprint(self) -> str:
        """A hash of what decides content and order: names, sizes, counts."""
        ...


def digest(parts: Iterable[Any]) -> str:
    """A short hash, the same in every process."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(f"{part}\n".encode(errors="surrogateescape"))
    return state.hexdigest()


def printable(name: str) -> str:
    """A file name for messages: bytes that are no UTF-8 are written as escapes, so that any terminal can show it."""
    return os.fsencode(name).decode(errors="backslashreplace")


def is_image(head: bytes) -> bool:
    """Whether a file that begins with these bytes (12 suffice) is a JPEG, PNG, WebP, GIF, BMP or TIFF file."""
    known = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
    return head.startswith(known) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


class Names:
    """A list of file names in two flat buffers: a few bytes each, and quick to hand to worker processes."""

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]])

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


_CAPTIONS = "captions.jsonl"


class FolderSource:
    """Every image file below a directory, links followed, by sorted relative name.

    A file with an image's ending is a record, whatever it holds: should it not decode, it is a corrupt record. Of files with
    other endings or none, those are records that begin as an image does; the others (labels, captions) are left out, and
    one line in the log says how many. Names that begin with a dot are left out.

    Captions: `captions.jsonl` in the directory, a line {"file": ..., "caption": ..., "detailed": ...} an image ("detailed" may
    be absent); where there is none, a.txt and, if it is there, a.detailed.txt beside a.jpg.

    Args:
      path: the directory.
      captioned: captions are read too, and count as content.

    Raises:
      ValueError: no such directory, not readable, or no images in it; captions.jsonl is damaged.
    """

    def __init__(self, path: str, captioned: bool = False):
        self.root = pathlib.Path(path).expanduser().absolute()
        if not self.root.is_dir():
            raise ValueError(f"config.data.path={path!r} is not a directory")
        found, others = [], []
        for name in files_below(self.root):
            relative = os.path.relpath(name, self.root)
            (found if _looks_like_image(name) else others).append(relative)
        self._captioned, self._told = captioned, None
        if captioned:
            others = [name for name in others if os.path.splitext(name)[1] != ".txt" and name != _CAPTIONS]
        if not found:
            there = (
                f"its {len(others)} files are of other kinds, as {printable(min(others))}" if others else "it is empty"
            )
            raise ValueError(
                f"config.data.path={path!r} holds no images: {there}. JPEG, PNG, WebP, GIF, BMP and TIFF files are read, "
                "from folders within it too"
            )
        if others:
            example = printable(min(others))
            logging.warning("%s: %d files are no images and are left out, as %s", self.root, len(others), example)
        self.names = Names(sorted(found))
        if captioned and (self.root / _CAPTIONS).exists():
            self._told = captions.read_jsonl(self.root / _CAPTIONS)

    def __len__(self) -> int:
        return len(self.names)

    def captions(self, index: int) -> captions.Captions:
        name = self.names[index]
        if self._told is not None:
            if name not in self._told:
                raise FileNotFoundError(f"{_CAPTIONS} has no line for it")
            return self._told[name]
        raw, detailed = self._caption_files(name)
        if not raw.exists() and not detailed.exists():
            raise FileNotFoundError(f"there is no {raw.name} beside it, and no {_CAPTIONS} in {printable(self.root)}")
        return tuple(captions.read_text(path) if path.exists() else "" for path in (raw, detailed))

    def _caption_files(self, name: str) -> tuple[pathlib.Path, pathlib.Path]:
        stem = self.root / os.path.splitext(name)[0]
        return stem.with_name(f"{stem.name}.txt"), stem.with_name(f"{stem.name}.detailed.txt")

    def file(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def read(self, index: int) -> bytes:
        with open(self.file(index), "rb") as file:
            return file.read()

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The folders below the directory, sorted; an image deeper down belongs to the one that it is in or under."""
        return tuple(sorted({self._class_of(index) for index in range(len(self))}))

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def label(self, index: int) -> int:
        return self._numbers[self._class_of(index)]

    def _class_of(self, index: int) -> str:
        folder, slash, _ = self.names[index].partition(os.sep)
        if not slash:
            raise ValueError(f"{self.describe(index)} is in no folder of a class: labels are the names of folders")
        return folder

    def describe(self, index: int) -> str:
        return printable(os.path.join(self.root, self.names[index]))

    def fingerprint(self) -> str:
        pictures = ((name, file_size(self.root / name)) for name in self.names)
        if not self._captioned:
            return digest(pictures)
        if self._told is not None:
            return digest([*pictures, sorted(self._told.items())])
        return digest([*pictures, *(tuple(map(file_size, self._caption_files(name))) for name in self.names)])


def files_below(root: pathlib.Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed: {error.strerror}") from error

    entered = set()
    for directory, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in entered:  # a link that leads back up, or a second way to the same files
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(directory, name) for name in names if not name.startswith("."))


def _looks_like_image(name: str) -> bool:
    if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS:
        return True
    try:
        if not os.path.isfile(name):  # a pipe or socket, which must not be opened, or a dangling link
            return False
        with open(name, "rb") as file:
            return is_image(file.read(12))
    except OSError:
        return False


def file_size(path: pathlib.Path) -> int:
    """Bytes, or -1 for a file that has gone since it was listed."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


class MixtureSource:
    """Several sources as one: records are numbered source after source; `weights` say how often each is drawn."""

    def __init__(self, sources: list[Source], weights: list[float]):
        self.sources, self.weights = sources, weights
        self._starts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Record number -> (which source, its record)."""
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return which, index - int(self._starts[which])

    def start(self, which: int) -> int:
        """The number of a source's first record."""
        return int(self._starts[which])

    def read(self, index: int) -> bytes | np.ndarray:
        which, inner = self.locate(index)
        return self.sources[which].read(inner)

    def captions(self, index: int) -> captions.Captions:
        which, inner = self.locate(index)
        return self.sources[which].captions(inner)

    @property
    def classes(self) -> Sequence[str]:
        first, *others = (tuple(source.classes) for source in self.sources)
        if any(other != first for other in others):
            raise ValueError(
                "config.data.mixture: its sources have other classes, so a label would mean several things"
            )
        return first

    def label(self, index: int) -> int:
        which, inner = self.locate(index)
        return self.sources[which].label(inner)

    def posed_views(self, index: int, draw: np.random.Generator, count: int) -> list[tuple[Any, np.ndarray]]:
        which, inner = self.locate(index)
        return self.sources[which].posed_views(inner, draw, count)

    def describe(self, index: int) -> str:
        which, inner = self.locate(index)
        return self.sources[which].describe(inner)

    def clip(self, index: int, *wanted: Any) -> Any:
        which, inner = self.locate(index)
        return self.sources[which].clip(inner, *wanted)

    def fingerprint(self) -> str:
        return digest(zip((source.fingerprint() for source in self.sources), self.weights, strict=True))


def make_source(data: config.Data) -> Source:
    """The source that config.data names.

    Raises:
      ValueError: nothing there, or not readable; says what to do.
    """
    # The imports wait: a run on scenes needs no ArrayRecord, and TFDS is slow to load.
    if data.source == "scenes":
        from lumos_jax.scenes.scene import ScenesSource

        ratios = data.bucket_ratios if data.buckets else None
        return ScenesSource(data.num_scenes, data.image_size, ratios=ratios, turn=math.radians(data.view_turn))
    if data.source == "folder":
        return FolderSource(data.path, data.sample_type == "captioned")
    if data.source == "videos":
        from lumos_jax.data.videos import VideosSource

        return VideosSource(data.path)
    if data.source == "objaverse":
        from lumos_jax.data.objaverse import ObjaverseSource

        return ObjaverseSource(data.path)
    if data.source == "arrayrecord":
        from lumos_jax.data.shards import ArrayRecordSource

        return ArrayRecordSource(data.path)
    if data.source == "webdataset":
        from lumos_jax.data.tars import TarSource

        return TarSource(data.path, data.tar_index)
    if data.source == "tfds":
        from lumos_jax.data.shards import TfdsSource

        return TfdsSource(data.name, data.split, data.path, data.sample_type == "captioned")
    if data.source == "cached":
        from lumos_jax.data.cached import open_cache

        return open_cache(data.path)
    if data.source != "mixture":
        raise ValueError(
            f"config.data.source={data.source!r} is not one of scenes, folder, videos, objaverse, arrayrecord, webdataset, "
            "tfds, cached, mixture"
        )
    return _make_mixture(data)


_MIXTURE_FIELDS = {"source", "path", "name", "split", "num_scenes", "weight"}


def _make_mixture(data: config.Data) -> MixtureSource:
    sources, weights = [], []
    for number, entry in enumerate(data.mixture):
        where = f"config.data.mixture[{number}]"
        fields = dict(entry)
        unknown = set(fields) - _MIXTURE_FIELDS
        if unknown:
            raise ValueError(f"{where} has unknown field(s) {sorted(unknown)}; it takes {sorted(_MIXTURE_FIELDS)}")
        weight = fields.pop("weight", None)
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ValueError(f"{where} needs weight, a number above 0, not {weight!r}")
        if fields.get("source") in (None, "mixture"):
            raise ValueError(
                f"{where} needs source: scenes, folder, videos, objaverse, arrayrecord, webdataset or tfds"
            )
        if fields["source"] == "cached":
            raise ValueError(
                f"{where}: a cache is no part of a mixture; cache the mixture as a whole, which keeps its order"
            )
        needed = {"tfds": "name"} | dict.fromkeys(
            ("folder", "videos", "objaverse", "arrayrecord", "webdataset"), "path"
        )
        needed = needed.get(fields["source"])
        if needed and not fields.get(needed):
            raise ValueError(f"{where}: source {fields['source']} needs {needed}")
        try:
            # Nothing is taken over from config.data itself: an entry's path and name are its own.
            own = dataclasses.replace(data, mixture=(), **{"path": "", "name": "", "split": "train", **fields})
            sources.append(make_source(own))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        weights.append(float(weight))
    return MixtureSource(sources, weights)
