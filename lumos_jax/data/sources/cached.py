"""The cache of frozen features on disk: one record's bytes, the manifest, and the source that training reads.

A cache is a directory of ArrayRecord shards, `shard-00000-of-00012.arrayrecord` and so on, with every record of another
source in that source's order. `plan.json`, written first, says what is being made; `manifest.json`, written last, says that it
is whole. A record describes itself (little-endian, no padding):

    "LMC1" | number uint64 | weight float32 | arrays uint8 | problem's length uint16 | problem, UTF-8
    and for each array: name's length uint8 | name | dtype's length uint8 | dtype | dims uint8 | each dim uint32 | its bytes

`preparation.cache` writes caches; this module knows no network.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lumos_jax import fileio
from lumos_jax.data import storage
from lumos_jax.data.base import Data, Source, digest, register
from lumos_jax.data.shards import InShards, Shards, count_records, read_all
from lumos_jax.data.sources.mixture import MixtureSource

FORMAT = 1
PLAN, MANIFEST = "plan.json", "manifest.json"
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
ALL_DTYPES = DTYPES | {"uint8": np.dtype(np.uint8), "int32": np.dtype(np.int32)}
_HEAD, _MAGIC = "<4sQfBH", b"LMC1"
_AGAIN = "run the command that makes it again, which goes on after the last whole shard"


@dataclasses.dataclass(frozen=True)
class Record:
    """One record. weight: 0 where the source's record could not be decoded; `problem` then says why."""

    number: int
    weight: float
    problem: str
    arrays: Mapping[str, np.ndarray]


def encode_record(record: Record) -> bytes:
    """Record -> bytes; `decode_record` is its inverse."""
    problem = record.problem.encode()
    parts = [struct.pack(_HEAD, _MAGIC, record.number, record.weight, len(record.arrays), len(problem)), problem]
    for name, array in record.arrays.items():
        assert array.dtype.name in ALL_DTYPES, array.dtype
        for text in (name.encode(), array.dtype.name.encode()):
            parts += [struct.pack("<B", len(text)), text]
        parts += [struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape), array.tobytes()]
    return b"".join(parts)


def decode_record(data: bytes) -> Record:
    """Bytes -> Record; its arrays are views of `data`. Raises ValueError: these bytes are no such record."""
    place = 0

    def take(layout: str) -> Any:
        nonlocal place
        values = struct.unpack_from(layout, data, place)
        place += struct.calcsize(layout)
        return values

    def text(length: int) -> str:
        return take(f"<{length}s")[0].decode()

    try:
        magic, number, weight, count, length = take(_HEAD)
        if magic != _MAGIC:
            raise ValueError("begins otherwise")
        problem, arrays = text(length), {}
        for _ in range(count):
            name, dtype = text(*take("<B")), ALL_DTYPES[text(*take("<B"))]
            shape = take(f"<{take('<B')[0]}I")
            arrays[name] = np.frombuffer(data, dtype, math.prod(shape), place).reshape(shape)
            place += arrays[name].nbytes
        if place != len(data):
            raise ValueError(f"{len(data) - place} bytes too many")
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"no record of a cache: {error}") from error
    return Record(number, weight, problem, arrays)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a whole cache holds.

    Attributes:
      made_by: "group.field" -> value of what decided the content, as in plan.json: "data.fingerprint" of the source,
        "encoder.identity", "autoencoder.identity", "data.image_size", "cache.dtype" and others.
      arrays: name -> (dtype, shape) of what each record holds; -1 stands for a length that differs from record to record.
      records: how many there are.
      undecodable: how many of them have weight 0.
      parts: (records, weight) of each source of a mixture; of another source, one such pair.
      shards: (file name, records, bytes) of each shard.
    """

    made_by: Mapping[str, Any]
    arrays: Mapping[str, tuple[str, tuple[int, ...]]]
    records: int
    undecodable: int
    parts: tuple[tuple[int, float], ...]
    shards: tuple[tuple[str, int, int], ...]


def described(arrays: Mapping[str, np.ndarray], ragged: Collection[str] = ()) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype, shape) of a record's arrays, as Manifest.arrays has it; the first dim of `ragged` ones is -1."""
    shapes = {name: (-1, *array.shape[1:]) if name in ragged else array.shape for name, array in arrays.items()}
    return {name: (array.dtype.name, shapes[name]) for name, array in arrays.items()}


