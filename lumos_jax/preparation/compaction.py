"""Writes a prepared data set anew without the records that have a tombstone: the next version, which numbers the others anew.

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
from lumos_jax.preparation import compacted, layout, publish, tombstones

_AHEAD = 64  # records that are fetched together from a remote shard


def tasks(out: str) -> list[int]:
    """Numbers for `run_task`. Raises ValueError: no record has a tombstone."""
    manifest = manifests.read_manifest(out)
    if not manifest.tombstones.count:
        raise ValueError(f"no record in {out} has a tombstone: there is nothing to leave out")
    return list(range(layout.count_tasks(layout.directory(out, manifest.build, manifest.version))))


def finished(out: str) -> int:
    """Number of tasks whose new version is written."""
    manifest = manifests.read_manifest(out)
    try:
        return layout.count_tasks(layout.directory(out, manifest.build, manifest.version + 1))
    except FileNotFoundError:
        return 0


def run_task(out: str, number: int) -> None:
    manifest = manifests.read_manifest(out)
    old, new = (layout.directory(out, manifest.build, manifest.version + i) for i in (0, 1))
    if (done := layout.read_part(new, number)) and (
        manifest.layout == "index" or all(compacted.is_whole(out, shard) for shard in done.shards)
    ):
        return
    part, dead = layout.read_part(old, number), tombstones.numbers(out)
    rows = layout.read_records(old, number, ("record", *layout.COLUMNS))
    live = ~np.isin(rows["record"].to_numpy(), dead)
    arrays = {name: array[live] for name, array in layout.read_arrays(old, number).items()}
    ends = np.cumsum([0, *(shard.records for shard in part.shards)])
    written = []
    for shard, begin, end in zip(part.shards, ends[:-1], ends[1:], strict=True):
        if not live[begin:end].any():
            continue
        if manifest.layout == "index":
            written.append(dataclasses.replace(shard, records=int(live[begin:end].sum())))
        else:
            written.append(_without(out, manifest, shard, live[begin:end]))
    first = sum(layout.read_part(old, task).records for task in range(number))
    first -= int(np.searchsorted(dead, np.uint64(first)))
    layout.write_part(new, number, first, rows.filter(live), arrays, written)


def _without(out: str, manifest: Manifest, shard: Shard, live: np.ndarray) -> Shard:
    records = itertools.compress(_records(storage.join(out, shard.path), shard.records), live)
    path = f"{layout.shard_directory(manifest.build, manifest.version + 1)}/{shard.path.rpartition('/')[2]}"
    return compacted.write_shard(out, path, records, shard.lineage)


def _records(path: str, count: int) -> Iterator[bytes]:
    there = Shards([path], [count])
    for first in range(0, count, _AHEAD):
        numbers = range(first, min(first + _AHEAD, count))
        fetched = there.ahead(numbers)
        yield from (fetched[number] for number in numbers)


def finish(out: str, say: Callable[[str], None] = print) -> Manifest:
    """Writes the manifest of the new version. Raises ValueError: a task is not written."""
    manifest = manifests.read_manifest(out)
    folder = layout.directory(out, manifest.build, manifest.version + 1)
    parts = [layout.read_part(folder, task) for task in tasks(out)]
    if None in parts:
        raise ValueError(f"{parts.count(None)} of {len(parts)} tasks are not written, as {parts.index(None)}")
    made = publish.publish(out, dataclasses.replace(
        manifest, version=manifest.version + 1, records=sum(part.records for part in parts),
        shards=tuple(shard for part in parts for shard in part.shards),
    ))  # fmt: skip
    say(f"version {made.version}   {made.records:,} records of {manifest.records:,}")
    return made
