"""PyTorch's pickles -> inert records, without running anything that they ask for.

A pickle is a small program that may call whatever its reader looks up by name. Ours looks names up in one closed table of
things made here: a tensor becomes a plain record of numbers; what training keeps beside its weights (arguments, devices, sets,
paths, NumPy's scalars and arrays) becomes `NotRead`; and any other name is refused. Nothing within a pickle's reach can be
changed by it or given attributes of its choosing. Records are claims, not yet checked against any file: `torch_files` does
that.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: Mapping[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "UntypedStorage": np.dtype("u1"),
}
_TORCH_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# Opcodes that reach around `find_class`: copyreg's extension registry and out-of-band buffers.
_REFUSED_OPCODES = ("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER")
_BROKEN_PICKLE = (
    pickle.UnpicklingError, ValueError, EOFError, AttributeError, TypeError, LookupError, ArithmeticError, MemoryError,
    RecursionError, struct.error,
    Warning,  # of odd escapes in text, where warnings are errors
)  # fmt: skip


class Refused(ValueError):
    """Why a file is refused; the path is put before it where it is known."""


# What a pickle may hold. Tuples have neither a __dict__ nor a __setstate__, so that BUILD cannot give them a state.


class _StorageType(NamedTuple):
    name: str


class Storage(NamedTuple):
    kind: str  # of DTYPES
    key: str
    first: int  # elements
    count: int  # elements


class Tensor(NamedTuple):
    storage: Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


class _Dict(dict):
    """An OrderedDict's contents. Its attributes (a state dict's _metadata) are not kept."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class _Unchanging(type):
    """A class whose attributes a pickle cannot set."""

    def __setattr__(cls, name, value):
        raise AttributeError(f"{name} cannot be set")


class NotRead(metaclass=_Unchanging):
    """Stands for a value that is no tensor and is not looked into: training arguments, devices, NumPy scalars."""

    __slots__ = ()

    def __new__(cls, *args, **named):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass

    def __repr__(self):
        return f"{type(self).__name__}()"


class NotReadArray(NotRead):
    """Stands for a NumPy array, of which nothing is kept, not even its size."""

    __slots__ = ()


class _StandIn:
    """A function of ours as a pickle sees it: it can be called and nothing else."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable):
        object.__setattr__(self, "_run", run)

    def __setattr__(self, name, value):
        raise AttributeError(f"{name} cannot be set")

    def __call__(self, *args):
        return self._run(*args)


def _numbers(values: Any) -> tuple[int, ...]:
    """Shapes, strides and counts: few, whole, not negative, and within 63 bits (so that messages can print them)."""
    good = isinstance(values, tuple | list) and len(values) <= 64
    if not good or not all(type(v) is int and 0 <= v < 2**63 for v in values):
        raise Refused("a tensor's shape, stride or place is not made of a few non-negative integers")
    return tuple(values)


def _rebuild_tensor(storage, offset, shape, strides, *more):
    """`more` is requires_grad, hooks and, since 2.0, flags of lazily conjugated or negated tensors."""
    if not isinstance(storage, Storage):
        raise Refused("a tensor is built on something that is no storage")
    if len(more) > 2 and more[2]:
        raise Refused(
            "a tensor is stored as conjugated or negated; call resolve_conj() and resolve_neg() before saving"
        )
    shape, strides = _numbers(shape), _numbers(strides)
    if len(shape) != len(strides):
        raise Refused(f"a tensor has shape {shape} but strides {strides}")
    return Tensor(storage, *_numbers([offset]), shape, strides)


def _rebuild_parameter(tensor, *_):
    if not isinstance(tensor, Tensor):
        raise Refused("a parameter is built on something that is no tensor")
    return tensor


def _ordered_dict(pairs=()):
    if not isinstance(pairs, tuple | list):
        raise Refused("an OrderedDict is built on something that is no list of pairs")
    return _Dict((key, value) for key, value in pairs)


def _size(numbers=()):
    return _numbers(numbers)


def _default_dict(factory=None):
    return _Dict()


def _numpy_array(*described):
    return NotReadArray()


# What real training checkpoints hold beside their weights. Sets and such stand under Python 2's names in protocol 2.
_BUILTINS = (
    "set",
    "frozenset",
    "list",
    "dict",
    "tuple",
    "int",
    "float",
    "str",
    "bytearray",
    "complex",
    "slice",
    "range",
)
_BESIDE = (
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("collections", "Counter"),
    ("datetime", "datetime"),
    ("datetime", "timedelta"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "device"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),  # how protocol 2 spells the bytes of NumPy's scalars and arrays
    *((module, name) for module in ("builtins", "__builtin__") for name in _BUILTINS),
)


_GLOBALS: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _StandIn(_ordered_dict),
    ("torch._utils", "_rebuild_tensor"): _StandIn(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _StandIn(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _StandIn(_rebuild_parameter),
    ("torch", "Size"): _StandIn(_size),
    ("torch.storage", "UntypedStorage"): _StorageType("UntypedStorage"),
    **{("torch", name): _StorageType(name) for name in DTYPES},
    **{("torch", name): f"torch.{name}" for name in _TORCH_DTYPES},
    ("collections", "defaultdict"): _StandIn(_default_dict),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _StandIn(_numpy_array) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _StandIn(_numpy_array) for core in ("core", "_core")},
    **dict.fromkeys(_BESIDE, NotRead),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file):
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.counts: dict[str, tuple[str, int]] = {}  # storage key -> kind, elements of the whole storage

    def find_class(self, module, name):
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise Refused(
                f"it asks for {f'{module}.{name}'!r}, which weights do not need; it was not looked up and nothing "
                "was run. Where you trust the file, load it with PyTorch and save the state dict alone: "
                "torch.save(model.state_dict(), 'weights.pth')"
            ) from None

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
            raise Refused(
                "it refers to something else than a storage, as a pickled module does; save the state dict alone"
            )
        _, kind, key, _, count, *view = pid
        if not isinstance(kind, _StorageType) or not isinstance(key, str):
            raise Refused("a storage has no known type or no name")
        (count,) = _numbers([count])
        if self.counts.setdefault(key, (kind.name, count)) != (kind.name, count):
            raise Refused(f"storage {key!r} is described in two ways")
        first = 0
        if view and view[0] is not None:  # a storage that is a part of another: (its own key, first, count)
            first, count = _numbers(view[0][1:])
        return Storage(kind.name, key, first, count)


def unpickle(file: Any, path: pathlib.Path) -> tuple[Any, dict[str, tuple[str, int]]]:
    """The next pickle of `file`, read up to its end and no further, and the storages that it names."""
    start = file.tell()
    try:
        for opcode, argument, position in pickletools.genops(file):
            if opcode.name in _REFUSED_OPCODES:
                raise Refused(f"it uses {opcode.name}, which weights do not need")
            if opcode.name.endswith("PUT") and argument > position:
                raise Refused(f"it asks for {argument} places in memory, more than it can fill")
        end = file.tell()
        file.seek(start)
        unpickler = _Unpickler(io.BytesIO(file.read(end - start)))
        return unpickler.load(), unpickler.counts
    except Refused as refused:
        raise ValueError(f"{path} is refused: {refused}") from None
    except _BROKEN_PICKLE as error:
        raise ValueError(
            f"{path} is damaged, cut short or no file of torch.save ({type(error).__name__}: {str(error)[:200]})"
        ) from error
