"""WebDataset shards: .tar files in which the files of a record share their name up to the first dot.

    0001.jpg  0001.txt  0001.json  0002.jpg  0002.txt ...

A .tar has no table of contents, so that its headers are read once, and where the images and captions lie is kept in a file;
after that any record is one read at a known place. What is compressed as a whole (.tar.gz) has no such places.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import tarfile
import zipfile
from concurrent import futures

import numpy as np
import tqdm
from absl import logging

from lumos_jax import fileio
from lumos_jax.data.base import Captions, CorruptRecord, Data, HasCaptions, Source, digest, printable, register
from lumos_jax.data.captions import DETAILED_NAMES, RAW_NAMES, decode_text, one_line
from lumos_jax.data.files import IMAGE_ENDINGS, Names, find_shards, open_regular, read_npy

_IMAGE, _RAW, _DETAILED, _JSON = range(4)  # columns of an index
_ENDINGS = dict.fromkeys(IMAGE_ENDINGS, _IMAGE) | {".txt": _RAW, ".detailed.txt": _DETAILED, ".json": _JSON}
_LONGEST_FIRST = sorted(_ENDINGS, key=len, reverse=True)
_READERS = 16  # threads that read headers: they mostly wait for the disk
_PROGRESS_FROM = 100  # shards from which that takes long enough to be reported
_BLOCK = tarfile.BLOCKSIZE
_INDEX_VERSION = 2


@register("webdataset")
class TarSource(Source, HasCaptions):
    """Records of .tar shards, in the order of the shards' names and of the images in them.

    A record is an image (`a.jpg`, or another ending of an image); its captions are `a.txt` and `a.detailed.txt`, or fields
    `caption` (`text`, `txt`) and `detailed` (`caption_detailed`) of `a.json`, the text files first. A name with dots in it
    (`1.5 km.jpg`) is a record of its own unless what stands before its first dot is one (`a.mask.png` belongs to `a.jpg`). Of a
    name that stands twice, the last counts, as for tar. Files of other endings are left out, and records without an image too.

    Args:
      path: a directory of *.tar, a glob, or a file.
      kept: directory for the places, under the shard's path, size and time of change; None: nowhere.

    Raises:
      ValueError: no shards there, one that is compressed, truncated or something else, or no images in them.
    """

    needs = "path"

    def __init__(self, path: str, kept: pathlib.Path | None = None):
        self.paths = find_shards(path, lambda name: name.endswith(".tar"))
        if not self.paths:
            raise ValueError(f"config.data.path={path!r}: no .tar shards there (a directory is searched for *.tar)")
        with futures.ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(lambda shard: _index_of(shard, kept), self.paths)
            count = len(self.paths)
            found = list(tqdm.tqdm(found, "indices of shards", count, disable=count < _PROGRESS_FROM))
        self._ends = list(itertools.accumulate(len(one.names) for one in found))
        left_out = sum((one.left_out for one in found), collections.Counter())
        for reason, number in sorted(left_out.items()):
            logging.warning("%s: %d %s", path, number, reason)
        if not self._ends[-1]:
            raise ValueError(f"config.data.path={path!r}: the {count} .tar shards there hold no images")
        self.names = Names(itertools.chain.from_iterable(one.names for one in found))
        self._offsets = np.concatenate([one.places[..., 0] for one in found])
        self._sizes = np.concatenate([one.places[..., 1] for one in found])

    @classmethod
    def open(cls, data: Data) -> TarSource:
        return cls(data.path, fileio.cache_directory("tars"))

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        return self._bytes(index, _IMAGE)

    def captions(self, index: int) -> Captions:
        raw, detailed = (
            decode_text(self._bytes(index, column)) if self._sizes[index, column] >= 0 else None
            for column in (_RAW, _DETAILED)
        )
        fields = {}
        if self._sizes[index, _JSON] >= 0 and (raw is None or detailed is None):
            try:
                fields = json.loads(self._bytes(index, _JSON))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise CorruptRecord(f"its .json is none: {error}") from error
            fields = fields if isinstance(fields, dict) else {}
        raw = _field(fields, RAW_NAMES) if raw is None else raw
        detailed = _field(fields, DETAILED_NAMES) if detailed is None else detailed
        if raw is None and detailed is None:
            raise CorruptRecord("no caption: there is no .txt of its name, and no .json with a field caption")
        return raw or "", detailed or ""

    def describe(self, index: int) -> str:
        return f"{printable(self.paths[self._shard(index)])}#{printable(self.names[index])}"

    def fingerprint(self) -> str:
        return digest(
            (os.path.basename(p), os.path.getsize(p), end) for p, end in zip(self.paths, self._ends, strict=True)
        )

    def _shard(self, index: int) -> int:
        return bisect.bisect_right(self._ends, index)

    def _bytes(self, index: int, column: int) -> bytes:
        size = int(self._sizes[index, column])
        with open_regular(self.paths[self._shard(index)]) as file:
            data = os.pread(file.fileno(), size, int(self._offsets[index, column]))
        if len(data) < size:
            raise CorruptRecord("the shard is shorter than it was")
        return data


def _field(fields: dict, names: tuple[str, ...]) -> str | None:
    found = next((fields[name] for name in names if isinstance(fields.get(name), str)), None)
    return None if found is None else one_line(found)


@dataclasses.dataclass(frozen=True)
class _Index:
    """names: of the records. places: (records, 4, 2) int64, offset and size of each column's file, -1 where there is none.
    left_out: reason -> number of files or records."""

    names: list[str]
    places: np.ndarray
    left_out: collections.Counter


def _index_of(path: str, kept: pathlib.Path | None) -> _Index:
    if kept is None:
        return _read_headers(path)
    status = os.stat(path)
    file = kept / f"{digest([path, status.st_size, status.st_mtime_ns, _INDEX_VERSION])}.npz"
    if file.exists():
        try:
            with zipfile.ZipFile(file) as there:
                names, places, left_out = (
                    read_npy(there.read(f"{name}.npy")) for name in ("names", "places", "left_out")
                )
            names = names.tobytes().decode(errors="surrogateescape").split("\0")[:-1]
            return _Index(names, places.reshape(len(names), 4, 2), collections.Counter(json.loads(left_out.tobytes())))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            logging.warning("%s is no index of a shard (%s): it is made again", file, error)
    index = _read_headers(path)
    text = "".join(f"{name}\0" for name in index.names).encode(errors="surrogateescape")
    arrays = {"names": text, "left_out": json.dumps(index.left_out).encode()}
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as out:
            np.savez(out, places=index.places, **{k: np.frombuffer(v, np.uint8) for k, v in arrays.items()})
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    except OSError as error:
        logging.warning("the cache %s cannot be written to (%s): headers are read at each start", kept, error)
    return index


def _read_headers(path: str) -> _Index:
    """Raises ValueError: it is no .tar, or a damaged one."""
    places: dict[str, dict[int, tuple[int, int]]] = {}
    dotted: list[
        tuple[str, str, tuple[int, int]]
    ] = []  # (name, its known ending, place) where the first dot gives none
    left_out: collections.Counter = collections.Counter()

    def add(name: str, column: int, place: tuple[int, int]) -> None:
        files = places.setdefault(name, {})
        left_out["names stand twice in a shard, as after tar -r: the last counts"] += column in files
        files[column] = place

    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, ending = name.partition(".")
                place = member.offset_data, member.size
                if not member.isdir():
                    known = next((end for end in _LONGEST_FIRST if name.lower().endswith(end) and name != end), "")
                    if not member.isreg() or member.issparse() or not known or name.startswith("."):
                        left_out["files in shards are no images or captions and are left out"] += 1
                    elif f".{ending.lower()}" in _ENDINGS:
                        add(os.path.join(folder, stem), _ENDINGS[f".{ending.lower()}"], place)
                    else:
                        dotted.append((member.name, known, place))
                tar.members.clear()  # it would keep them all
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            # Python takes a damaged header, and the end of a truncated file, for the end of the archive.
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("it ends without an end mark, or is damaged there")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(
            f"{printable(path)} cannot be read as .tar: truncated, compressed, or something else ({error}). Fetch or write it "
            "again, uncompressed, or take it away"
        ) from error
    records = {name for name, files in places.items() if _IMAGE in files}
    for name, known, place in dotted:
        folder, base = os.path.split(name)
        if os.path.join(folder, base.partition(".")[0]) in records:
            left_out["files belong to an image of the name before their first dot and are left out"] += 1
        else:
            add(name[: -len(known)], _ENDINGS[known], place)
    found = {name: files for name, files in places.items() if _IMAGE in files}
    left_out["records in shards have no image and are left out"] += len(places) - len(found)
    table = np.array([files.get(i, (-1, -1)) for files in found.values() for i in range(4)], np.int64)
    return _Index(list(found), table.reshape(-1, 4, 2), +left_out)
