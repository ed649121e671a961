"""Files as sources meet them: lists and reads them without ever waiting, and tells the system's errors from a file's own."""

from __future__ import annotations

import errno
import math
import os
import pathlib
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO, Literal

import numpy as np
from absl import logging

from lumos_jax import fileio
from lumos_jax.data.base import CorruptRecord, Source, printable

IMAGE_ENDINGS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
# What says nothing about a record: storage or the machine has failed, and other records would fail alike.
_SYSTEM = fileio.TRANSIENT | {errno.ENOMEM, errno.ENOBUFS}
Arrays = dict[str, np.ndarray]


def system_error(error: BaseException) -> OSError | None:
    """The failure of storage or of the machine that `error` is, or quotes, as C++ libraries do; None for a record's own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error if error.errno in _SYSTEM else None
    if isinstance(error, CorruptRecord):  # whoever raised it has looked
        return None
    text = str(error)
    quoted = next((code for code in _SYSTEM if os.strerror(code) in text), None)
    return None if quoted is None else OSError(quoted, os.strerror(quoted))


def is_image(head: bytes) -> bool:
    """Whether a file that begins with these bytes (12 suffice) is a JPEG, PNG, WebP, GIF, BMP or TIFF file."""
    known = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
    return head.startswith(known) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def has_image_ending(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_ENDINGS


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


class FilesSource(Source):
    """Records that are files or folders below `root`; `names` are relative to it."""

    needs = "path"
    root: pathlib.Path
    names: Names

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int, *within: str) -> str:
        return os.path.join(self.root, self.names[index], *within)

    def describe(self, index: int) -> str:
        return printable(self.path(index))


def directory(path: str) -> pathlib.Path:
    """The directory that config.data.path names. Raises ValueError: it is none."""
    found = pathlib.Path(path).expanduser().absolute()
    if not found.is_dir():
        hint = ", and URLs are not read here: mount the bucket and give its path" if "://" in path else ""
        raise ValueError(f"config.data.path={path!r} is not a directory{hint}")
    return found


def files_below(root: pathlib.Path) -> list[str]:
    """Paths of all files below a directory; links are followed, names that begin with a dot left out.

    Named pipes, sockets and devices, for which a reader would wait, are left out and their number logged. Links to nowhere
    are files that cannot be read. Raises ValueError: a directory cannot be listed.
    """
    found, special, entered, pending = [], [], set(), [os.fspath(root)]
    while pending:
        folder, folders = pending.pop(), []
        try:
            status = os.stat(folder)
            identity = status.st_dev, status.st_ino
            if identity in entered:  # a link that leads back up, or a second way to the same files
                continue
            entered.add(identity)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        mode = _mode(entry)
                        (folders if stat.S_ISDIR(mode) else found if stat.S_ISREG(mode) else special).append(entry.path)
        except OSError as error:
            raise fileio.failure(error, f"{error.filename} cannot be listed: {error.strerror}") from error
        pending += sorted(folders, reverse=True)  # the first of them is visited next
    if special:
        example = printable(min(special))
        logging.warning("%s: %d pipes, sockets or devices are left out, as %s", root, len(special), example)
    return found


def _mode(entry: os.DirEntry) -> int:
    """A file's type; the directory tells it of most, so that they need no call of the system each."""
    try:
        return stat.S_IFDIR if entry.is_dir() else stat.S_IFREG if entry.is_file() else entry.stat().st_mode
    except OSError:  # a link to nowhere or a loop of links: a file that cannot be read
        return stat.S_IFREG


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading; a named pipe or device is refused at once instead of waited for.
    Raises OSError: it is no regular file, or cannot be opened."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("a pipe or a device, no regular file")
    return file


def read_file(path: str | os.PathLike) -> bytes:
    """The content of a regular file. Raises OSError as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def file_size(path: str | os.PathLike) -> int:
    """Bytes, or -1 for a file that has gone since it was listed."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def read_npy(data: bytes) -> np.ndarray:
    """The array of numbers in a .npy file; a view of `data`. Raises ValueError: these bytes are no such file, or too few."""
    dtype, shape, order, begin = npy_header(data)
    return np.frombuffer(data, dtype, math.prod(shape), begin).reshape(shape, order=order)


def npy_header(data: bytes) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"], int]:
    """Dtype, shape and order of the array in a .npy file that begins with `data`, and the offset of its first number.

    NumPy's own reader compiles the header as Python, and the compiler of CPython 3.11 may fail when several threads use it.
    Raises ValueError: it is no such file.
    """
    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        raise ValueError("no NumPy file")
    begin = 10 if data[6] == 1 else 12
    end = begin + int.from_bytes(data[8:begin], "little")
    header = data[begin:end].decode("latin-1")
    dtype = re.search(r"""['"]descr['"]\s*:\s*['"]([<>|=]?(?:[iu][1248]|f[248]|c(?:8|16)|b1))['"]""", header)
    order = re.search(r"""['"]fortran_order['"]\s*:\s*(True|False)""", header)
    shape = re.search(r"""['"]shape['"]\s*:\s*\(([\d\s,]*)\)""", header)
    if not (dtype and order and shape):
        raise ValueError(f"a NumPy file of something else than numbers: {header.strip()[:80]}")
    dims = tuple(int(dim) for dim in shape[1].split(",") if dim.strip())
    return np.dtype(dtype[1]), dims, "F" if order[1] == "True" else "C", end


def made_once(file: pathlib.Path | None, names: Sequence[str], make: Callable[[], Arrays]) -> Arrays:
    """The named arrays that `make` gives, kept in a .npz file (None: nowhere); a damaged one is made again."""
    if file is None:
        return make()
    if file.exists():
        try:
            with zipfile.ZipFile(file) as there:
                return {name: read_npy(there.read(f"{name}.npy")) for name in names}
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            logging.warning("%s cannot be read (%s): it is made again", file, error)
    arrays = make()
    try:
        with fileio.replacing(file, shared=True) as partial, open(partial, "wb") as out:
            np.savez(out, **arrays)
    except OSError as error:
        logging.warning("the cache %s cannot be written to (%s): files are indexed at each start", file.parent, error)
    return arrays
