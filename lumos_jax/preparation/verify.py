"""Checks a prepared data set: counts, digests, arrays, tombstones, and a sample of records by their sha256 and by decoding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lumos_jax.data import CorruptRecord, storage
from lumos_jax.data import manifest as manifests
from lumos_jax.data.manifest import Manifest, Shard
from lumos_jax.data.shards import count_records
from lumos_jax.data.sources.prepared import PreparedSource
from lumos_jax.preparation import engines, images, record_files, tombstones, write_arrayrecord, write_index

_BLOCK = 8 << 20


def run(out: str, sample: int = 256, workers: int = 1, say: Callable[[str], None] = print) -> list[str]:
    """What is wrong with the data set in `out`, one line each; [] if nothing is.

    sample: records that are read, compared with their sha256 and decoded. workers: processes that read shards.
    Raises ValueError: no data set is there.
    """
    manifest = manifests.read_manifest(out)
    with engines.processes(workers) as step:
        problems = [line for line in step(_check_shard, [(out, manifest, shard) for shard in manifest.shards]) if line]
    say(f"shards      {len(manifest.shards):,}, {len(problems):,} of them wrong")
    problems += [*_check_tables(out, manifest), *_check_tombstones(out, manifest)]
    if not problems:
        found = _check_sample(out, manifest, sample)
        say(f"records     {min(sample, manifest.records):,} read and decoded, {len(found):,} wrong")
        problems += found
    for line in problems:
        say(line)
    return problems


def _check_shard(out: str, manifest: Manifest, shard: Shard) -> str | None:
    path = storage.join(out, shard.path) if manifest.layout == "arrayrecord" else shard.path
    try:
        entry = storage.stat(path)
        if entry.size != shard.bytes:
            return f"{path} has {entry.size:,} bytes, not {shard.bytes:,}"
        if manifest.layout == "index":
            written = manifest.inputs[shard.lineage[0]].etag
            return (
                None
                if entry.etag == written
                else f"{path} has changed since it was scanned ({written}, now {entry.etag})"
            )
        digest = hashlib.sha256()
        with storage.open_read(path) as file:
            while part := file.read(_BLOCK):
                digest.update(part)
        if digest.hexdigest() != shard.sha256:
            return f"{path} is damaged: its sha256 is {digest.hexdigest()}"
        count = count_records(path)
        return None if count == shard.records else f"{path} has {count:,} records, not {shard.records:,}"
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {error}"


def _check_tables(out: str, manifest: Manifest) -> Iterator[str]:
    """Sizes, index and record tables have as many entries as the manifest has records."""
    names = [manifests.SIZES]
    if manifest.layout == "index":
        names += [f"{manifests.INDEX}/{name}.npy" for name in write_index.names(manifest)]
    for name in names:
        try:
            count = len(np.load(storage.local_copy(storage.join(out, name)), mmap_mode="r"))
        except (OSError, ValueError) as error:
            yield f"{name} cannot be read: {error}"
            continue
        if count != manifest.records:
            yield f"{name} has {count:,} entries, the manifest {manifest.records:,} records"
    folder = record_files.directory(out, manifest.build, manifest.version)
    first = 0
    for task in range(record_files.count_tasks(folder)):
        try:
            numbers = record_files.read_records(folder, task, ["record"])["record"].to_numpy()
        except (OSError, ValueError) as error:
            yield str(error)
            return
        if not np.array_equal(numbers, np.arange(first, first + len(numbers), dtype=np.uint64)):
            yield f"{record_files.name(folder, task, 'parquet')} does not hold the records from {first:,} on"
        first += len(numbers)
    if first != manifest.records:
        yield f"the tables in {folder} hold {first:,} records, the manifest {manifest.records:,}"


def _check_tombstones(out: str, manifest: Manifest) -> Iterator[str]:
    try:
        numbers = tombstones.numbers(out)
    except ValueError as error:
        yield str(error)
        return
    if len(numbers) != manifest.tombstones.count:
        yield f"{manifests.TOMBSTONES} has {len(numbers):,} records, the manifest {manifest.tombstones.count:,}"
    elif len(numbers) and ((np.diff(numbers.astype(np.int64)) <= 0).any() or numbers[-1] >= manifest.records):
        yield f"{manifests.TOMBSTONES} is not ascending, or beyond the {manifest.records:,} records"


def _check_sample(out: str, manifest: Manifest, sample: int) -> list[str]:
    source, dead, found = PreparedSource(out), set(tombstones.numbers(out).tolist()), []
    chosen = np.sort(write_arrayrecord.shuffled(manifest.records, f"verify {manifest.digest()}")[:sample])
    folder = record_files.directory(out, manifest.build, manifest.version)
    for number, digest in _digests(folder, chosen):
        if number in dead:
            continue
        try:
            image = source.read(number)
            if hashlib.sha256(image).digest() != digest:
                raise CorruptRecord("its sha256 is another one than when it was scanned")
            measured, stated = images.measure(image), source.sizes(np.array([number]))[0].tolist()
            if [measured.height, measured.width] != stated:
                raise CorruptRecord(
                    f"it has {measured.height} x {measured.width} pixels, {manifests.SIZES} says {stated}"
                )
        except (CorruptRecord, OSError) as error:
            found.append(f"record {number:,} ({source.describe(number)}): {error}")
    return found


def _digests(folder: str, chosen: np.ndarray) -> Iterator[tuple[int, Any]]:
    """(number, sha256) of records, ascending."""
    first = 0
    for task in range(record_files.count_tasks(folder)):
        last = first + record_files.read_part(folder, task).records
        here = chosen[(chosen >= first) & (chosen < last)]
        if len(here):
            digests = record_files.read_records(folder, task, ["sha256"])["sha256"].take(here - first)
            yield from zip(here.tolist(), digests.to_pylist(), strict=True)
        first = last
