"""PyTorch files (.pth, .pt, .bin, .ckpt) in torch.save's zip layout, read and written without PyTorch.

Such a file is a zip archive of `data.pkl`, a pickle that describes nested dicts of tensors, and the raw bytes of their
storages. A pickle is a program that may call whatever it names. The reader here looks names up in one closed table of its own
objects and refuses every other name, so nothing that a file asks for is ever run. Tensors become read-only views of the mapped
file, checked against its size. Files from before PyTorch 1.6, which are no zip archives, are refused.
"""

from __future__ import annotations

import io
import logging
import math
import mmap
import pathlib
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

EMA_KEYS = ("ema", "model_ema", "state_dict_ema", "ema_state_dict")
STATE_DICT_KEYS = (
    "state_dict", "model", "model_state_dict", "module", "teacher", "target_network", "params", *EMA_KEYS,
)  # fmt: skip

_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_STORAGES: Mapping[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"), "DoubleStorage": np.dtype("<f8"), "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16), "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"), "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"), "UntypedStorage": np.dtype("u1"),
}  # fmt: skip


class _Refused(ValueError):
    """Why a file is refused, without its path."""


class _Stateless:
    """Ignores the attributes that a pickle's BUILD would set."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class Ignored(_Stateless):
    """Stands for a value that weights do not need: training arguments, devices, NumPy scalars and arrays."""

    __slots__ = ()

    def __new__(cls, *args, **named):
        return super().__new__(cls)


class _Dict(_Stateless, dict):
    """An OrderedDict's or defaultdict's contents."""


class _Function(_Stateless):
    """A function of ours as a pickle sees it: it can only be called."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *args):
        return self._call(*args)


# What training checkpoints hold beside their weights. Protocol 2 names sets and such by their Python 2 module.
_IGNORED = (
    ("argparse", "Namespace"), ("types", "SimpleNamespace"), ("collections", "Counter"),
    ("datetime", "datetime"), ("datetime", "timedelta"), ("numpy", "dtype"), ("numpy", "ndarray"), ("_codecs", "encode"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath", "WindowsPath")),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("torch", name) for name in (
        "device", "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")),
    *((module, name) for module in ("builtins", "__builtin__") for name in (
        "set", "frozenset", "list", "dict", "tuple", "int", "float", "str", "bytearray", "complex", "slice", "range")),
)  # fmt: skip
_GLOBALS: Mapping[tuple[str, str], Any] = {
    **dict.fromkeys(_IGNORED, Ignored),
    ("collections", "OrderedDict"): _Dict,
    ("collections", "defaultdict"): _Function(lambda *factory: _Dict()),
    ("torch", "Size"): _Function(lambda numbers=(): tuple(numbers)),
    ("torch._utils", "_rebuild_parameter"): _Function(lambda tensor, *_: tensor),
    ("torch.storage", "UntypedStorage"): "UntypedStorage",
    **{("torch", name): name for name in _STORAGES},
}


