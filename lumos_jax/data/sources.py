"""Sources: records by number. `read` gives bytes or pixels, `describe` a name for people, `fingerprint` what decides the order.

Sources are picklable (worker processes open their own files) and hold no more than names.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import os
import pathlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from lumos_jax import config

IMAGE_ENDINGS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))


class Source(Protocol):
    """Random access to `len(source)` records."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | np.ndarray:
        """An encoded image, or its pixels (S, S, 3) uint8 at the size in use. Raises OSError if it cannot be read."""
        ...

    def describe(self, index: int) -> str:
        """A name for messages."""
        ...

    def fingerprint(self) -> str:
        """A hash of what decides content and order: names, sizes, counts."""
        ...


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(f"{part}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


class FolderSource:
    """Every image file below a directory, by sorted relative name. Files with other endings are ignored."""

    def __init__(self, path: str):
        self.root = pathlib.Path(path).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"config.data.path={path!r} is not a directory")
        found = []
        for directory, folders, names in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_ENDINGS:
                    found.append(os.path.relpath(os.path.join(directory, name), self.root))
        self.names = sorted(found)
        if not self.names:
            raise ValueError(
                f"config.data.path={path!r} holds no images: no file ends in {', '.join(sorted(IMAGE_ENDINGS))}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        with open(self.root / self.names[index], "rb") as file:
            return file.read()

    def describe(self, index: int) -> str:
        return str(self.root / self.names[index])

    def fingerprint(self) -> str:
        return _digest((name, os.stat(self.root / name).st_size) for name in self.names)


class ArrayRecordSource:
    """ArrayRecord shards whose records are encoded images (a JPEG, PNG or WebP file's bytes each)."""

    def __init__(self, path: str):
        given = pathlib.Path(path).expanduser()
        if given.is_dir():
            paths = sorted(str(p) for p in given.iterdir() if "array_record" in p.name or p.suffix == ".arrayrecord")
        else:
            paths = sorted(glob.glob(str(given)))
        if not paths:
            raise ValueError(f"config.data.path={path!r}: no ArrayRecord shards there (*.arrayrecord, *.array_record*)")
        self.paths = paths
        self._sizes = [os.path.getsize(p) for p in paths]
        self._length = len(self._records)

    @functools.cached_property
    def _records(self):
        from array_record.python import array_record_data_source

        try:
            return array_record_data_source.ArrayRecordDataSource(self.paths)
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(
                f"{self.paths[0]} ...: not readable as ArrayRecord, perhaps truncated ({error})"
            ) from error

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_records"}

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> bytes:
        try:
            return self._records[index]
        except (ValueError, RuntimeError, IndexError) as error:
            raise OSError(f"shard damaged: {error}") from error

    def describe(self, index: int) -> str:
        return f"{os.path.dirname(self.paths[0])} ({len(self.paths)} shards), record {index}"

    def fingerprint(self) -> str:
        names = (os.path.basename(p) for p in self.paths)
        return _digest([self._length, *zip(names, self._sizes, strict=True)])


def write_arrayrecord(path: str | os.PathLike, records: Iterable[bytes]) -> int:
    """Writes encoded images as one ArrayRecord shard and returns their number."""
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a group: records are read in random order, and a group is decompressed as a whole.
    writer, count = ArrayRecordWriter(os.fspath(path), "group_size:1"), 0
    try:
        for record in records:
            writer.write(record)
            count += 1
    finally:
        writer.close()
    return count


class TfdsSource:
    """Any image data set of TensorFlow Datasets, through its random-access data source; images stay encoded."""

    def __init__(self, name: str, split: str, data_dir: str):
        self.name, self.split, self.data_dir = name, split, data_dir or None
        self._length = len(self._records)

    @functools.cached_property
    def _records(self):
        import tensorflow_datasets as tfds

        what = f"config.data.name={self.name!r}, split={self.split!r}"
        try:
            builder = tfds.builder(self.name, data_dir=self.data_dir, file_format="array_record")
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise ValueError(
                f"{what}: TFDS knows no such data set in {self.data_dir or 'its default directory'}: {error}"
            ) from error
        images = [key for key, kind in builder.info.features.items() if isinstance(kind, tfds.features.Image)]
        if not images:
            raise ValueError(f"{what}: this data set has no image; it has {', '.join(builder.info.features)}")
        self._key = images[0]
        try:
            return builder.as_data_source(split=self.split, decoders={self._key: tfds.decode.SkipDecoding()})
        except (ValueError, AssertionError, NotImplementedError, FileNotFoundError) as error:
            raise ValueError(
                f"{what} is not prepared for random access ({str(error).splitlines()[0]}). Prepare it once with: "
                f"tfds build {self.name} --file_format=array_record"
                + (f" --data_dir={self.data_dir}" if self.data_dir else "")
            ) from error

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("_records", "_key")}

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> bytes | np.ndarray:
        return self._records[index][self._key]

    def describe(self, index: int) -> str:
        return f"{self.name}/{self.split}, record {index}"

    def fingerprint(self) -> str:
        info = self._records.dataset_info
        return _digest([info.full_name, self.split, self._length])


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

    def describe(self, index: int) -> str:
        which, inner = self.locate(index)
        return self.sources[which].describe(inner)

    def fingerprint(self) -> str:
        return _digest(zip((source.fingerprint() for source in self.sources), self.weights, strict=True))


def make_source(data: config.Data) -> Source:
    """The source that config.data names.

    Raises:
      ValueError: nothing there, or not readable; says what to do.
    """
    if data.source == "scenes":
        from lumos_jax.data.scenes import ScenesSource

        return ScenesSource(data.records, data.image_size)
    if data.source == "folder":
        return FolderSource(data.path)
    if data.source == "arrayrecord":
        return ArrayRecordSource(data.path)
    if data.source == "tfds":
        return TfdsSource(data.name, data.split, data.path)
    if data.source != "mixture":
        raise ValueError(f"config.data.source={data.source!r} is not one of scenes, folder, arrayrecord, tfds, mixture")
    return _make_mixture(data)


_MIXTURE_FIELDS = {"source", "path", "name", "split", "records", "weight"}


def _make_mixture(data: config.Data) -> MixtureSource:
    sources, weights = [], []
    for number, entry in enumerate(data.mixture):
        where = f"config.data.mixture[{number}]"
        fields = dict(entry)
        unknown = set(fields) - _MIXTURE_FIELDS
        if unknown:
            raise ValueError(f"{where} has unknown field(s) {sorted(unknown)}; it takes {sorted(_MIXTURE_FIELDS)}")
        weight = fields.pop("weight", None)
        if not isinstance(weight, (int, float)) or not weight > 0:
            raise ValueError(f"{where} needs weight > 0, not {weight!r}")
        if fields.get("source") in (None, "mixture"):
            raise ValueError(f"{where} needs source: scenes, folder, arrayrecord or tfds")
        sources.append(make_source(dataclasses.replace(data, mixture=(), **fields)))
        weights.append(float(weight))
    return MixtureSource(sources, weights)
