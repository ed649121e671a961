"""ArrayRecord shards: many records in one file, read at random.

On disk the array_record library reads them, and no more than a share of the open files that the system allows is used, however
many shards there are. From a URL each group of records is one ranged read (`riegeli`), and a shard's index, read once, is kept
below $LUMOS_JAX_CACHE.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import os
import resource
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lumos_jax import fileio
from lumos_jax.data import riegeli, storage
from lumos_jax.data.base import CorruptRecord, Fetched, digest, fetched, locate, printable
from lumos_jax.data.files import made_once, system_error

_ERRORS = (ValueError, RuntimeError, OSError, IndexError)  # what ArrayRecord raises, of full disks and open files too
_RANDOM_ACCESS = "readahead_buffer_size:0"
# Its index stays on disk: 3 kB a shard in place of 99 kB, with 9,500 records, and 230 us a read in place of 35 (an open takes
# 180 us in place of 550).
_SMALL = f"{_RANDOM_ACCESS},index_storage_option:offloaded,footer_prefetch_bytes:0"
_MANY = 1000  # shards
_INDICES = 2000  # of remote shards in memory, each 4 or 8 bytes a record


class Shards:
    """The records of some shards, one shard after the other: of each `counts` records, after the first `skips` (none: 0).

    sizes: bytes of each shard, if they are known; those behind a URL are asked for otherwise.
    """

    def __init__(
        self, paths: Sequence[str], counts: Sequence[int], skips: Sequence[int] = (), sizes: Sequence[int] = ()
    ):
        self.paths, self.ends = list(paths), list(itertools.accumulate(map(int, counts)))
        self._skips, self._sizes = list(skips), list(map(int, sizes))
        self._number = next(_numbers)
        self._fetched: Mapping[int, bytes | OSError] = {}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> bytes:
        """Raises CorruptRecord, or OSError if the system is at fault."""
        shard, number = self._locate(index)
        path = self.paths[shard]
        try:
            if storage.is_remote(path):
                return self._remote(index, shard, number)
            options = _SMALL if len(self.paths) > _MANY else _RANDOM_ACCESS
            record = _reader(self._number, path, options).read([number])[0]
            if not record:  # what the library returns of a file that has become shorter
                raise ValueError("an empty record")
            return record
        except _ERRORS as error:
            _drop(self._number, path)  # a reader that has failed stays so
            raise system_error(error) or CorruptRecord(f"shard damaged: {error}") from error

    def ahead(self, indices: Iterable[int]) -> Shards:
        """These shards with some records in memory, if they are remote: fetched with many requests in flight."""
        places = {index: self._locate(index) for index in indices}
        places = {index: place for index, place in places.items() if storage.is_remote(self.paths[place[0]])}
        if not places:
            return self
        needed = sorted({shard for shard, _ in places.values()})
        indexed = dict(zip(needed, storage.in_parallel(self._index_or_error, needed), strict=True))
        ranges = {}
        for index, (shard, number) in places.items():
            if isinstance(indexed[shard], riegeli.Index) and number < indexed[shard].records:
                ranges[index] = (self.paths[shard], *indexed[shard].place(number)[:2])
        found = copy.copy(self)
        found._fetched = dict(zip(ranges, storage.read_many(list(ranges.values())), strict=True))
        return found

    def describe(self, index: int) -> str:
        shard, number = self._locate(index)
        return f"{printable(self.paths[shard])}#{number}"

    def _locate(self, index: int) -> tuple[int, int]:
        """A record's shard, and its number there."""
        shard, number = locate(self.ends, index)
        return shard, number + (self._skips[shard] if self._skips else 0)

    def _remote(self, index: int, shard: int, number: int) -> bytes:
        offset, size, within = self._index(shard).place(number)
        data = self._fetched.get(index)
        if isinstance(data, OSError):
            raise data
        if data is None:
            data = storage.read(self.paths[shard], offset, size)
        try:
            return riegeli.records_of(data, offset)[within]
        except ValueError:
            with _lock:  # another shard may have taken its place
                _indices.pop(self.paths[shard], None)
            raise

    def _index(self, shard: int) -> riegeli.Index:
        path = self.paths[shard]
        with _lock:
            if path in _indices:
                _indices.move_to_end(path)
                return _indices[path]
        found = remote_index(path, (self._sizes and self._sizes[shard]) or storage.stat(path).size)
        with _lock:
            _indices[path] = found
            if len(_indices) > _INDICES:
                _indices.popitem(last=False)
        return found

    def _index_or_error(self, shard: int) -> riegeli.Index | Exception:
        try:
            return self._index(shard)
        except (ValueError, OSError) as error:  # raised again where the record is read
            return error