class _Unpickler(pickle._Unpickler):  # the one in Python: its memo is a dict, so no opcode can ask for gigabytes
    def __init__(self, archive: _Archive):
        super().__init__(io.BytesIO(archive.view("data.pkl")), encoding="utf-8", errors="surrogateescape")
        self._archive = archive

    def find_class(self, module, name):
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _Function(self._rebuild_tensor)
        if (module, name) not in _GLOBALS:
            raise _Refused(
                f"it asks for {f'{module}.{name}'!r}, which weights do not need; it was not looked up and nothing was run. "
                "If you trust the file, load it with PyTorch and save the state dict alone: "
                "torch.save(model.state_dict(), 'weights.pth')"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise _Refused("it refers to something other than a storage; save the state dict alone")
        dtype, data, count = _STORAGES[pid[1]], self._archive.view(f"data/{pid[2]}"), pid[4]
        if count * dtype.itemsize > len(data):
            raise _Refused(f"storage {pid[2]!r} claims {count * dtype.itemsize} bytes but has {len(data)}")
        return data, dtype

    def _rebuild_tensor(self, storage, offset, shape, strides, *more):
        """`more`: requires_grad, hooks and, since 2.0, flags of lazily conjugated or negated tensors."""
        if len(more) > 2 and more[2]:
            raise _Refused("a tensor is stored negated or conjugated; call resolve_neg() and resolve_conj() first")
        data, dtype = storage
        if math.prod(shape) * dtype.itemsize > self._archive.size:  # strides of zero repeat a few bytes
            raise _Refused("a tensor claims more bytes than the file has")
        if 0 in shape:
            return np.empty(shape, dtype)
        strides = [stride * dtype.itemsize if n > 1 else 0 for n, stride in zip(shape, strides, strict=True)]
        array = np.ndarray(shape, dtype, data, offset * dtype.itemsize, strides)  # checks that it lies within `data`
        return array if array.flags.aligned else array.copy()


class _Archive:
    """The entries of a mapped zip archive, below its one root folder; none of them is compressed."""

    def __init__(self, path: pathlib.Path):
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._data)
        if self._data[: len(_LEGACY_MAGIC)] == _LEGACY_MAGIC:
            raise _Refused(
                "it is in the format from before PyTorch 1.6. Save it again with a current PyTorch: "
                f"torch.save(torch.load({path.name!r}, map_location='cpu', weights_only=True), 'new.pth')"
            )
        if self._data[:2] != b"PK":
            raise _Refused("it is no file of torch.save, which are zip archives")
        with zipfile.ZipFile(self._data) as archive:
            self._entries = {info.filename: info for info in archive.infolist()}
        roots = [match[1] for name in self._entries if (match := re.fullmatch(r"([^/]+)/data\.pkl", name))]
        if len(roots) != 1:
            raise _Refused(f"it is no file of torch.save: {len(roots)} of its entries are called <root>/data.pkl")
        self._root = roots[0]
        if any(name.startswith((f"{self._root}/constants.pkl", f"{self._root}/code/")) for name in self._entries):
            raise _Refused(
                "it is a TorchScript archive, which holds a program; save the state dict alone: "
                "torch.save(torch.jit.load(...).state_dict(), 'weights.pth')"
            )
        if f"{self._root}/byteorder" in self._entries and self.view("byteorder") != b"little":
            raise _Refused("its byte order is not little-endian")

    def view(self, name: str) -> memoryview:
        """The bytes of an entry, where they lie in the file."""
        info = self._entries.get(f"{self._root}/{name}")
        if info is None:
            raise _Refused(f"its entry {name!r} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _Refused(f"its entry {name!r} is compressed or encrypted, which torch.save never does")
        header = self._data[info.header_offset : info.header_offset + 30]
        if header[:4] != b"PK\x03\x04":
            raise _Refused(f"its entry {name!r} is not where the archive says")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))  # behind the name and extra fields
        if start + info.file_size > self.size:
            raise _Refused(f"its entry {name!r} claims more bytes than the file has")
        return memoryview(self._data)[start : start + info.file_size]


def load_tree(path: str | pathlib.Path) -> Any:
    """All a file holds: nested dicts, lists, numbers, strings, read-only arrays for tensors, `Ignored` for the rest.
    Raises ValueError: the file asks for code, is no zip file of torch.save, or is damaged."""
    path = pathlib.Path(path)
    try:
        return _Unpickler(_Archive(path)).load()
    except _Refused as refused:
        raise ValueError(f"{path} is refused: {refused}") from None
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # zipfile and pickle raise whatever they like on damaged bytes
        raise ValueError(f"{path} is damaged or cut short ({type(error).__name__}: {str(error)[:200]})") from error


