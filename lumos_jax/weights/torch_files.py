"""PyTorch files (.pth, .pt, .bin, .ckpt) -> NumPy arrays, without PyTorch and without running anything that a file asks for.

`torch.save` writes a pickle that describes the tensors, beside the raw bytes of their storages, in one of two layouts: a zip
archive (since 1.6), or several pickles in a row followed by the storages (before). `torch_pickle` reads the pickle to records;
here the records are checked against the file's real size and turned into read-only views of the mapped file.
"""

from __future__ import annotations

import io
import logging
import math
import mmap
import pathlib
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lumos_jax.weights.torch_pickle import DTYPES, NotRead, NotReadArray, Refused, Storage, Tensor, unpickle

USUAL_KEYS = ("state_dict", "model", "module", "ema", "state_dict_ema", "teacher", "target_network", "params")

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def load_tree(path: str | pathlib.Path) -> Any:
    """Everything a file holds: nested dicts, lists, tuples, numbers, strings, and arrays in place of tensors.

    Arrays are read-only views of the mapped file, copied only where the file does not align them; dtypes are PyTorch's, with
    ml_dtypes.bfloat16. Other values are `NotRead`.

    Raises:
      ValueError: the file asks for code, is no PyTorch file, is damaged or cut short, or is a TorchScript archive.
    """
    path = pathlib.Path(path)
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"{path} is {'empty' if path.is_file() else 'no file'}")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tree, places = _read_zip(data, path) if data[:2] == b"PK" else _read_legacy(data, path)
    try:
        return _plain(tree, lambda tensor: _array(tensor, data, places), {})
    except RecursionError:
        raise ValueError(f"{path} is refused: it is nested too deeply for weights") from None
    except Refused as refused:
        raise ValueError(f"{path} is refused: {refused}") from None


def _read_zip(data: mmap.mmap, path: pathlib.Path):
    """-> tree, {storage key: (first byte, bytes)}"""
    try:
        with zipfile.ZipFile(data) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, struct.error) as error:
        raise ValueError(
            f"{path} is damaged or cut short: as a zip archive it has no readable end ({error})"
        ) from error
    roots = [match[1] for name in entries if (match := re.fullmatch(r"([^/]+)/data\.pkl", name))]
    if len(roots) != 1:
        raise ValueError(
            f"{path} is a zip archive, but none of torch.save: {len(roots)} entries are called <root>/data.pkl"
        )
    root = roots[0]
    if any(name == f"{root}/constants.pkl" or name.startswith(f"{root}/code/") for name in entries):
        raise ValueError(
            f"{path} is a TorchScript archive, which holds a program; save the state dict alone: "
            "torch.save(torch.jit.load(...).state_dict(), 'weights.pth')"
        )

    places = {name: _place(info, data, path) for name, info in entries.items() if not info.is_dir()}

    def read(name: str) -> bytes:
        start, size = places[name]
        return data[start : start + size]

    order = read(f"{root}/byteorder") if f"{root}/byteorder" in places else b"little"
    if order != b"little":
        raise ValueError(f"{path} has byte order {order[:20]!r}; only little-endian files are read")
    tree, _ = unpickle(io.BytesIO(read(f"{root}/data.pkl")), path)
    folder = f"{root}/data/"
    return tree, {name.removeprefix(folder): place for name, place in places.items() if name.startswith(folder)}


