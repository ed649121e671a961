"""Pickles of NumPy arrays from others, read without running anything that they name."""

from __future__ import annotations

import _codecs
import io
import pickle
from typing import Any

import numpy as np

_KNOWN = {
    "_reconstruct": np._core.multiarray._reconstruct,
    "_frombuffer": np._core.numeric._frombuffer,
    "scalar": np._core.multiarray.scalar,
    "ndarray": np.ndarray,
    "dtype": np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # of bytes in pickles of protocol 2
            return _codecs.encode
        if module.partition(".")[0] != "numpy" or name not in _KNOWN:
            raise ValueError(f"it asks for {module}.{name}, and only NumPy arrays and plain containers are read")
        return _KNOWN[name]


def read_arrays(data: bytes) -> Any:
    """The arrays and plain containers of a pickle.

    Raises:
      ValueError: it is no pickle, or one of something else.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(data)).load()
    except ValueError:
        raise
    except Exception as error:  # whatever a damaged pickle makes the unpickler raise
        raise ValueError(f"it is no pickle of NumPy arrays ({type(error).__name__}: {error})") from error
