"""NumPy arrays -> a PyTorch file (.pth) in torch.save's zip layout, without PyTorch.

The pickle inside is written opcode by opcode (protocol 2): it names the function that rebuilds a tensor, which is PyTorch's
and need not exist here. `torch.load(path, weights_only=True)` and `torch_files` read what comes out.
"""

from __future__ import annotations

import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}
_ROOT = "archive"


def save(path: pathlib.Path, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays; arrays may be float32, float16, bfloat16 or int64.

    Raises:
      ValueError: another dtype, or another kind of value.
    """
    arrays: list[np.ndarray] = []
    pickled = b"\x80\x02" + _value(tree, arrays) + pickle.STOP
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{_ROOT}/data.pkl", pickled)
        archive.writestr(f"{_ROOT}/byteorder", "little")
        for key, array in enumerate(arrays):
            with archive.open(f"{_ROOT}/data/{key}", "w", force_zip64=True) as file:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        archive.writestr(f"{_ROOT}/version", "3\n")


def _value(value: Any, arrays: list[np.ndarray]) -> bytes:
    if isinstance(value, Mapping):
        items = b"".join(_text(key) + _value(part, arrays) for key, part in value.items())
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if not isinstance(value, np.ndarray) or value.dtype.name not in _STORAGES:
        what = value.dtype.name if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"a PyTorch file is written of {', '.join(_STORAGES)} arrays and dicts, not of {what}")
    arrays.append(value)
    strides = np.cumprod((1, *value.shape[:0:-1]), dtype=int)[::-1] if value.ndim else ()
    storage = (
        pickle.MARK + _text("storage") + _global("torch", _STORAGES[value.dtype.name]) + _text(str(len(arrays) - 1))
        + _text("cpu") + _number(value.size) + pickle.TUPLE + pickle.BINPERSID
    )  # fmt: skip
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + pickle.MARK + storage + _number(0) + _numbers(value.shape) + _numbers(strides) + pickle.NEWFALSE + hooks
        + pickle.TUPLE + pickle.REDUCE
    )  # fmt: skip


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _number(number: int) -> bytes:
    if number < 2**31:
        return pickle.BININT + struct.pack("<i", number)
    return pickle.LONG1 + bytes([8]) + struct.pack("<q", number)


def _numbers(numbers) -> bytes:
    return pickle.MARK + b"".join(_number(int(number)) for number in numbers) + pickle.TUPLE
