"""Large arrays of numbers in .npy files: read where they are asked, made once."""

from __future__ import annotations

import functools
import math
import os
import pathlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from lumos_jax import fileio
from lumos_jax.data.files import npy_header, open_regular


class ArrayFile:
    """The array in a .npy file: an index, a slice or an array of indices reads these rows and no others, so that it takes no
    memory, however large. Pickling passes its path. Raises OSError; ValueError: no such file, or truncated.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)

    def __reduce__(self) -> tuple:
        return ArrayFile, (self.path,)

    @functools.cached_property
    def _opened(self) -> tuple[BinaryIO, np.dtype, tuple[int, ...], int]:
        file = open_regular(self.path)
        weakref.finalize(self, file.close)
        dtype, shape, order, begin = npy_header(os.pread(file.fileno(), 1 << 12, 0))
        if order != "C" or os.fstat(file.fileno()).st_size < begin + math.prod(shape) * dtype.itemsize:
            raise ValueError("truncated, or in Fortran's order")
        return file, dtype, shape, begin

    @property
    def dtype(self) -> np.dtype:
        return self._opened[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._opened[2]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray | np.number:
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            return self._rows(begin, max(begin, end))[::step]
        if isinstance(index, np.ndarray):
            first = int(index[0]) if len(index) else 0
            if np.array_equal(index, np.arange(first, first + len(index))):
                return self._rows(first, first + len(index))
            return np.array([self[int(one)] for one in index], self.dtype).reshape(len(index), *self.shape[1:])
        return self._rows(int(index), int(index) + 1)[0]

    def _rows(self, begin: int, end: int) -> np.ndarray:
        file, dtype, shape, start = self._opened
        size = math.prod(shape[1:]) * dtype.itemsize
        if not 0 <= begin <= end <= shape[0]:
            raise IndexError(f"rows {begin} .. {end} of {shape[0]}")
        data = os.pread(file.fileno(), (end - begin) * size, start + begin * size)
        return np.frombuffer(data, dtype).reshape(end - begin, *shape[1:])


def kept_once(
    file: pathlib.Path | None, shape: tuple[int, ...], dtype: np.dtype, make: Callable[[], Iterable[np.ndarray]]
) -> np.ndarray | ArrayFile:
    """The array whose rows `make` gives piece by piece, kept in a .npy file (None: in memory); a damaged one is made again."""
    failed = []  # errors of `make`, rather than of the cache

    def pieces() -> Iterator[np.ndarray]:
        try:
            yield from make()
        except OSError as error:
            failed.append(error)
            raise

    if file is not None:
        try:
            if not (file.exists() and _holds(file, shape, dtype)):
                with fileio.replacing(file, shared=True) as partial:
                    write_pieces(partial, shape, dtype, pieces())
            return ArrayFile(file)
        except OSError as error:
            if failed:
                raise
            logging.warning("the cache %s cannot be written to (%s): it is made at each start", file.parent, error)
    return np.concatenate([np.zeros((0, *shape[1:]), dtype), *make()])


def write_pieces(path: str | os.PathLike, shape: tuple[int, ...], dtype: Any, pieces: Iterable[np.ndarray]) -> None:
    """Write an array as a .npy file, whose rows come in pieces; one of them is in memory at a time."""
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    count = 0
    with open(path, "wb") as out:
        np.lib.format.write_array_header_1_0(out, described)
        for piece in pieces:
            out.write(np.ascontiguousarray(piece, dtype).data)
            count += len(piece)
    assert count == shape[0], (count, shape)


def _holds(file: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    try:
        found = ArrayFile(file)
        if (found.shape, found.dtype) == (shape, dtype):
            return True
        problem = f"{found.shape} {found.dtype}"
    except (OSError, ValueError) as error:
        problem = error
    logging.warning("%s cannot be read (%s): it is made again", file, problem)
    return False
