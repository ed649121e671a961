"""Parquet, JSON and NumPy files of a preparation: written whole, and read with errors that name the file and the remedy."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from lumos_jax import fileio
from lumos_jax.data import storage
from lumos_jax.data.arrays import write_pieces

T = TypeVar("T")


def lock(out: str, *, wait: bool = False) -> None:
    """Makes this process the only one that changes the data set as a whole in a local directory, until it ends.

    wait: for a process that holds the lock, rather than refuse. Raises ValueError: another process holds it.
    """
    if not storage.is_remote(out):
        fileio.lock(pathlib.Path(out, "lock"), wait=wait)


@contextlib.contextmanager
def readable(path: str, remedy: str) -> Iterator[None]:
    """Turns errors about content into a ValueError that names the file and what to do. Errors of storage pass."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: {remedy}") from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    except OSError as error:
        if error.errno is None:  # pyarrow's, about what a file holds
            raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
        raise


def read_json(path: str, parse: Callable[[Any], T], remedy: str) -> T | None:
    """What `parse` makes of the content; None if there is no such file. Raises ValueError: the file is damaged."""
    try:
        content = storage.read(path)
    except FileNotFoundError:
        return None
    with readable(path, remedy):
        return parse(json.loads(content))


def write_json(path: str, tree: Mapping[str, Any]) -> None:
    storage.write_whole(path, (json.dumps(tree, indent=2) + "\n").encode())


def read_parquet(path: str, remedy: str, columns: Sequence[str] | None = None) -> Any:
    """A pyarrow.Table. Raises ValueError: the file is missing or damaged."""
    from pyarrow import parquet

    with readable(path, remedy), storage.open_read(path) as file:
        # Not read_table, whose threads may still hold the file when the interpreter ends, and then abort the process.
        return parquet.ParquetFile(file).read(columns=columns and list(columns), use_threads=False)


def write_parquet(path: str, table: Any, **options: Any) -> bytes:
    """Returns the content of the file. options: of pyarrow.parquet.write_table."""
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(table, file, **options)
    storage.write_whole(path, file.getvalue())
    return file.getvalue()


def read_npy(path: str, remedy: str) -> np.ndarray:
    """Raises ValueError: the file is missing or damaged."""
    with readable(path, remedy):
        return np.load(io.BytesIO(storage.read(path)))


def write_npy(path: str, array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, array)
    storage.write_whole(path, file.getvalue())


def read_npz(path: str, remedy: str) -> dict[str, np.ndarray]:
    """Raises ValueError: the file is missing or damaged."""
    with readable(path, remedy), np.load(io.BytesIO(storage.read(path))) as arrays:
        return dict(arrays)


def write_npz(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    file = io.BytesIO()
    np.savez(file, **arrays)
    storage.write_whole(path, file.getvalue())


def write_concatenated(path: str, parts: Iterable[np.ndarray], dtype: Any, shape: tuple[int, ...]) -> None:
    """Writes the concatenation of arrays as one .npy file; one part is in memory at a time."""
    with storage.replacing(path) as partial:
        write_pieces(partial, shape, dtype, parts)


def new_array(path: str, dtype: Any, count: int) -> None:
    """Writes a local .npy file of zeros (count,), to be mapped and filled. Its blocks are allocated now: a disk that is full
    raises OSError here, and would kill a process that writes to the map."""
    np.lib.format.open_memmap(path, "w+", dtype, (count,))
    with open(path, "rb+") as file:
        os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))


def remove_leftovers(folder: str) -> None:
    """Removes what killed processes left in a local directory; none may be at work there."""
    for path in [] if storage.is_remote(folder) else pathlib.Path(folder).glob(".*.partial*"):
        path.unlink(missing_ok=True)
