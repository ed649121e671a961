"""Files on storage that may fail: retries of transient errors, files written whole, and the lock of a run's directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

RETRIES = 4
# Errors of network file systems that time out, restart or lose their handles, and of too many files open at a time. A missing
# file is not better for waiting.
TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EINTR", "ECONNRESET", "ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH",
        "ENETDOWN", "ENETUNREACH", "EREMOTEIO", "ENOTCONN", "EPIPE", "EMFILE", "ENFILE",
    )
    if hasattr(errno, name)
)  # fmt: skip
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_PERMANENT = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM}
_QUOTED = tuple(os.strerror(number) for number in _PERMANENT)  # in errors of libraries, which have no errno


class RetriesExhausted(OSError):
    """A transient error that was retried until a deadline already."""


def delays(retries: int = RETRIES) -> list[float]:
    """Seconds before each retry: 1, 2, 4 ... up to a minute."""
    return [min(2.0**i, 60.0) for i in range(retries)]


def permanent_reason(error: BaseException) -> str | None:
    """Why a write that failed so would fail again, as on a full disk; None if it may succeed."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in _PERMANENT else None
    return next((reason for reason in _QUOTED if reason in str(error)), None)


def failure(error: OSError, text: str) -> Exception:
    """The error to raise about a file that the user named: OSError where storage is full or fails for a moment, which a restart
    may cure; else ValueError, as of a mistake."""
    return OSError(text) if error.errno in TRANSIENT | _FULL else ValueError(text)


def with_retries(call: Callable[[], T], retries: int = RETRIES - 1) -> T:
    """Return what `call` returns; a transient OSError is retried and raised after the last try."""
    for delay in delays(retries):
        try:
            return call()
        except OSError as error:
            if error.errno not in TRANSIENT or isinstance(error, RetriesExhausted):
                raise
            time.sleep(delay)
    return call()


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, shared: bool = False) -> Iterator[pathlib.Path]:
    """A temporary name beside `path`, synced and renamed at the end: a crash leaves the old file or the new one. A missing
    folder is made; if writing fails, the temporary file is removed.

    shared: other processes may write the same file at this moment. The name is then unique; otherwise a later write takes the
    place of what a killed one has left. It ends in .partial, and begins with a dot if it is unique.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial" if shared else f"{path.name}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: str | bytes, *, shared: bool = False) -> None:
    """Write a file as `replacing` does."""
    with replacing(path, shared=shared) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def save_json(tree: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write an object as JSON, as `replacing` does."""
    write_whole(path, json.dumps(tree, indent=2) + "\n")


def save_png(image: np.ndarray, path: str | os.PathLike) -> None:
    """Write an image (H, W, 3) uint8."""
    from PIL import Image

    with replacing(path) as partial:
        Image.fromarray(image).save(partial, format="PNG")


def cache_directory(name: str) -> pathlib.Path | None:
    """Where to keep what can be made again: below $LUMOS_JAX_CACHE, which is ~/.cache/lumos_jax by default; None if empty."""
    root = os.environ.get("LUMOS_JAX_CACHE", "~/.cache/lumos_jax")
    return pathlib.Path(root).expanduser() / name if root else None


def local_directory(flag: str, value: str) -> pathlib.Path:
    """The absolute path that a flag names.

    Raises:
      ValueError: a URL, or a name that Orbax or TensorStore would take for a pattern, an escape or a URL.
    """
    if re.match(r"\w+:/", value):
        raise ValueError(
            f"{flag}={value} must be a directory of this machine: mount the bucket (gcsfuse, s3fs) and give its path there"
        )
    path = pathlib.Path(value).expanduser().absolute()
    if not value.strip() or set(str(path)) & set("*?[]\\") or ":/" in f"{path}/" or not str(path).isprintable():
        raise ValueError(f"{flag}={value!r} must be a path without * ? [ ] \\ :/ or control characters, and is {path}")
    return path


_LEASE = 100.0  # seconds; NFS servers free the locks of a machine that is lost after about 90


def lock(path: pathlib.Path, *, wait: bool = False) -> None:
    """Take a file as this process's own until it ends, however it ends: the kernel frees the lock, or the file server does.

    POSIX record locks also hold between machines of a shared file system, and child processes do not inherit them.

    wait: for another process that holds it, rather than fail.

    Raises:
      ValueError: another process holds it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # never closed, as that would free the lock
    host, until = socket.gethostname(), time.monotonic() + _LEASE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"warning: {path.parent} has no file locks ({error}): start no second run in it", file=sys.stderr)
                return
        holder = os.pread(file, 1000, 0).decode(errors="replace").strip() or "unknown"
        if not wait and (holder.endswith(f" on {host}") or time.monotonic() > until):
            raise ValueError(f"{path.parent} is in use by another run ({holder}): stop it, or take another directory")
        time.sleep(1.0)
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {host}\n".encode(), 0)
