"""WebDataset shards: .tar files in which the files of a record share their name up to the first dot.

    0001.jpg  0001.txt  0001.json  0002.jpg  0002.txt ...

A .tar has no table of contents, so that its headers are read once, and where the images and captions lie is kept in a file;
after that any record is one read at a known place. What is compressed as a whole (.tar.gz) has no such places.
"""

from __future__ import annotations

import bisect
import collections
import functools
import itertools
import json
import os
import pathlib
import tarfile
from collections.abc import Iterator

import numpy as np
from absl import logging
from tqdm.contrib.concurrent import thread_map

from lumos_jax import fileio
from lumos_jax.data.base import Captions, CorruptRecord, Data, HasCaptions, Source, digest, printable, register
from lumos_jax.data.captions import captions_of_json, decode_text
from lumos_jax.data.files import IMAGE_ENDINGS, Names, find_shards, made_once, open_regular, shards_digest

_IMAGE, _RAW, _DETAILED, _JSON = range(4)  # columns of an index
_ENDINGS = dict.fromkeys(IMAGE_ENDINGS, _IMAGE) | {".txt": _RAW, ".detailed.txt": _DETAILED, ".json": _JSON}
_LONGEST_FIRST = sorted(_ENDINGS, key=len, reverse=True)
_READERS = 16  # threads that read headers: they mostly wait for the disk
_PROGRESS_FROM = 100  # shards from which that takes long enough to be reported
_INDEX_VERSION = 2


@register("webdataset")
class TarSource(Source, HasCaptions):
    """Records of .tar shards, in the order of the shards' names and of the images in them.

    A record is an image (`a.jpg`, or another ending of an image); its captions are `a.txt` and `a.detailed.txt`, or fields
    `caption` (`text`, `txt`) and `detailed` (`caption_detailed`) of `a.json`, the text files first. A name with dots in it
    (`1.5 km.jpg`) is a record of its own unless what stands before its first dot is one (`a.mask.png` belongs to `a.jpg`). Of a
    name that stands twice, the last counts, as for tar. Files of other endings are left out, and records without an image too.

    kept: directory for the places, under the shard's path, size and time of change; None: nowhere.
    Raises ValueError: no shards there, one that is compressed, truncated or something else, or no images in them.
    """

    needs = "path"

    def __init__(self, path: str, kept: pathlib.Path | None = None):
        self.paths = find_shards(path, ".tar", "*.tar")
        count, left_out = len(self.paths), collections.Counter()
        quiet = count < _PROGRESS_FROM
        index = functools.partial(_index_of, kept=kept)
        found = thread_map(index, self.paths, max_workers=_READERS, desc="indices of shards", disable=quiet)
        for one in found:
            left_out.update(json.loads(one["left_out"].tobytes()))
        for reason, number in sorted(left_out.items()):
            logging.warning("%s: %d %s", path, number, reason)
        self._ends = list(itertools.accumulate(len(one["places"]) for one in found))
        if not self._ends[-1]:
            raise ValueError(f"config.data.path={path!r}: the {count} .tar shards there hold no images")
        names = b"".join(one["names"].tobytes() for one in found)
        self.names = Names(os.fsdecode(name) for name in names.split(b"\0")[:-1])
        self._places = np.concatenate([one["places"] for one in found])

    @classmethod
    def open(cls, data: Data) -> TarSource:
        return cls(data.path, fileio.cache_directory("tars"))

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        return self._bytes(index, _IMAGE)

    def captions(self, index: int) -> Captions:
        files = (self._bytes(index, _RAW), self._bytes(index, _DETAILED))
        texts = [None if file is None else decode_text(file) for file in files]
        if None in texts and (file := self._bytes(index, _JSON)) is not None:
            told = captions_of_json(file)
            texts = [other if text is None else text for text, other in zip(texts, told, strict=True)]
        if texts == [None, None]:
            raise CorruptRecord("no caption: there is no .txt of its name, and no .json with a field caption")
        return tuple(text or "" for text in texts)

    def describe(self, index: int) -> str:
        return f"{printable(self._shard(index))}#{printable(self.names[index])}"

    def fingerprint(self) -> str:
        return shards_digest(self.paths, self._ends)

    def _shard(self, index: int) -> str:
        return self.paths[bisect.bisect_right(self._ends, index)]

    def _bytes(self, index: int, column: int) -> bytes | None:
        offset, size = map(int, self._places[index, column])
        if size < 0:
            return None
        with open_regular(self._shard(index)) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) < size:
            raise CorruptRecord("the shard is shorter than it was")
        return data