def load(path: str | pathlib.Path, prefer: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """A file's state dict: name -> read-only array. Arguments and errors as for `load_tree` and `state_dict`."""
    return state_dict(load_tree(path), path, prefer)


def state_dict(tree: Any, path: str | pathlib.Path, prefer: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Finds the state dict in what a file holds; a log line says what was left.

    Args:
      tree: from `load_tree`.
      path: for messages.
      prefer: keys to take if they are there; else the only one of STATE_DICT_KEYS that holds tensors, or the top level.

    Raises:
      ValueError: there are no tensors, or several state dicts; lists what there is.
    """
    named = {key: _tensors(tree[key]) for key in STATE_DICT_KEYS if isinstance(tree, dict) and _tensors(tree.get(key))}
    key = next((key for key in (*prefer, *named) if key in named), None)
    if len(named) > 1 and key not in prefer:
        raise ValueError(
            f"{path} holds several state dicts, {_listing({key: tree[key] for key in named})}; keep one in a file of its own: "
            f"numpy.savez('weights.npz', **lumos_jax.weights.torch_files.load_tree({str(path)!r})[{next(iter(named))!r}])"
        )
    found = _tensors(tree) if key is None else named[key]
    if not found:
        raise ValueError(
            f"{path} has no tensors at its top level or under {', '.join(STATE_DICT_KEYS)}; it holds {_listing(tree)}"
        )
    if left := {name: part for name, part in tree.items() if name != key and name not in found}:
        where = "the top level" if key is None else repr(key)
        logging.getLogger(__name__).info("%s: took %d tensors of %s; left %s", path, len(found), where, _listing(left))
    return found


def _tensors(value: Any) -> dict[str, np.ndarray]:
    if not isinstance(value, dict):
        return {}
    return {name: part for name, part in value.items() if isinstance(name, str) and isinstance(part, np.ndarray)}


def _listing(tree: Any) -> str:
    if not isinstance(tree, dict):
        return f"a {type(tree).__name__}"
    sizes = {name: len(_tensors(part)) for name, part in tree.items() if isinstance(name, str)}
    parts = [repr(name) + (f" ({size} tensors)" if size else "") for name, size in sizes.items()]
    return ", ".join(parts[:20] + ["..."] * (len(parts) > 20)) or "nothing that has a name"


# Writing. The pickle is written opcode by opcode (protocol 2), since it names functions that need not exist here.

_WRITTEN = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def save(path: pathlib.Path, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of float32, float16, bfloat16 or int64 arrays, for `torch.load(path, weights_only=True)`.
    Raises ValueError: another dtype, or another kind of value."""
    arrays: list[np.ndarray] = []
    pickled = b"\x80\x02" + _pickled(tree, arrays) + pickle.STOP
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays):
            with archive.open(f"archive/data/{key}", "w", force_zip64=True) as file:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        archive.writestr("archive/version", "3\n")


def _pickled(value: Any, arrays: list[np.ndarray]) -> bytes:
    """Opcodes that make `value`, where bytes are opcodes already. Its arrays are appended to `arrays`."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, int):
        return pickle.LONG1 + struct.pack("<Bq", 8, value)
    if isinstance(value, tuple):
        return pickle.MARK + b"".join(_pickled(part, arrays) for part in value) + pickle.TUPLE
    if isinstance(value, Mapping):
        items = b"".join(_pickled(key, arrays) + _pickled(part, arrays) for key, part in value.items())
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if not isinstance(value, np.ndarray) or value.dtype.name not in _WRITTEN:
        what = value.dtype.name if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"a PyTorch file is written of {', '.join(_WRITTEN)} arrays and dicts, not of {what}")
    storage = ("storage", _global("torch", _WRITTEN[value.dtype.name]), str(len(arrays)), "cpu", value.size)
    arrays.append(value)
    strides = np.cumprod((1, *value.shape[:0:-1]), dtype=int)[::-1].tolist() if value.ndim else ()
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    stored = _pickled(storage, arrays) + pickle.BINPERSID
    arguments = _pickled((stored, 0, value.shape, tuple(strides), pickle.NEWFALSE, hooks), arrays)
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
