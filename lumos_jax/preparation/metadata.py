"""Scores that stand in metadata files of their own (parquet, as LAION and COYO publish them), found by url or key.

    DIR/metadata/part-00007.npy        of metadata file 7: (hash of the url or key, scores), ascending by hash
    DIR/metadata/NAME-00012.npy        of source NAME: the 12th of BUCKETS ranges of the hashes, from all of its files

Both are made by numbered tasks, before the scan. Of a url that stands several times, the first counts. 24 bytes a row.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Iterator

import numpy as np

from lumos_jax.data import storage
from lumos_jax.preparation import plan
from lumos_jax.preparation.readers.base import Candidate, DamagedInput, match_columns
from lumos_jax.preparation.rows import SCORES
from lumos_jax.preparation.settings import Source

BUCKETS = 64
_SHIFT = np.uint64(64 - 6)
_ROW = np.dtype([("hash", np.uint64), *((name, np.float32) for name in SCORES)])


def split_tasks(made: plan.Plan) -> range:
    return range(len(made.joins))


def split_task(out: str, number: int) -> None:
    """Hashes and sorts one metadata file. Raises ValueError: it changed, or lacks the column; OSError: storage fails."""
    if storage.exists(_part(out, number)):
        return
    made = plan.read(out)
    given = made.joins[number]
    if storage.stat(given.path).etag != given.etag:
        raise ValueError(f"metadata {given.path} changed since it was planned: plan again, with another --out")
    found = np.concatenate([np.empty(0, _ROW), *_hashed(given.path, made.sources[given.source])])
    _save(_part(out, number), found[np.argsort(found["hash"], kind="stable")])


def merge_tasks(made: plan.Plan) -> range:
    return range(BUCKETS * len(_labels(made)))


def merge_task(out: str, number: int) -> None:
    """Gathers one range of hashes of one source."""
    made = plan.read(out)
    label, bucket = _labels(made)[number // BUCKETS], number % BUCKETS
    path = _bucket(out, label, bucket)
    if storage.exists(path):
        return
    parts = [np.empty(0, _ROW)]
    for join, given in enumerate(made.joins):
        if given.source == label:
            rows = _load(_part(out, join))
            bounds = [bucket << int(_SHIFT), ((bucket + 1) << int(_SHIFT)) - 1]
            first, last = np.searchsorted(rows["hash"], np.array(bounds, np.uint64))
            parts.append(rows[first : last + 1][rows["hash"][first : last + 1] >> _SHIFT == bucket])
    found = np.concatenate(parts)
    found = found[np.argsort(found["hash"], kind="stable")]
    _save(path, found[np.unique(found["hash"], return_index=True)[1]])


def complete(out: str, made: plan.Plan) -> bool:
    return finished(out) == len(split_tasks(made)) + len(merge_tasks(made))


def finished(out: str) -> int:
    """Number of files that are made."""
    try:
        return len(storage.list_files(storage.join(out, "metadata"), "*.npy"))
    except FileNotFoundError:
        return 0


def lookup(out: str, made: plan.Plan, source: Source) -> Callable[[Candidate], None]:
    """A function that adds the scores of the source's metadata to a candidate. Raises ValueError: they are not gathered."""
    if source.label not in _labels(made):
        return lambda _: None
    if not storage.exists(_bucket(out, source.label, BUCKETS - 1)):
        raise ValueError(
            f"the metadata of source {source.label} is not gathered in {out}: run scan, which does so first"
        )

    def add(candidate: Candidate) -> None:
        value = candidate.url if source.join == "url" else candidate.key
        if not value:
            return
        wanted = np.uint64(_hash(value))
        rows = _load(_bucket(out, source.label, int(wanted >> _SHIFT)))
        place = int(np.searchsorted(rows["hash"], wanted))
        if place < len(rows) and rows["hash"][place] == wanted:
            candidate.add({name: float(rows[name][place]) for name in SCORES})

    return add


def _labels(made: plan.Plan) -> list[str]:
    return list(dict.fromkeys(given.source for given in made.joins))


def _part(out: str, number: int) -> str:
    return storage.join(out, "metadata", f"part-{number:05d}.npy")


def _bucket(out: str, label: str, bucket: int) -> str:
    return storage.join(out, "metadata", f"{label}-{bucket:05d}.npy")


def _save(path: str, rows: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    storage.write_whole(path, buffer.getvalue())


@functools.lru_cache(maxsize=2 * BUCKETS)
def _load(path: str) -> np.ndarray:
    return np.load(storage.local_copy(path), mmap_mode="r")


def _hash(value: str) -> int:
    return int.from_bytes(hashlib.blake2b(value.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def _hashed(path: str, source: Source) -> Iterator[np.ndarray]:
    """Unsorted rows of a metadata file. Raises ValueError: it is damaged, or has no such column."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with storage.open_read(path) as file:
            opened = parquet.ParquetFile(file)
            columns = match_columns(opened.schema_arrow.names)
            if source.join not in columns:
                raise ValueError(f"metadata {path} has no column for join={source.join}: {opened.schema_arrow.names}")
            scores = [name for name in SCORES if name in columns]
            names = [columns[name] for name in (source.join, *scores)]
            for batch in opened.iter_batches(1 << 16, columns=names, use_threads=False):
                keys = batch.column(names[0]).to_pylist()
                rows = np.empty(len(keys), _ROW)
                for name in SCORES:
                    rows[name] = np.nan
                rows["hash"] = [0 if key is None else _hash(str(key)) for key in keys]
                for name, column in zip(scores, names[1:], strict=True):
                    rows[name] = batch.column(column).cast(pa.float32()).to_numpy(zero_copy_only=False)
                yield rows[[key is not None for key in keys]]
    except (pa.ArrowException, DamagedInput) as error:
        raise ValueError(f"metadata {path} cannot be read as parquet: {error}") from error
