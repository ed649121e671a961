"""Where the records of .tar shards lie: headers are read once, in several processes, and kept in one small file a shard.

A .tar has no table of contents, only a header before each member (`tar_headers`). An index file holds a line of JSON, padded to
512 bytes, and (records, columns, 2) uint32: the first block of 512 bytes and the size of each image and of what belongs to it.
It is mapped into memory, so that processes share it.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from lumos_jax import fileio, progress
from lumos_jax.data import storage
from lumos_jax.data.base import digest, printable
from lumos_jax.data.files import IMAGE_ENDINGS, open_regular
from lumos_jax.data.listing import content_sample
from lumos_jax.data.storage import Entry
from lumos_jax.data.tar_headers import BLOCK, name_of, walk

IMAGE, RAW, DETAILED, JSON = range(4)  # columns
ENDINGS = dict.fromkeys(IMAGE_ENDINGS, IMAGE) | {".txt": RAW, ".detailed.txt": DETAILED, ".json": JSON}
_LONGEST_FIRST = sorted(ENDINGS, key=len, reverse=True)
_ABSENT = 0xFFFFFFFF  # as a size
_VERSION = 3
_PROCESSES_FROM = 64  # shards without an index, from which processes of their own read headers
_OPEN = 4096  # index files that a process has mapped


class Table(NamedTuple):
    """Of a shard. columns: which of IMAGE, RAW, DETAILED, JSON; places (records, columns, 2) uint32; left_out: reason -> number
    of files or records; sample: a hash of some of the content."""

    columns: tuple[int, ...]
    places: np.ndarray
    left_out: dict[str, int]
    sample: int

    def place(self, number: int, column: int) -> tuple[int, int] | None:
        """Offset and size in bytes; None: the record has no such file."""
        if column not in self.columns:
            return None
        block, size = map(int, self.places[number, self.columns.index(column)])
        return None if size == _ABSENT else (block * BLOCK, size)


def index_of(entry: Entry, kept: pathlib.Path | None) -> Table:
    """The kept table, or one that is made now. Raises ValueError: no .tar, or a damaged one; OSError: storage fails."""
    file = _file_of(entry, kept)
    if file is not None and (found := _load(file)) is not None:
        return found
    places, left_out = _read_headers(entry)
    columns = tuple(column for column in range(4) if column == IMAGE or (places[:, column, 1] != _ABSENT).any())
    table = Table(columns, np.ascontiguousarray(places[:, columns]), left_out, content_sample(entry))
    if file is None or not _save(file, table):
        return table
    return _load(file) or table


def make_all(entries: Sequence[Entry], kept: pathlib.Path | None) -> None:
    """Makes what tables are missing, if they are many, in as many processes as there are cores; shards that cannot be read are
    left to `index_of`."""
    missing = [entry for entry in entries if kept and not _file_of(entry, kept).exists()]
    if len(missing) < _PROCESSES_FROM:
        return
    code = "from lumos_jax.data import tar_index; tar_index.main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LUMOS_JAX_TAR_INDEX": str(kept)}
    count = min(len(os.sched_getaffinity(0)), len(missing) // 16)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(count)
    ]
    with progress.bar(description="headers of .tar shards", total=len(missing), unit="shard") as bar:

        def follow(process: subprocess.Popen) -> None:
            for line in process.stdout:
                bar.update(line == "done\n")

        followers = [threading.Thread(target=follow, args=(process,), daemon=True) for process in processes]
        try:
            for number, (process, follower) in enumerate(zip(processes, followers, strict=True)):
                follower.start()
                process.stdin.write(json.dumps(missing[number::count]))
                process.stdin.close()
            for follower in followers:
                follower.join()
        finally:
            for process in processes:
                process.kill()
                process.wait()
                process.stdout.close()


def main() -> None:
    """A process of `make_all`: entries in JSON from standard input, a line for each that is done."""
    kept = pathlib.Path(os.environ["LUMOS_JAX_TAR_INDEX"])
    for fields in json.load(sys.stdin):
        try:
            index_of(Entry(*fields), kept)
        except (ValueError, OSError):
            logging.debug("%s is left to the process that asked", fields)
        print("done", flush=True)


def member_name(path: str, offset: int) -> str:
    """The name of the member whose content lies there, of a long one the beginning. Raises OSError, ValueError."""
    name = name_of(storage.read(path, offset - BLOCK, BLOCK))
    ending = next((end for end in _LONGEST_FIRST if name.lower().endswith(end)), "")
    return name[: len(name) - len(ending)]


def _file_of(entry: Entry, kept: pathlib.Path | None) -> pathlib.Path | None:
    name = digest([*entry, _VERSION])
    return kept and kept / name[:2] / f"{name}.index"


_lock = threading.Lock()
_tables: collections.OrderedDict[pathlib.Path, Table] = collections.OrderedDict()


def _load(file: pathlib.Path) -> Table | None:
    """A kept table, whose content is verified when a process first maps it; None: there is none, or a damaged one."""
    with _lock:
        if file in _tables:
            _tables.move_to_end(file)
            return _tables[file]
    try:
        with open(file, "rb") as opened:
            line = opened.readline()
            told = json.loads(line)
            begin = -(-len(line) // BLOCK) * BLOCK
            shape = told["records"], len(told["columns"]), 2
            if not shape[0]:
                places = np.zeros(shape, np.uint32)
            else:
                places = np.memmap(opened, np.uint32, "r", begin, shape)
        if os.path.getsize(file) != begin + places.nbytes or zlib.crc32(places) != told["crc"]:
            raise ValueError("its checksum is another")
        about = json.dumps([told["columns"], told["left_out"], told["sample"], told["records"]])
        if zlib.crc32(about.encode()) != told["about"]:
            raise ValueError("its checksum is another")
        table = Table(tuple(told["columns"]), places, told["left_out"], told["sample"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.warning("%s cannot be read (%s): it is made again", file, error)
        return None
    with _lock:
        _tables[file] = table
        while len(_tables) > _OPEN:
            _tables.popitem(last=False)
    return table


def _save(file: pathlib.Path, table: Table) -> bool:
    records, columns = len(table.places), list(table.columns)
    about = json.dumps([columns, table.left_out, table.sample, records])
    told = {"records": records, "columns": columns, "left_out": table.left_out, "sample": table.sample}
    line = json.dumps(told | {"crc": zlib.crc32(table.places), "about": zlib.crc32(about.encode())}).encode() + b"\n"
    content = line.ljust(-(-len(line) // BLOCK) * BLOCK, b"\0") + table.places.tobytes()
    try:
        fileio.write_whole(file, content, shared=True)
    except OSError as error:
        logging.warning("the cache %s cannot be written to (%s): shards are indexed at each start", file.parent, error)
        return False
    return True


def _read_headers(entry: Entry) -> tuple[np.ndarray, dict[str, int]]:
    """places (records, 4, 2) uint32 and what is left out, as Table. Raises as `index_of`."""
    places: dict[str, dict[int, tuple[int, int]]] = {}
    dotted: list[tuple[str, str, tuple[int, int]]] = []  # name, known ending, place: the first dot is not the ending's
    left_out: collections.Counter = collections.Counter()

    def add(name: str, column: int, place: tuple[int, int]) -> None:
        files = places.get(name)
        if files is None:
            files = places[name] = {}
        elif column in files:
            left_out["names stand twice in a shard, as after tar -r: the last counts"] += 1
        files[column] = place

    for path, offset, size in _members(entry):
        folder, _, name = path.rpartition("/")
        stem, _, ending = name.partition(".")
        column = ENDINGS.get(f".{ending}") if stem else None
        place = (offset // BLOCK, size)
        if column is not None and 0 <= size < _ABSENT:
            add(f"{folder}/{stem}" if folder else stem, column, place)
            continue
        known = next((end for end in _LONGEST_FIRST if name.lower().endswith(end) and stem), "")
        if not 0 <= size < _ABSENT or not known:
            left_out["files in shards are no images or captions and are left out"] += 1
        elif f".{ending.lower()}" == known:
            add(f"{folder}/{stem}" if folder else stem, ENDINGS[known], place)
        else:
            dotted.append((path, known, place))
    records = {name for name, files in places.items() if IMAGE in files}
    for name, known, place in dotted:
        folder, _, base = name.rpartition("/")
        stem = base.partition(".")[0]
        if (f"{folder}/{stem}" if folder else stem) in records:
            left_out["files belong to an image of the name before their first dot and are left out"] += 1
        else:
            add(name[: -len(known)], ENDINGS[known], place)
    found = [files for files in places.values() if IMAGE in files]
    left_out["records in shards have no image and are left out"] += len(places) - len(found)
    table = np.full((len(found), 4, 2), _ABSENT, np.uint32)
    for column in range(4):
        there = [(number, *files[column]) for number, files in enumerate(found) if column in files]
        if there:
            numbers, blocks, sizes = np.array(there, np.int64).T
            table[numbers, column] = np.stack([blocks, sizes], -1).astype(np.uint32)
    return table, dict(+left_out)


def _members(entry: Entry) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of what is in a .tar but folders; the size of what is no plain file is -1. Raises as `index_of`."""
    try:
        if storage.is_remote(entry.path):
            file = storage.open_read(entry.path)
            with file:
                yield from walk(lambda offset, size: (file.seek(offset), file.read(size))[1])
        else:
            with open_regular(entry.path) as file:
                number = file.fileno()
                yield from walk(lambda offset, size: os.pread(number, size, offset))
    except OSError as error:
        raise fileio.failure(error, f"{printable(entry.path)} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(
            f"{printable(entry.path)} cannot be read as .tar: truncated, compressed, or something else ({error}). Fetch or "
            "write it again, uncompressed, or take it away"
        ) from error