class InShards:
    """Of a source whose records are those of `shards`, from record `first` on."""

    shards: Shards
    first = 0

    def __len__(self) -> int:
        return len(self.shards)

    def record(self, index: int) -> bytes:
        return self.shards[self.first + index]

    def describe(self, index: int) -> str:
        return self.shards.describe(self.first + index)

    def fetch(self, images: Sequence[int], captions: Sequence[int] = ()) -> Fetched:
        found = copy.copy(self)
        found.shards = self.shards.ahead(self.first + index for index in {*images, *captions})
        return fetched(found, images, captions)


_lock = threading.Lock()
_numbers = itertools.count()  # a file may be replaced between two Shards of its path
_readers: collections.OrderedDict[tuple[int, str], Any] = collections.OrderedDict()  # the last used is the last
_indices: collections.OrderedDict[str, riegeli.Index] = collections.OrderedDict()


def _reader(number: int, path: str, options: str) -> Any:
    """An open shard. One that is dropped from the table is closed when the last thread that reads it lets go of it."""
    with _lock:
        key = number, path
        if key not in _readers:
            # Looked up each time: a program may raise its limit after it has begun.
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            while len(_readers) >= max(8, (limit if limit > 0 else 1 << 20) // 4):
                _readers.popitem(last=False)
            _readers[key] = _open(path, options, file_reader_buffer_size=32768)
        _readers.move_to_end(key)
        return _readers[key]


def _drop(number: int, path: str) -> None:
    with _lock:
        _readers.pop((number, path), None)


def _open(path: str, options: str = "", **more: int) -> Any:
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(path, options, **more)


def remote_index(path: str, size: int) -> riegeli.Index:
    """The index of a shard behind a URL; kept below $LUMOS_JAX_CACHE. Raises as `riegeli.read_index`."""

    def read() -> dict[str, np.ndarray]:
        index = riegeli.read_index(path, size)
        small = index.offsets.astype(np.uint32) if int(index.offsets[-1]) < 1 << 32 else index.offsets
        return {"offsets": small, "about": np.array([index.group_size, index.records], np.int64)}

    folder, name = fileio.cache_directory("arrayrecord"), digest([path, size])
    found = made_once(folder and folder / name[:2] / f"{name}.npz", ("offsets", "about"), read)
    return riegeli.Index(found["offsets"], *map(int, found["about"]))


def count_records(path: str, size: int | None = None) -> int:
    """Records in a shard; this reads its index, which stands at the end, and so finds a truncated one.
    Raises ValueError: no such shard, or it is truncated or something else. Raises OSError: the system is at fault."""

    def count() -> int:
        if storage.is_remote(path):
            return remote_index(path, storage.stat(path).size if size is None else size).records
        try:
            with contextlib.closing(_open(path, _SMALL)) as reader:
                return reader.num_records()
        except _ERRORS as error:
            raise system_error(error) or error from error

    try:
        return fileio.with_retries(count)
    except _ERRORS as error:
        raise system_error(error) or ValueError(
            f"{printable(path)} cannot be read as ArrayRecord: truncated, or something else ({error}). "
            "Fetch or write this shard again, or take it away"
        ) from error


def read_all(path: str) -> Iterable[bytes]:
    """The records of a shard in turn. Raises as `count_records`; CorruptRecord for damage within."""
    count = count_records(path)
    with contextlib.closing(_open(path)) as reader:
        for first in range(0, count, 64):
            try:
                yield from reader.read(list(range(first, min(first + 64, count))))
            except _ERRORS as error:
                raise system_error(error) or CorruptRecord(str(error)) from error


def write_arrayrecord(path: str | os.PathLike, records: Iterable[bytes], *, compress: bool = True) -> int:
    """Writes records (for training, each the bytes of an image file) as one ArrayRecord shard; returns how many.

    The shard appears under its name when it is complete, so that an interrupted writer leaves no truncated one.
    Raises OSError: it cannot be written; a full disk.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a group: records are read in random order, and a group is decompressed as a whole.
    options, count = "group_size:1" if compress else "group_size:1,uncompressed", 0
    with fileio.replacing(path) as partial:
        writer = ArrayRecordWriter(os.fspath(partial), options)
        try:
            for record in records:
                _on_disk(writer.write, record)
                count += 1
        except BaseException:
            with contextlib.suppress(OSError):
                _on_disk(writer.close)
            raise
        _on_disk(writer.close)
    return count


def _on_disk(call: Callable, *arguments: Any) -> None:
    try:
        call(*arguments)
    except RuntimeError as error:  # ArrayRecord's, of a full disk too
        raise OSError(str(error)) from error
