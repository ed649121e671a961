"""WebDataset shards: .tar files in which the files of a record share their name up to the first dot.

    0001.jpg  0001.txt  0001.json  0002.jpg  0002.txt ...

A .tar has no table of contents, so that its headers are read once, and where the pictures and captions lie is kept in a file;
after that any record is one read at a known place. What is compressed as a whole (.tar.gz) has no such places.
"""

from __future__ import annotations

import bisect
import glob
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

from lumos_jax.data import captions
from lumos_jax.data.sources import IMAGE_ENDINGS, Names, digest, printable

_PICTURE, _RAW, _DETAILED, _JSON = range(4)  # columns of an index
_ENDINGS = dict.fromkeys(IMAGE_ENDINGS, _PICTURE) | {".txt": _RAW, ".detailed.txt": _DETAILED, ".json": _JSON}
_READERS = 16  # threads that read headers: they mostly wait for the disk
_SAID_FROM = 100  # shards from which that takes long enough to be reported
_BLOCK = tarfile.BLOCKSIZE


class TarSource:
    """Records of .tar shards, in the order of the shards' names and of the pictures in them.

    A record is a picture (`a.jpg`, or another ending of an image); its captions are `a.txt` and `a.detailed.txt`, or fields
    `caption` (`text`, `txt`) and `detailed` (`caption_detailed`) of `a.json`, the text files first. Files of other endings are
    left out, and records without a picture too.

    Args:
      path: a directory of *.tar, a glob, or a file.
      index: directory in which the places are kept, under the shard's path, size and time of change; empty: nowhere.

    Raises:
      ValueError: no shards there, one that is compressed, truncated or something else, or no pictures in them.
    """

    def __init__(self, path: str, index: str = ""):
        given = pathlib.Path(path).expanduser().absolute()
        if given.is_dir():
            paths = sorted(str(p) for p in given.iterdir() if p.suffix == ".tar" and not p.name.startswith("."))
        else:
            paths = sorted(p for p in glob.glob(str(given), recursive=True) if os.path.isfile(p))
        if not paths:
            raise ValueError(f"config.data.path={path!r}: no .tar shards there (a directory is searched for *.tar)")
        kept = pathlib.Path(index).expanduser() if index else None
        with futures.ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(lambda shard: _index_of(shard, kept), paths)
            found = list(tqdm.tqdm(found, "indices of shards", len(paths), disable=len(paths) < _SAID_FROM))
        self.paths = paths
        self._ends = list(itertools.accumulate(len(names) for names, _, _ in found))
        if not self._ends[-1]:
            raise ValueError(f"config.data.path={path!r}: the {len(paths)} .tar shards there hold no pictures")
        self.names = Names(itertools.chain.from_iterable(names for names, _, _ in found))
        self._offsets = np.concatenate([offsets for _, offsets, _ in found])
        self._sizes = np.concatenate([sizes for _, _, sizes in found])

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        return self._bytes(index, _PICTURE)

    def captions(self, index: int) -> captions.Captions:
        raw, detailed = (self._text(index, column) for column in (_RAW, _DETAILED))
        told = {}
        if self._sizes[index, _JSON] >= 0 and (raw is None or detailed is None):
            try:
                told = json.loads(self._bytes(index, _JSON))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise OSError(f"its .json is none: {error}") from error
            told = told if isinstance(told, dict) else {}
        if raw is None:
            raw = _named(told, captions.RAW_NAMES)
        if detailed is None:
            detailed = _named(told, captions.DETAILED_NAMES)
        if raw is None and detailed is None:
            raise FileNotFoundError("no caption: there is no .txt of its name, and no .json with a field caption")
        return raw or "", detailed or ""

    def describe(self, index: int) -> str:
        return f"{printable(self.paths[self._shard(index)])}#{printable(self.names[index])}"

    def fingerprint(self) -> str:
        return digest(
            (os.path.basename(p), os.path.getsize(p), end) for p, end in zip(self.paths, self._ends, strict=True)
        )

    def _shard(self, index: int) -> int:
        return bisect.bisect_right(self._ends, index)

    def _text(self, index: int, column: int) -> str | None:
        if self._sizes[index, column] < 0:
            return None
        return " ".join(self._bytes(index, column).decode("utf-8", errors="replace").split())

    def _bytes(self, index: int, column: int) -> bytes:
        size = int(self._sizes[index, column])
        with open(self.paths[self._shard(index)], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, int(self._offsets[index, column]))
        if len(data) < size:
            raise OSError("the shard is shorter than it was")
        return data


def _named(told: dict, names: tuple[str, ...]) -> str | None:
    found = next((told[name] for name in names if isinstance(told.get(name), str)), None)
    return None if found is None else " ".join(found.split())


Index = tuple[
    list[str], np.ndarray, np.ndarray
]  # names; offsets int64 and sizes int32 (records, 4), -1 for what is not there


def _index_of(path: str, kept: pathlib.Path | None) -> Index:
    status = os.stat(path)
    file = kept and kept / f"{digest([path, status.st_size, status.st_mtime_ns])}.npz"
    if file and file.exists():
        try:
            with np.load(file) as there:
                return (
                    there["names"].tobytes().decode(errors="surrogateescape").split("\0")[:-1],
                    there["offsets"],
                    there["sizes"],
                )
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is no index of a shard ({error}): remove it") from error
    names, offsets, sizes = _read_headers(path)
    if file:
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        text = "".join(f"{name}\0" for name in names).encode(errors="surrogateescape")
        try:
            kept.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as out:
                np.savez(out, names=np.frombuffer(text, np.uint8), offsets=offsets, sizes=sizes)
            partial.replace(file)
        except OSError as error:
            raise ValueError(
                f"config.data.tar_index={str(kept)!r} cannot be written to ({error}): name another directory, or leave it "
                "empty to read the headers of all shards at each start"
            ) from error
    return names, offsets, sizes


def _read_headers(path: str) -> Index:
    """Raises ValueError: it is no .tar, or a damaged one."""
    places: dict[str, dict[int, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, ending = name.partition(".")
                column = _ENDINGS.get(f".{ending.lower()}")
                if column is not None and stem and member.isreg() and not member.issparse():
                    files = places.setdefault(os.path.join(folder, stem), {})
                    files.setdefault(column, (member.offset_data, member.size))
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
    whole = {name: files for name, files in places.items() if _PICTURE in files}
    if len(whole) < len(places):
        lacking = min(set(places) - set(whole))
        logging.warning(
            "%s: %d records have no picture and are left out, as %s", path, len(places) - len(whole), lacking
        )
    table = np.array([files.get(i, (-1, -1)) for files in whole.values() for i in range(4)], np.int64).reshape(-1, 4, 2)
    return list(whole), table[..., 0], table[..., 1].astype(np.int32)
