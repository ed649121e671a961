"""Writes the next version of a prepared data set, without the records that have a tombstone; the others are renumbered.

Tasks are those of `write`, and so are their rules: each alone, once or again. Shards of the version before stay until they are
removed, as runs may read them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from lumos_jax.data import manifest as manifests
from lumos_jax.data import storage
from lumos_jax.data.manifest import Manifest, Shard
from lumos_jax.data.shards import Shards
from lumos_jax.preparation import files, publish, record_files, tombstones, write_arrayrecord

_AHEAD = 64  # records that are fetched together from a remote shard


def tasks(out: str) -> list[int]:
    """Numbers for `run_task`. Raises ValueError: no record has a tombstone."""
    manifest = manifests.read_manifest(out)
    if not manifest.tombstones.count:
        raise ValueError(f"no record in {out} has a tombstone: there is nothing to leave out")
    return list(record_files.tasks(record_files.directory(out, manifest.build, manifest.version), manifest.records))


def finished(out: str) -> int:
    """Number of tasks whose new version is written."""
    manifest = manifests.read_manifest(out)
    parts = _parts(out, manifest)
    return sum(part is not None for part in parts) if manifest.tombstones.count else len(parts)


def _parts(out: str, manifest: Manifest) -> list[record_files.Part | None]:
    """What each task wrote of the new version; None if it has not, or has left out other tombstones."""
    old, new = (record_files.directory(out, manifest.build, manifest.version + i) for i in (0, 1))
    parts = [record_files.read_part(new, task) for task in record_files.tasks(old, manifest.records)]
    return [part if part and part.tombstones == manifest.tombstones.version else None for part in parts]


def run_task(out: str, number: int) -> None:
    """Writes the new version of one task, unless that is there. Raises ValueError: a file of the present version is damaged."""
    manifest = manifests.read_manifest(out)
    old, new = (record_files.directory(out, manifest.build, manifest.version + i) for i in (0, 1))
    done = record_files.read_part(new, number)
    if done and done.tombstones == manifest.tombstones.version and _shards_are_whole(out, manifest, done):
        return
    part, dead = record_files.read_part(old, number), tombstones.numbers(out)
    rows = record_files.read_records(old, number, ("record", *record_files.COLUMNS))
    numbers = rows["record"].to_numpy()
    live = ~np.isin(numbers, dead)
    arrays = {name: array[live] for name, array in record_files.read_arrays(old, number).items()}
    ends = np.cumsum([0, *(shard.records for shard in part.shards)])
    written = []
    for shard, begin, end in zip(part.shards, ends[:-1], ends[1:], strict=True):
        if not live[begin:end].any():
            continue
        if manifest.layout == "index":
            written.append(dataclasses.replace(shard, records=int(live[begin:end].sum())))
        else:
            written.append(_without(out, manifest, shard, live[begin:end]))
    first = int(numbers[0]) - int(np.searchsorted(dead, numbers[0])) if len(numbers) else 0
    record_files.write_part(new, number, first, rows.filter(live), arrays, written, manifest.tombstones.version)


def _shards_are_whole(out: str, manifest: Manifest, done: record_files.Part) -> bool:
    return manifest.layout == "index" or all(write_arrayrecord.is_whole(out, shard) for shard in done.shards)


def _without(out: str, manifest: Manifest, shard: Shard, live: np.ndarray) -> Shard:
    records = itertools.compress(_records(storage.join(out, shard.path), shard.records), live)
    path = f"{record_files.shard_directory(manifest.build, manifest.version + 1)}/{shard.path.rpartition('/')[2]}"
    return write_arrayrecord.write_shard(out, path, records, shard.lineage)


def _records(path: str, count: int) -> Iterator[bytes]:
    there = Shards([path], [count])
    for first in range(0, count, _AHEAD):
        numbers = range(first, min(first + _AHEAD, count))
        fetched = there.ahead(numbers)
        yield from (fetched[number] for number in numbers)


def finish(out: str, say: Callable[[str], None] = print) -> Manifest:
    """Writes the manifest of the new version, unless another process has. Raises ValueError: a task is not written."""
    files.lock(out, wait=True)
    manifest = manifests.read_manifest(out)
    if not manifest.tombstones.count:
        return manifest
    parts = _parts(out, manifest)
    if None in parts:
        raise ValueError(
            f"{parts.count(None)} of {len(parts)} tasks are not written, as {parts.index(None)}: run compact again"
        )
    made = publish.publish(out, dataclasses.replace(
        manifest, version=manifest.version + 1, records=sum(part.records for part in parts),
        shards=tuple(shard for part in parts for shard in part.shards),
    ))  # fmt: skip
    say(f"version {made.version}   {made.records:,} records of {manifest.records:,}")
    return made
