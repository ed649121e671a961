"""ArrayRecord shards: many records in one file, read at random. No more than a share of the open files that the system allows
is used, however many shards there are."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import resource
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lumos_jax.data.base import CorruptRecord, locate, printable
from lumos_jax.data.files import system_error

_ERRORS = (ValueError, RuntimeError, OSError, IndexError)  # what ArrayRecord raises, of full disks and open files too


class Shards:
    """The records of some shards, one shard after the other: of each `counts` records, after the first `skips` (none: 0)."""

    def __init__(self, paths: Sequence[str], counts: Sequence[int], skips: Sequence[int] = ()):
        self.paths, self.ends = list(paths), list(itertools.accumulate(counts))
        self._skips = list(skips) or [0] * len(self.paths)
        self._number = next(_numbers)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> bytes:
        """Raises CorruptRecord, or OSError if the system is at fault."""
        shard, number = locate(self.ends, index)
        try:
            return _reader(self._number, self.paths[shard]).read([number + self._skips[shard]])[0]
        except _ERRORS as error:
            raise system_error(error) or CorruptRecord(f"shard damaged: {error}") from error

    def describe(self, index: int) -> str:
        shard, number = locate(self.ends, index)
        return f"{printable(self.paths[shard])}#{number + self._skips[shard]}"


_lock = threading.Lock()
_numbers = itertools.count()  # a file may be replaced between two Shards of its path
_readers: collections.OrderedDict[tuple[int, str], Any] = collections.OrderedDict()  # the last used is the last


def _reader(number: int, path: str) -> Any:
    """An open shard. One that is dropped from the table is closed when the last thread that reads it lets go of it."""
    with _lock:
        key = number, path
        if key not in _readers:
            _readers[key] = _open(path, "readahead_buffer_size:0", file_reader_buffer_size=32768)
            # Looked up each time: a program may raise its limit after it has begun.
            while len(_readers) > max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4):
                _readers.popitem(last=False)
        _readers.move_to_end(key)
        return _readers[key]


def _open(path: str, options: str = "", **more: int) -> Any:
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(path, options, **more)


def count_records(path: str) -> int:
    """Records in a shard; this reads its index, which stands at the end, and so finds a truncated one.
    Raises ValueError: no such shard, or it is truncated or something else. Raises OSError: the system is at fault."""
    try:
        with contextlib.closing(_open(path)) as reader:
            return reader.num_records()
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

    partial = f"{os.fspath(path)}.partial"
    # One record a group: records are read in random order, and a group is decompressed as a whole.
    writer, count = ArrayRecordWriter(partial, "group_size:1" if compress else "group_size:1,uncompressed"), 0
    try:
        for record in records:
            _on_disk(writer.write, record)
            count += 1
        _on_disk(writer.close)
    except BaseException:
        with contextlib.suppress(OSError):
            _on_disk(writer.close)
        os.unlink(partial)
        raise
    os.replace(partial, path)
    return count


def _on_disk(call: Callable, *arguments: Any) -> None:
    try:
        call(*arguments)
    except RuntimeError as error:  # ArrayRecord's, of a full disk too
        raise OSError(str(error)) from error
