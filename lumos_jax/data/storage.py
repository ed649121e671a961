"""Files on local disks and behind URLs (gs://, s3:// and whatever else fsspec opens), read and written alike.

Transient errors (429, 503, ESTALE, time-outs, lost connections) are retried with exponential back-off and jitter until a
deadline; the OSError that is raised then names the path, has an errno and is not retried again. URLs need the package of
their protocol, as `pip install '.[remote]'` installs it for gs:// and s3://. Credentials and endpoints come from the
environment (`remote`).
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fnmatch
import functools
import glob
import io
import itertools
import os
import pathlib
import random
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, BinaryIO, NamedTuple, TypeVar

from lumos_jax import fileio
from lumos_jax.data import remote
from lumos_jax.data.base import CorruptRecord
from lumos_jax.data.files import open_regular

T = TypeVar("T")
DEADLINE = 50.0  # seconds for a request and its retries
_BYTES_PER_SECOND = 1 << 20  # at least; large transfers have more than DEADLINE
_PART = 8 << 20  # bytes of a request, of files that are read from end to end
_BUFFER = 1 << 20
_GAP = 1 << 16  # bytes that are read and dropped rather than asked for in two requests
_GLOB = re.compile(r"[*?\[]")


class Entry(NamedTuple):
    """A file. etag: changes when the file does, as the store names its versions; of a local file, its time of change."""

    path: str
    size: int
    etag: str


def is_remote(path: str | os.PathLike) -> bool:
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", os.fspath(path)))


def join(base: str, *names: str) -> str:
    return "/".join((base.rstrip("/"), *names)) if is_remote(base) else os.path.join(base, *names)


def read(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """`size` bytes from `offset` on (None: all), fewer at the end of the file. Raises OSError."""
    if size == 0:
        return b""

    def local() -> bytes:
        with open_regular(path) as file:
            return file.read() if size is None and not offset else _pread(file.fileno(), offset, size)

    end = None if size is None else offset + size
    return _retried(path, local, "cat_file", size or 0, start=offset or None, end=end)


def read_many(ranges: Sequence[tuple[str, int, int | None]]) -> list[bytes | OSError]:
    """`read` of (path, offset, size) each, remote ones 64 at a time; of those, neighbors in a file are one request. An error
    stands in the place of its bytes."""

    def one(wanted: tuple[str, int, int | None]) -> bytes | OSError:
        try:
            return read(*wanted)
        except OSError as error:
            return error

    if not any(is_remote(path) for path, _, _ in ranges):
        return list(map(one, ranges))
    runs = _runs(ranges)
    found: list[bytes | OSError] = [b""] * len(ranges)
    for (_, start, _, members), data in zip(runs, in_parallel(one, [run[:3] for run in runs]), strict=True):
        for member in members:
            _, offset, size = ranges[member]
            if isinstance(data, OSError) or len(members) == 1:
                found[member] = data
            else:
                found[member] = data[offset - start : offset - start + size]
    return found


def read_fetched(place: tuple[str, int, int], fetched: Mapping[tuple[str, int, int], bytes | OSError]) -> bytes:
    """A whole (path, offset, size): what `read_many` fetched of it, or `read` now.
    Raises OSError; CorruptRecord: the file ends before."""
    data = fetched.get(place)
    if data is None:
        data = read(*place)
    if isinstance(data, OSError):
        raise data
    if len(data) < place[2]:
        raise CorruptRecord("the shard is shorter than it was")
    return data


def in_parallel(call: Callable[[Any], T], values: Sequence[Any]) -> list[T]:
    """What `call` returns for each, 64 of the process at a time; for calls that wait for storage and raise nothing."""
    return list(map(call, values)) if len(values) < 2 else list(_pool(os.getpid()).map(call, values))


def _runs(ranges: Sequence[tuple[str, int, int | None]]) -> list[tuple[str, int, int | None, list[int]]]:
    """(path, offset, size, numbers of the ranges in it): ranges that lie close to each other are one."""
    runs: list[tuple[str, int, int | None, list[int]]] = []
    for number in sorted(range(len(ranges)), key=lambda number: ranges[number][:2]):
        path, offset, size = ranges[number]
        if runs and runs[-1][0] == path and None not in (size, runs[-1][2]):
            _, start, length, members = runs[-1]
            if offset <= start + length + _GAP and offset + size - start <= _PART:
                runs[-1] = path, start, max(length, offset + size - start), [*members, number]
                continue
        runs.append((path, offset, size, [number]))
    return runs


def open_read(path: str) -> BinaryIO:
    """A seekable buffered file. Raises OSError."""
    return io.BufferedReader(RemoteFile(stat(path)), _BUFFER) if is_remote(path) else open_regular(path)


def stat(path: str) -> Entry:
    """Raises OSError: no such file."""
    return _entry(path, _retried(path, lambda: os.stat(path), "info"))


def exists(path: str) -> bool:
    """Whether there is a file or directory of that name. Raises OSError: storage fails."""
    try:
        stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        return False
    return True


def list_files(path: str, *patterns: str) -> list[Entry]:
    """The files of a directory that match one of `patterns` ("**/*.tar" searches below it too), those that a glob finds, or the
    one file; sorted by path. Names that begin with a dot are left out. Raises OSError: storage fails, or nothing is there."""
    if not is_remote(path):
        return _list_local(os.path.abspath(os.path.expanduser(path)), patterns)
    protocol = path.partition("://")[0]
    if _GLOB.search(path):
        found = _retried(path, None, "glob", detail=True)
    else:
        info = _retried(path, None, "info")
        if info["type"] != "directory":
            return [_entry(path, info)]
        deep = any(pattern.startswith("**/") for pattern in patterns)
        # It answers, as info has shown: a page of 1,000 names a request may take longer than DEADLINE.
        found = _retried(path, None, "find", 10 * _PART, maxdepth=None if deep else 1, detail=True)
    entries = []
    top = path.rstrip("/").count("/") + 1
    for name, info in found.items():
        url = f"{protocol}://{name.lstrip('/')}"
        folder, _, base = url.rpartition("/")
        if info["type"] != "file" or base.startswith("."):
            continue
        shallow = folder.count("/") + 1 == top
        matches = (fnmatch.fnmatchcase(base, p.removeprefix("**/")) for p in patterns if shallow or p.startswith("**/"))
        if _GLOB.search(path) or any(matches):
            entries.append(_entry(url, info))
    return sorted(entries)


def write_whole(path: str, content: bytes) -> None:
    """Bytes under that name: all of them or nothing appears. A missing folder is made. Raises OSError."""
    if is_remote(path):
        _retried(path, None, "pipe_file", len(content), after=(content,))
    else:
        fileio.write_whole(path, content, shared=True)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[pathlib.Path]:
    """A unique file name on this machine. What is written there gets the name `path` at the end, by a rename or as one upload;
    if it fails, nothing is left. Raises OSError."""
    if not is_remote(path):
        with fileio.replacing(path, shared=True) as partial:
            yield partial
        return
    with tempfile.TemporaryDirectory(prefix="lumos_jax_write_") as folder:
        partial = pathlib.Path(folder, "file")
        yield partial
        _retried(path, None, "put_file", partial.stat().st_size, before=(os.fspath(partial),))


def remove(path: str) -> None:
    """Raises OSError: no such file."""
    _retried(path, lambda: os.unlink(path), "rm_file")


def local_copy(path: str) -> str:
    """The path of a local file with this content: `path` itself, or a copy of what the URL names, kept below $LUMOS_JAX_CACHE
    under the version that the store names. Raises OSError; ValueError: there is no cache directory."""
    if not is_remote(path):
        return path
    folder = fileio.cache_directory("remote")
    if folder is None:
        raise ValueError(f"{path} is copied to this machine before it is read: LUMOS_JAX_CACHE must name a directory")
    entry = stat(path)
    name = uuid.uuid5(uuid.NAMESPACE_URL, repr(entry)).hex
    kept = folder / name[:2] / f"{name}-{path.rpartition('/')[2]}"
    if not (kept.exists() and kept.stat().st_size == entry.size):
        with fileio.replacing(kept, shared=True) as partial, open(partial, "wb") as file:
            for first in range(0, entry.size, 8 * _PART):
                starts = range(first, min(first + 8 * _PART, entry.size), _PART)
                for part in read_many([(path, start, _PART) for start in starts]):
                    if isinstance(part, OSError):
                        raise part
                    file.write(part)
            if file.tell() != entry.size:
                raise OSError(errno.EIO, f"{path} changed while it was copied")
    return os.fspath(kept)


class RemoteFile(io.RawIOBase):
    """What a URL names as a file; every read is a request with a deadline."""

    def __init__(self, entry: Entry):
        self.entry, self._place = entry, 0

    def read_at(self, offset: int, size: int) -> bytes:
        """At most `size` bytes, all of them within the file."""
        return read(self.entry.path, offset, size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.entry.size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self.read_at(self._place, min(len(buffer), max(0, self.entry.size - self._place)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _list_local(path: str, patterns: Sequence[str]) -> list[Entry]:
    if os.path.isdir(path):
        found = {
            name for pattern in patterns for name in glob.glob(os.path.join(glob.escape(path), pattern), recursive=True)
        }
    elif os.path.isfile(path):  # the name of a file may hold what a glob reads as a pattern
        found = {path}
    else:
        found = set(glob.glob(path, recursive=True))
        if not found and not _GLOB.search(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    names = sorted(name for name in found if not os.path.basename(name).startswith(".") and os.path.isfile(name))
    return [_entry(name, os.stat(name)) for name in names]


def _entry(path: str, info: Any) -> Entry:
    if isinstance(info, os.stat_result):
        return Entry(path, info.st_size, str(info.st_mtime_ns))
    keys = ("ETag", "etag", "generation", "md5Hash", "LastModified", "mtime", "updated", "last_modified", "created")
    version = next((info[key] for key in keys if info.get(key) is not None), "")
    version = version.timestamp() if isinstance(version, datetime.datetime) else version
    return Entry(path, int(info.get("size") or 0), str(version).strip('"'))


def _pread(file: int, offset: int, size: int | None) -> bytes:
    wanted = max(0, (os.fstat(file).st_size if size is None else offset + size) - offset)
    parts = []
    while wanted and (part := os.pread(file, min(wanted, 1 << 30), offset)):
        parts.append(part)
        offset, wanted = offset + len(part), wanted - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _retried(
    path: str,
    local: Callable[[], T] | None,
    method: str,
    size: int = 0,
    before: tuple = (),
    after: tuple = (),
    **named: Any,
) -> T:
    """What `local` returns, or for a URL fsspec's `method`; transient errors are retried until the deadline.

    size: bytes that it transfers, where that is known. Raises OSError, with an errno; ImportError: a package is missing.
    """
    until = time.monotonic() + DEADLINE + size / _BYTES_PER_SECOND
    for attempt in itertools.count():
        left = until - time.monotonic()
        try:
            return remote.request(path, method, left, before, after, named) if is_remote(path) else local()
        except Exception as error:
            failure = remote.as_oserror(error, path)
            wait = min(0.2 * 2**attempt, 8.0) * random.uniform(0.5, 1.0)
            if failure.errno not in fileio.TRANSIENT:
                raise failure from error
            if time.monotonic() + wait > until:
                raise fileio.RetriesExhausted(failure.errno, failure.strerror, path) from error
        time.sleep(wait)
    raise AssertionError


@functools.cache
def _pool(process: int) -> futures.ThreadPoolExecutor:
    return futures.ThreadPoolExecutor(remote.IN_FLIGHT, thread_name_prefix="storage")
