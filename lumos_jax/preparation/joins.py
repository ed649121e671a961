"""Scores of a collection's metadata by url or key, for images that were downloaded without them (LAION, COYO).

    DIR/metadata/<source>/hashes.u64    64-bit hashes of the urls or keys, ascending, all different
    DIR/metadata/<source>/scores.f32    (N, 4) in the order of scan_rows.SCORES, NaN where unknown
    DIR/metadata/<source>/done.json     the metadata files that are in them; written last

`build` makes them, once, on one machine: parquet files in turn are spread by hash over files in a temporary directory (24 bytes
a row), each of which is then sorted. A worker maps the two files, and finds a record by bisection. Of several rows with the
same url or key the first counts. 700M rows take 17 GB; any two of them share a hash with probability 0.013.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lumos_jax.data import storage
from lumos_jax.data.captions import one_line
from lumos_jax.preparation import files
from lumos_jax.preparation.readers.base import NAMES, Candidate
from lumos_jax.preparation.scan_rows import SCORES
from lumos_jax.preparation.settings import Source

_PARTS = 256
_ROWS = 100_000  # of a parquet file at a time
_ROW = np.dtype([("hash", "<u8"), ("scores", "<f4", (len(SCORES),))])
_HASHES, _SCORES, _DONE = "hashes.u64", "scores.f32", "done.json"


def directory(out: str, source: Source) -> str:
    return storage.join(out, "metadata", source.label)


def build(out: str, source: Source, say: Callable[[str], None]) -> None:
    """Writes the files of a source, unless they are there or none are needed.

    Raises ValueError: no metadata there, or without that column; OSError: storage fails.
    """
    if not _is_joined(source):
        return
    entries = storage.list_files(source.metadata, "**/*.parquet")
    if not entries:
        raise ValueError(f"source {source.label}: no *.parquet at metadata={source.metadata!r}")
    folder, listed = directory(out, source), json.dumps([source.join, *(list(entry) for entry in entries)]).encode()
    done = storage.join(folder, _DONE)
    if storage.exists(done):
        if storage.read(done) != listed:
            raise ValueError(f"source {source.label}: the metadata changed since they were read: give another --out")
        return
    with tempfile.TemporaryDirectory(prefix="lumos_jax_metadata_") as scratch:
        for entry in entries:
            for found in _read(entry.path, source):
                part = found["hash"] >> np.uint64(56)
                order = np.argsort(part, kind="stable")
                ends = np.searchsorted(part[order], np.arange(_PARTS + 1))
                for number in np.unique(part):
                    with open(os.path.join(scratch, f"{number}"), "ab") as file:
                        found[order[ends[number] : ends[number + 1]]].tofile(file)
        with (
            storage.replacing(storage.join(folder, _HASHES)) as hashes,
            storage.replacing(storage.join(folder, _SCORES)) as scores,
        ):
            count = _join(scratch, hashes, scores)
            if not count:
                raise ValueError(
                    f"source {source.label}: the parquet files at metadata={source.metadata!r} have no rows"
                )
    storage.write_whole(done, listed)
    say(f"metadata of {source.label}: {count:,} by {source.join}")


def _read(path: str, source: Source) -> Iterator[np.ndarray]:
    from pyarrow import parquet

    with storage.open_read(path) as file:
        with files.readable(path, "fetch it again"):
            opened = parquet.ParquetFile(file)
        there = {name.lower(): name for name in opened.schema_arrow.names}
        names = {"key": ("key",)} | NAMES
        columns = {
            field: next((there[n] for n in names[field] if n in there), None) for field in (source.join, *SCORES)
        }
        if columns[source.join] is None:
            raise ValueError(
                f"source {source.label}: {path} has no column {source.join} to join by; it has {', '.join(there)}"
            )
        for batch in opened.iter_batches(_ROWS, columns=[name for name in columns.values() if name]):
            found = np.zeros(len(batch), _ROW)
            found["scores"] = np.nan
            found["hash"] = [_hash(one_line(str(text))) for text in batch[columns[source.join]].to_pylist()]
            for place, score in enumerate(SCORES):
                if columns[score]:
                    values = batch[columns[score]].to_pylist()
                    found["scores"][:, place] = [np.nan if value is None else value for value in values]
            yield found


def _join(scratch: str, hashes_file: pathlib.Path, scores_file: pathlib.Path) -> int:
    """Sorts the parts into the two files; returns the number of rows."""
    count = 0
    with open(hashes_file, "wb") as hashes, open(scores_file, "wb") as scores:
        for number in range(_PARTS):
            path = pathlib.Path(scratch, f"{number}")
            if path.exists():
                part = np.fromfile(path, _ROW)
                _, first = np.unique(part["hash"], return_index=True)
                part[first]["hash"].tofile(hashes)
                part[first]["scores"].tofile(scores)
                count += len(first)
    return count


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")


@functools.lru_cache(maxsize=8)
def _opened(folder: str) -> tuple[np.ndarray, np.ndarray]:
    paths = [storage.local_copy(storage.join(folder, name)) for name in (_HASHES, _SCORES)]
    return np.memmap(paths[0], "<u8", "r"), np.memmap(paths[1], "<f4", "r").reshape(-1, len(SCORES))


def lookup(out: str, source: Source) -> Callable[[Candidate], dict[str, Any]]:
    """A function that gives the scores that the metadata of a source has for a candidate."""
    if not _is_joined(source):
        return lambda candidate: {}
    hashes, values = _opened(directory(out, source))

    def scores(candidate: Candidate) -> dict[str, Any]:
        text = candidate.url if source.join == "url" else candidate.key
        wanted = np.uint64(_hash(text))
        place = int(np.searchsorted(hashes, wanted)) if text else len(hashes)
        if place == len(hashes) or hashes[place] != wanted:
            return {}
        return dict(zip(SCORES, map(float, values[place]), strict=True))

    return scores


def _is_joined(source: Source) -> bool:
    return bool(source.metadata) and source.kind != "journeydb"  # whose metadata are captions, for its reader