def of_text(text: str) -> np.ndarray:
    """A text as a record keeps it: (bytes,) uint8 of its UTF-8; `to_text` is its inverse."""
    return np.frombuffer(text.encode(), np.uint8)


def to_text(array: np.ndarray) -> str:
    return array.tobytes().decode(errors="replace")


def shard_name(number: int, count: int) -> str:
    return f"shard-{number:05d}-of-{count:05d}.arrayrecord"


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
    """The object in the file; None if there is no file. Raises ValueError: not JSON, or written by another version."""
    try:
        tree = json.loads(storage.read(os.fspath(path)).decode())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): remove the file and {_AGAIN}") from error
    if tree.get("format") != FORMAT:
        found = f"{path} has format {tree.get('format')!r}, and this version reads {FORMAT}"
        raise ValueError(f"{found}: make the cache anew elsewhere")
    return tree


def write_manifest(directory: pathlib.Path, manifest: Manifest) -> None:
    fileio.save_json({"format": FORMAT, **dataclasses.asdict(manifest)}, directory / MANIFEST)


def read_manifest(path: str) -> Manifest:
    """The manifest of the cache in that directory.
    Raises ValueError: there is none, so that the cache is not finished or is no cache."""
    directory = _directory(path)
    tree = read_json(storage.join(directory, MANIFEST))
    if tree is None:
        begun, none = f"this cache is not finished; {_AGAIN}", "no cache is there; python -m lumos_jax.prepare cache"
        state = begun if storage.exists(storage.join(directory, PLAN)) else none
        raise ValueError(f"config.data.path={path!r} has no {MANIFEST}: {state} (--out={path})")
    return Manifest(
        made_by=tree["made_by"],
        arrays={name: (dtype, tuple(shape)) for name, (dtype, shape) in tree["arrays"].items()},
        records=tree["records"],
        undecodable=tree["undecodable"],
        parts=tuple(map(tuple, tree["parts"])),
        shards=tuple(map(tuple, tree["shards"])),
    )


def _directory(path: str) -> str:
    return path if storage.is_remote(path) else os.path.abspath(os.path.expanduser(path))


def shard_is_whole(path: pathlib.Path, records: int) -> bool:
    """Whether a shard is there and its index, which stands at its end, counts that many records."""
    try:
        return path.is_file() and count_records(str(path)) == records
    except ValueError:
        return False


def read_shard(path: pathlib.Path) -> Iterator[Record]:
    """The records of a shard in turn. Raises ValueError, CorruptRecord (damage) or OSError."""
    return map(decode_record, read_all(str(path)))


@register("cached")
class CachedSource(InShards, Source):
    """`count` records of a cache from record `first` on. `read` gives the bytes that `decode_record` takes."""

    needs = "path"
    in_mixture = False

    def __init__(self, directory: str, manifest: Manifest, first: int, count: int):
        shards, self.remote = manifest.shards, storage.is_remote(directory)
        names, counts, sizes = zip(*shards, strict=True) if shards else ((), (), ())
        self.shards = Shards([storage.join(directory, name) for name in names], counts, sizes=sizes)
        self.first, self._count = first, count
        self._fingerprint = digest([manifest.made_by, manifest.arrays, shards, first, count])

    @classmethod
    def open(cls, data: Data) -> Source:
        """The cache at config.data.path; that of a mixture is a mixture again, in the same order.
        Raises ValueError: no manifest, or a shard that is missing, truncated or another one; names it."""
        manifest, directory = read_manifest(data.path), _directory(data.path)
        there = {entry.path.rpartition("/")[2]: entry for entry in storage.list_files(directory, "*.arrayrecord")}
        for name, count, size in manifest.shards:
            if name not in there:
                wrong = "is missing"
            elif there[name].size != size:
                wrong = f"has {there[name].size} bytes, not {size}"
            elif not (storage.is_remote(directory) or shard_is_whole(pathlib.Path(there[name].path), count)):
                wrong = f"does not hold {count} records that can be read"
            else:
                continue
            raise ValueError(f"config.data.path={data.path!r}: {name} {wrong}. To write this shard anew, {_AGAIN}")
        counts, weights = zip(*manifest.parts, strict=True)
        starts = itertools.accumulate(counts, initial=0)
        parts = [cls(directory, manifest, start, count) for start, count in zip(starts, counts, strict=False)]
        return parts[0] if len(parts) == 1 else MixtureSource(parts, weights)

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> bytes:
        return self.record(index)

    def fingerprint(self) -> str:
        return self._fingerprint