def _place(info: zipfile.ZipInfo, data: mmap.mmap, path: pathlib.Path) -> tuple[int, int]:
    """First byte and number of bytes of an entry that lies in the archive as it is."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise ValueError(f"{path}: entry {info.filename!r} is compressed or encrypted, which torch.save never does")
    header = data[info.header_offset : info.header_offset + 30] if info.header_offset >= 0 else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{path} is damaged: entry {info.filename!r} is not where the archive says")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + info.file_size > len(data):
        raise ValueError(
            f"{path} is damaged: entry {info.filename!r} claims {info.file_size} bytes, more than there are"
        )
    return start, info.file_size


def _read_legacy(data: mmap.mmap, path: pathlib.Path):
    """-> tree, {storage key: (first byte, bytes)}"""
    magic, _ = unpickle(data, path)
    if type(magic) is not int or magic != _MAGIC:
        raise ValueError(f"{path} is no file of torch.save: it starts with another pickle than PyTorch's magic number")
    protocol, _ = unpickle(data, path)
    if type(protocol) is not int or protocol != _PROTOCOL:
        raise ValueError(f"{path} is not of PyTorch's protocol {_PROTOCOL}, the only one that is read")
    system, _ = unpickle(data, path)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError(f"{path} is not little-endian, or does not say so; only little-endian files are read")
    tree, counts = unpickle(data, path)
    keys, _ = unpickle(data, path)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{path} is damaged: it has no list of its storages")
    places = {}
    for key in keys:
        header = data.read(8)
        kind, expected = counts.get(key, (None, None))
        count = int.from_bytes(header, "little", signed=True)
        if len(header) < 8 or count != expected:
            raise ValueError(f"{path} is damaged or cut short: storage {key!r} has {count} elements, not {expected}")
        start, size = data.tell(), count * DTYPES[kind].itemsize
        if start + size > len(data):
            raise ValueError(f"{path} is cut short: storage {key!r} has {len(data) - start} of {size} bytes")
        places[key] = start, size
        data.seek(start + size)
    return tree, places


def _array(tensor: Tensor, data: mmap.mmap, places: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """A tensor's record -> a view of the file, after proving that every element lies in the tensor's storage."""
    storage, dtype = tensor.storage, DTYPES[tensor.storage.kind]
    if storage.key not in places:
        raise Refused(f"storage {storage.key!r} is missing from the file")
    start, size = places[storage.key]
    if (storage.first + storage.count) * dtype.itemsize > size:
        raise Refused(
            f"storage {storage.key!r} claims {(storage.first + storage.count) * dtype.itemsize} bytes but has {size}"
        )
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    # Overlapping strides let a few bytes pose as any number of elements.
    if (count and last >= storage.count) or count * dtype.itemsize > len(data):
        raise Refused(
            f"a tensor of shape {tensor.shape}, strides {tensor.strides} and offset {tensor.offset} reaches beyond the "
            f"{storage.count} elements of storage {storage.key!r}"
        )
    try:
        if not count:
            return np.empty(tensor.shape, dtype)
        # A stride along an axis of length one is never used and may be anything, even more than NumPy can hold.
        strides = [
            stride * dtype.itemsize if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.strides, strict=True)
        ]
        first = start + (storage.first + tensor.offset) * dtype.itemsize
        array = np.ndarray(tensor.shape, dtype, data, first, strides)
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise Refused(f"a tensor of shape {tensor.shape} cannot be read: {error}") from error
    return array if array.flags.aligned else array.copy()


def _plain(value: Any, array: Callable[[Tensor], np.ndarray], done: dict[int, Any]) -> Any:
    """What came out of the pickle, with real arrays and plain dicts; parts that are shared stay shared."""
    if id(value) in done:
        if done[id(value)] is done:
            raise Refused("a part of it contains itself")
        return done[id(value)]
    done[id(value)] = done  # being made
    if isinstance(value, Tensor):
        plain = array(value)
    elif isinstance(value, Storage):
        plain = array(Tensor(value, 0, (value.count,), (1,)))
    elif isinstance(value, dict):
        plain = {key: _plain(part, array, done) for key, part in value.items()}
    elif type(value) in (list, tuple):
        plain = type(value)(_plain(part, array, done) for part in value)
    elif isinstance(value, str | bytes | int | float | bool | None):
        plain = value
    else:
        plain = value if isinstance(value, NotRead) else NotRead()
    done[id(value)] = plain
    return plain


def _tensors(value: Any) -> dict[str, np.ndarray]:
    """The named arrays of a mapping; none of anything else."""
    if not isinstance(value, dict):
        return {}
    return {name: part for name, part in value.items() if isinstance(name, str) and isinstance(part, np.ndarray)}


def _listing(tree: Any) -> str:
    if not isinstance(tree, dict):
        return f"a {type(tree).__name__}"
    names = [name for name in tree if isinstance(name, str)]
    lines = [
        f"{name!r} ({len(_tensors(tree[name]))} tensors)" if _tensors(tree[name]) else repr(name) for name in names
    ]
    return ", ".join(lines[:20] + ["..."] * (len(lines) > 20)) or "nothing that has a name"


def state_dict(tree: Any, path: str | pathlib.Path, key: str | None = None) -> dict[str, np.ndarray]:
    """The state dict among what a file holds: name -> array.

    Args:
      tree: of `load_tree`.
      path: for messages.
      key: take what lies under this key; None takes the only one of `USUAL_KEYS` that holds tensors, or else the top level.

    Raises:
      ValueError: no such key, no tensors, or several keys to choose from; lists what there is.
    """
    if key is not None:
        found = _tensors(tree.get(key)) if isinstance(tree, dict) else {}
        if not found:
            raise ValueError(f"{path} has no tensors under key={key!r}; it holds {_listing(tree)}")
        return _reported(found, tree, path, key)
    usual = [k for k in USUAL_KEYS if isinstance(tree, dict) and _tensors(tree.get(k))]
    if len(usual) > 1:
        raise ValueError(
            f"{path} holds several state dicts, {_listing({k: tree[k] for k in usual})}; keep one in a file of its own: "
            f"numpy.savez('weights.npz', **lumos_jax.encoders.torch_files.load({str(path)!r}, key={usual[0]!r}))"
        )
    if usual:
        return _reported(_tensors(tree[usual[0]]), tree, path, usual[0])
    if not _tensors(tree):
        raise ValueError(
            f"{path} has no tensors at its top level or under {', '.join(USUAL_KEYS)}; it holds {_listing(tree)}"
        )
    return _reported(_tensors(tree), tree, path, None)


def _reported(found: dict[str, np.ndarray], tree: dict, path: str | pathlib.Path, key: str | None):
    """The tensors that were found, after refusing to leave out arrays that may belong to them, and telling what is left."""
    arrays = [
        repr(name) for name, part in (tree if key is None else tree[key]).items() if isinstance(part, NotReadArray)
    ]
    if arrays:
        named = ", ".join(arrays[:5] + ["..."] * (len(arrays) > 5))
        raise ValueError(
            f"{path} holds NumPy arrays among its tensors ({named}), and of PyTorch's files only tensors are read: save all of "
            "the state dict as tensors, or all of it with numpy.savez"
        )
    left = {name: part for name, part in tree.items() if name not in found and name != key}
    if key is not None or left:
        where = "the top level" if key is None else repr(key)
        logging.getLogger(__name__).info("%s: took %d tensors of %s; left %s", path, len(found), where, _listing(left))
    return found


def load(path: str | pathlib.Path, key: str | None = None) -> dict[str, np.ndarray]:
    """A file's state dict: name -> read-only array. Arguments and errors as in `load_tree` and `state_dict`."""
    return state_dict(load_tree(path), path, key)
