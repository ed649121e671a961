"""Samples on disk: shards of a numbered list, each written whole, with the protocol that it was made by and a digest.

A directory holds `list.jsonl`, `protocol.json` and `shard_00000.npz` and so on. Shard k holds items k S to (k + 1) S - 1:

    pixels     uint8 (n, [F,] H, W, 3)
    reference  the same of the true or reference images, where they are known
    ids        (n,) strings
    header     JSON: the protocol and the SHA-256 of pixels, reference and ids

A job that is started again makes the shards that are missing, on any number of processes. `Samples` reads a directory that is
complete, and refuses any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lumos_jax import fileio
from lumos_jax.evaluation.lists import ItemList, read_list

SHARD_SIZE = 500
Protocol = Mapping[str, Any]  # what decides pixels: plain values, compared by name


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """Writes the shards of a list into a directory. See `open_job`."""

    directory: pathlib.Path
    items: ItemList
    protocol: Protocol

    def numbers(self, shard: int) -> range:
        """The items of a shard."""
        size = self.protocol["shard_size"]
        return range(shard * size, min((shard + 1) * size, len(self.items)))

    def __len__(self) -> int:
        return -(-len(self.items) // self.protocol["shard_size"])

    def missing(self) -> list[int]:
        """The shards that are not there. Raises ValueError for one of another protocol or list, or that cannot be read."""
        found = [k for k in range(len(self)) if _path(self.directory, k).exists()]
        for shard in found:
            path = _path(self.directory, shard)
            header, arrays = _open(path, ("ids",))
            _check(self, shard, path, header, arrays["ids"])
        return sorted(set(range(len(self))) - set(found))

    def write(self, shard: int, pixels: np.ndarray, reference: np.ndarray | None) -> None:
        arrays = {"pixels": pixels, "ids": np.array([self.items.items[i].id for i in self.numbers(shard)])}
        if reference is not None:
            arrays["reference"] = reference
        assert len(pixels) == len(arrays["ids"])
        assert pixels.dtype == np.uint8
        header = json.dumps({"protocol": dict(self.protocol), "sha256": _digest(arrays)})
        with fileio.replacing(_path(self.directory, shard)) as partial, open(partial, "wb") as file:
            np.savez(file, header=np.array(header), **arrays)


def open_job(directory: str | pathlib.Path, items: ItemList, protocol: Protocol) -> ShardWriter:
    """A directory for the samples of a list, new or begun by the same job.

    protocol: of the samples; what a list says of itself is added.

    Raises:
      ValueError: the directory holds samples of another list or protocol; names the field that differs.
    """
    directory = pathlib.Path(directory)
    own = {"list": items.name, "list_digest": items.digest, "num": len(items), **protocol}
    path = directory / "protocol.json"
    if path.exists():
        _compare(read_protocol(directory), own, directory)
    else:
        items.save(directory / "list.jsonl")
        fileio.save_json(own, path)
    return ShardWriter(directory, items, own)


def read_protocol(directory: str | pathlib.Path) -> Protocol:
    """Raises ValueError if there is none or it is damaged, and OSError where storage fails."""
    try:
        return json.loads((pathlib.Path(directory) / "protocol.json").read_text())
    except OSError as error:
        raise fileio.failure(error, f"{directory} holds no samples of lumos_jax.evaluate: {error}") from error
    except ValueError as error:
        raise ValueError(f"{directory}/protocol.json is damaged: {error}") from error


class Samples:
    """The samples of a complete directory, in the order of their list: iterates (shard number, ids, pixels).

    Attributes:
      directory, items, protocol: of the samples.

    Raises:
      ValueError: missing, duplicate, unlisted or permuted ids, another number than the protocol declares, another list or
        protocol, or damage; the message names the file.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory, self.protocol = pathlib.Path(directory), read_protocol(directory)
        listed = read_list(self.directory / "list.jsonl")
        self.items = ItemList(self.protocol["list"], listed.items)
        if self.items.digest != self.protocol["list_digest"]:
            raise ValueError(
                f"{self.directory}/list.jsonl is not the list that these samples were made of: its digest is "
                f"{self.items.digest[:12]}, and protocol.json says {self.protocol['list_digest'][:12]}"
            )
        if len(self.items) != self.protocol["num"]:
            raise ValueError(f"{self.directory} declares {self.protocol['num']} samples of a list of {len(self.items)}")
        self._shards = ShardWriter(self.directory, self.items, self.protocol)
        strange = sorted(
            set(self.directory.glob("shard_*.npz")) - {_path(self.directory, k) for k in range(self.shards)}
        )
        if strange:
            raise ValueError(f"{strange[0]} holds ids that are not in the list of {len(self.items)} items")
        missing = self._shards.missing()
        if missing:
            first = self._shards.numbers(missing[0])[0]
            raise ValueError(
                f"{self.directory} lacks {len(missing)} of {self.shards} shards, the first with id "
                f"{self.items.items[first].id!r}: run `evaluate sample` again to complete them"
            )

    def __len__(self) -> int:
        return len(self.items)

    @property
    def shards(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[tuple[int, list[str], np.ndarray]]:
        for shard in range(self.shards):
            arrays = self._read(shard, ("pixels",))
            yield shard, arrays["ids"].tolist(), arrays["pixels"]

    def references(self, shard: int) -> np.ndarray | None:
        """The true or reference images of a shard, as its pixels; None where they are not known."""
        return self._read(shard, ("reference",)).get("reference")

    def digests(self) -> list[str]:
        """The SHA-256 of each shard's content."""
        return [_open(_path(self.directory, shard), ())[0]["sha256"] for shard in range(self.shards)]

    def verify(self) -> None:
        """Reads all of it. Raises ValueError if content is not what was written."""
        for shard in range(self.shards):
            self._read(shard, ("pixels", "reference"), whole=True)

    def _read(self, shard: int, names: tuple[str, ...], whole: bool = False) -> dict[str, np.ndarray]:
        path = _path(self.directory, shard)
        header, arrays = _open(path, ("ids", *names))
        _check(self._shards, shard, path, header, arrays["ids"])
        if whole and _digest(arrays) != header["sha256"]:
            raise ValueError(f"{path} is damaged: its content has another digest than when it was written")
        return arrays


def _path(directory: pathlib.Path, shard: int) -> pathlib.Path:
    return directory / f"shard_{shard:05d}.npz"


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    state = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        state.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        state.update(np.ascontiguousarray(array).data if array.dtype.kind == "u" else array.tobytes())
    return state.hexdigest()


def _open(path: pathlib.Path, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and those of the arrays that there are; each has a checksum of its own, which reading verifies."""
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            return json.loads(str(file["header"])), {name: file[name] for name in names if name in file.files}
    except OSError as error:
        raise fileio.failure(error, f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and run `evaluate sample` again") from error


def _check(writer: ShardWriter, shard: int, path: pathlib.Path, header: Mapping[str, Any], ids: np.ndarray) -> None:
    """Raises ValueError unless a shard is of this protocol and holds its items, in order."""
    _compare(header["protocol"], writer.protocol, path)
    wanted, found = [writer.items.items[i].id for i in writer.numbers(shard)], ids.tolist()
    if found == wanted:
        return
    twice = [id for id in found if found.count(id) > 1]
    unlisted = sorted(set(found) - {item.id for item in writer.items.items})
    absent = sorted(set(wanted) - set(found))
    what = (
        f"id {twice[0]!r} occurs twice" if twice
        else f"id {unlisted[0]!r} is not in the list" if unlisted
        else f"id {absent[0]!r} is missing" if absent
        else "its ids are not in the list's order"
    )  # fmt: skip
    raise ValueError(f"{path}: {what}")


def _compare(found: Protocol, wanted: Protocol, where: pathlib.Path) -> None:
    """Raises ValueError, which names the fields, unless two protocols are equal."""
    wanted = json.loads(json.dumps(wanted))
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if names:
        lines = ", ".join(f"{name} {found.get(name)!r} there and {wanted.get(name)!r} here" for name in names)
        raise ValueError(f"{where} holds samples of another protocol ({lines}): give another --out")