def _index_of(path: str, kept: pathlib.Path | None) -> dict[str, np.ndarray]:
    """Of a shard: `names` of the records, each ended by a zero byte; `places` (4 records, 2) int64, offset and size of each
    column's file, -1 where there is none; `left_out`, JSON: reason -> number of files or records."""
    status = os.stat(path)
    name = digest([path, status.st_size, status.st_mtime_ns, _INDEX_VERSION])
    return made_once(kept and kept / f"{name}.npz", ("names", "places", "left_out"), lambda: _read_headers(path))


def _read_headers(path: str) -> dict[str, np.ndarray]:
    """As `_index_of`. Raises ValueError: it is no .tar, or a damaged one."""
    places: dict[str, dict[int, tuple[int, int]]] = {}
    dotted: list[tuple[str, str, tuple[int, int]]] = []  # name, known ending, place: the first dot is not the ending's
    left_out: collections.Counter = collections.Counter()

    def add(name: str, ending: str, place: tuple[int, int]) -> None:
        files, column = places.setdefault(name, {}), _ENDINGS[ending]
        left_out["names stand twice in a shard, as after tar -r: the last counts"] += column in files
        files[column] = place

    for member in _members(path):
        folder, name = os.path.split(member.name)
        stem, _, ending = name.partition(".")
        known = next((end for end in _LONGEST_FIRST if name.lower().endswith(end) and stem), "")
        if not member.isreg() or member.issparse() or not known:
            left_out["files in shards are no images or captions and are left out"] += 1
        elif f".{ending.lower()}" == known:
            add(os.path.join(folder, stem), known, (member.offset_data, member.size))
        else:
            dotted.append((member.name, known, (member.offset_data, member.size)))
    records = {name for name, files in places.items() if _IMAGE in files}
    for name, known, place in dotted:
        folder, base = os.path.split(name)
        if os.path.join(folder, base.partition(".")[0]) in records:
            left_out["files belong to an image of the name before their first dot and are left out"] += 1
        else:
            add(name[: -len(known)], known, place)
    found = {name: files for name, files in places.items() if _IMAGE in files}
    left_out["records in shards have no image and are left out"] += len(places) - len(found)
    names = "".join(f"{name}\0" for name in found).encode(errors="surrogateescape")
    table = [files.get(column, (-1, -1)) for files in found.values() for column in range(4)]
    texts = {"names": names, "left_out": json.dumps(+left_out).encode()}
    arrays = {name: np.frombuffer(text, np.uint8) for name, text in texts.items()}
    return arrays | {"places": np.array(table, np.int64).reshape(-1, 4, 2)}


def _members(path: str) -> Iterator[tarfile.TarInfo]:
    """What is in a .tar, but for folders. Raises ValueError: it is none, or a damaged one."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isdir():
                    yield member
                tar.members.clear()  # it would keep them all
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            # Python takes a damaged header, and the end of a truncated file, for the end of the archive.
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it ends without an end mark, or is damaged there")
    except OSError as error:
        raise fileio.failure(error, f"{printable(path)} cannot be read: {error}") from error
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(
            f"{printable(path)} cannot be read as .tar: truncated, compressed, or something else ({error}). Fetch or write it "
            "again, uncompressed, or take it away"
        ) from error
