"""The steps of a selection (select.py), each a function of a job and a number, or of a job and a runner of others.

Steps hand rows to each other through files of a scratch directory, and write decisions into arrays there of one entry a row,
each entry once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lumos_jax.preparation import criteria, decontamination, duplicates, engines, files, hamming, scan_rows, selection
from lumos_jax.preparation.settings import Prepare

_MIX, _UNMIX = 0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 1 << 64)  # a bijection that spreads hashes evenly
# high, low: the first 16 bytes of sha256. mixed: perceptual hash x _MIX. rank, score: of duplicates, the lower is kept.
_ROW = np.dtype([
    ("high", "<u8"), ("low", "<u8"), ("mixed", "<u8"), ("rank", "<u8"), ("score", "<u4"), ("id", "<u4"), ("source", "<u2"),
    ("valid", "?"),
])  # fmt: skip
_HASH = np.dtype([("mixed", "<u8"), ("rank", "<u8"), ("score", "<u4"), ("id", "<u4")])
_AREAS = 1 << 40  # areas of images are below
UNKNOWN = 255  # distance of duplicates that were found by features
_COLUMNS = ("sha256", "phash", "phash_valid", "height", "width", "aesthetic", "input")


@dataclasses.dataclass(frozen=True)
class Job:
    """What every step knows. starts: the number of the first row of each task, and of all rows. chunks: tasks of each.
    bits: 2^bits partitions. source_of: of each input, a place in `sources` (labels), whose `priorities` are ranks, 0 first."""

    out: str
    scratch: str
    digest: str
    settings: Prepare
    reasons: tuple[str, ...]
    starts: np.ndarray
    chunks: tuple[tuple[int, ...], ...]
    bits: int
    sources: tuple[str, ...]
    priorities: np.ndarray
    source_of: np.ndarray

    def file(self, name: str) -> str:
        return os.path.join(self.scratch, name)

    def array(self, name: str) -> np.ndarray:
        """reasons uint8, distance uint8, keeper uint32 (number of the row + 1; 0: none): one entry a row, on disk."""
        return np.load(self.file(f"{name}.npy"), mmap_mode="r+")

    def rows_of(self, task: int) -> slice:
        return slice(int(self.starts[task]), int(self.starts[task + 1]))

    def parquet(self, task: int, columns: Sequence[str]) -> Any:
        """Columns of a scan file. Raises ValueError: it has another number of rows than its task counted."""
        table, count = scan_rows.read(self.out, task, columns), self.starts[task + 1] - self.starts[task]
        if len(table) != count:
            name = scan_rows.path(self.out, task)
            raise ValueError(f"{name} has {len(table)} rows, its .json counts {count}: remove both and scan again")
        return table

    def save_parts(self, name: str, rows: np.ndarray, part: np.ndarray, count: int) -> None:
        """Saves rows in the order of their parts, numbers below `count`."""
        order = np.argsort(part, kind="stable")
        np.save(self.file(f"{name}.npy"), rows[order])
        np.save(self.file(f"{name}-ends.npy"), np.searchsorted(part[order], np.arange(count + 1)))

    def part(self, name: str, number: int, files: int) -> np.ndarray:
        """The rows of a part in all files that `save_parts` wrote as name-000000, name-000001 ..."""
        slices = []
        for file in (self.file(f"{name}-{i:06d}") for i in range(files)):
            begin, end = np.load(f"{file}-ends.npy")[number : number + 2]
            slices.append(np.load(f"{file}.npy", mmap_mode="r")[begin:end])
        return np.concatenate(slices)

    def drop(self, rows: np.ndarray, keepers: np.ndarray, reason: str, distance: np.ndarray | int) -> None:
        """Decide that rows (numbers) are duplicates of others."""
        self.array("reasons")[rows] = self.reasons.index(reason)
        self.array("keeper")[rows] = keepers + 1
        self.array("distance")[rows] = distance


def screen(job: Job, chunk: int) -> int:
    """Applies criteria and evaluation sets, and partitions the remaining rows by hash. Returns how many remain."""
    limits, parts = job.settings.criteria, [np.zeros(0, _ROW)]
    with np.load(job.file("evaluation.npz")) as known:
        hashes = decontamination.EvaluationHashes(known["phash"], known["sha256"])
    matcher = decontamination.Matcher(hashes, job.settings.decontamination.phash_distance)
    for task in job.chunks[chunk]:
        table = job.parquet(task, {*criteria.columns(limits), *_COLUMNS})
        codes = criteria.codes(table, limits, job.reasons)
        left = np.flatnonzero(codes == 0)
        rows = _ranked(job, task, table, left)
        sha256 = np.stack([rows["high"], rows["low"]], 1)
        known = matcher(rows["mixed"] * np.uint64(_UNMIX), rows["valid"], sha256)
        codes[left[known]] = job.reasons.index(criteria.CONTAMINATED)
        job.array("reasons")[job.rows_of(task)] = codes
        parts.append(rows[~known])
    rows = np.concatenate(parts)
    partition = np.where(rows["valid"], rows["mixed"], rows["high"]) >> np.uint64(64 - job.bits)
    job.save_parts(f"rows-{chunk:06d}", rows, partition, 1 << job.bits)
    return len(rows)


def _ranked(job: Job, task: int, table: Any, left: np.ndarray) -> np.ndarray:
    """The rows `left` of a scan file as _ROW."""
    rows = np.zeros(len(left), _ROW)
    rows["high"], rows["low"] = decontamination.leading(decontamination.sha256_of(table)[left]).T
    rows["mixed"] = table["phash"].to_numpy()[left] * np.uint64(_MIX)
    rows["valid"] = table["phash_valid"].to_numpy(zero_copy_only=False)[left]
    rows["source"] = job.source_of[table["input"].to_numpy()[left]]
    area = table["height"].to_numpy()[left].astype(np.uint64) * table["width"].to_numpy()[left].astype(np.uint64)
    rows["rank"] = job.priorities[rows["source"]] * np.uint64(_AREAS) + (np.uint64(_AREAS - 1) - area)
    # The bits of floats, as integers, are in the order of their values from 0 on and in the reverse order below.
    score = np.ascontiguousarray(table["aesthetic"].to_numpy()[left])
    bits = np.where(np.isnan(score), np.float32(-np.inf), score).view(np.uint32)
    rows["score"] = ~np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    rows["id"] = job.starts[task] + left
    return rows


def collapse(job: Job, partition: int) -> int:
    """Drops all but the best row of equal files and of equal perceptual hashes in a partition. Returns how many."""
    rows, count = job.part("rows", partition, len(job.chunks)), 0
    steps = [(criteria.EXACT, ("high", "low"))] * job.settings.duplicates.exact
    steps += [(criteria.NEAR, ("mixed",))] * (job.settings.duplicates.phash_distance >= 0)
    for reason, keys in steps:
        if reason == criteria.NEAR:
            rows = rows[rows["valid"]]
        columns = [np.ascontiguousarray(rows[name]) for name in (*keys, "rank", "score", "id")]
        dropped, kept = duplicates.equal_rows(columns[: len(keys)], columns[len(keys) :])
        job.drop(rows["id"][dropped], rows["id"][kept], reason, 0)
        rows, count = np.delete(rows, dropped), count + len(dropped)
    if job.settings.duplicates.phash_distance > 0:
        rows = rows[np.argsort(rows["mixed"])]
        np.save(job.file(f"hashes-{partition:05d}.npy"), rows["mixed"] * np.uint64(_UNMIX))
        np.save(job.file(f"best-{partition:05d}.npy"), rows[list(_HASH.names)].astype(_HASH))
    return count


def drop_near(job: Job, run: engines.Run) -> int:
    """Drops rows whose perceptual hash is near that of a better row which is kept. Returns how many."""
    os.mkdir(job.file("tables"))
    parts = [job.file(f"hashes-{number:05d}.npy") for number in range(1 << job.bits)]
    pairs = hamming.near_pairs(parts, job.settings.duplicates.phash_distance, job.file("tables"), run)
    hashes, ends = np.unique(pairs, return_inverse=True)
    found = _best(job, hashes)
    rows, kept = worse_of_pairs(found, ends.reshape(-1, 2))
    job.drop(found["id"][rows], found["id"][kept], criteria.NEAR, np.bitwise_count(hashes[rows] ^ hashes[kept]))
    return len(rows)


def worse_of_pairs(rows: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Applies the rule of duplicates.py to rows with fields rank, score and id, of which pairs (P, 2) are close.
    Returns (places of the rows that are dropped, places of those that are kept for them)."""
    order = np.lexsort([rows["id"], rows["score"], rows["rank"]])
    place = np.argsort(order)[pairs]
    kept = duplicates.keepers(place.min(1), place.max(1), len(rows))
    dropped = np.flatnonzero(kept >= 0)
    return order[dropped], order[kept[dropped]]


def _best(job: Job, hashes: np.ndarray) -> np.ndarray:
    """The best rows of perceptual hashes (N,), all of which are there, as _HASH."""
    wanted = hashes * np.uint64(_MIX)
    order = np.argsort(wanted)
    wanted, result = wanted[order], np.zeros(len(hashes), _HASH)
    edges = np.searchsorted(wanted >> np.uint64(64 - job.bits), np.arange((1 << job.bits) + 1))
    for partition in range(1 << job.bits):
        here = slice(edges[partition], edges[partition + 1])
        rows = np.load(job.file(f"best-{partition:05d}.npy"))
        result[order[here]] = rows[np.searchsorted(rows["mixed"], wanted[here])]
    return result


def cap(job: Job, run: engines.Run) -> None:
    """Drops records above max_records of each source: those of the highest hash of (seed, sha256)."""
    capped = {i: source.max_records for i, source in enumerate(job.settings.sources) if source.max_records}
    if not capped:
        return
    chunks = range(len(job.chunks))
    counts = sum(run(_count_values, [(job, chunk, tuple(capped)) for chunk in chunks]))
    last = {}  # source -> the first 16 bits of the value at which it is full, and how many are below
    for source, row in zip(capped, counts, strict=True):
        sums = np.cumsum(row)
        if sums[-1] > capped[source]:
            bucket = int(np.searchsorted(sums, capped[source], side="right"))
            last[source] = bucket, capped[source] - int(sums[bucket] - row[bucket])
    candidates = run(_values_at, [(job, chunk, {s: bucket for s, (bucket, _) in last.items()}) for chunk in chunks])
    limits = {}
    for source, (_, wanted) in last.items():
        values = np.sort(np.concatenate([found[source] for found in candidates]), order=("value", "id"))
        limits[source] = values[wanted]  # the first that is dropped
    run(_drop_above, [(job, chunk, limits) for chunk in chunks])


def _values(job: Job, chunk: int, source: int) -> np.ndarray:
    """(value, id) of the rows of a source that are kept so far; a row's value depends on nothing but the seed and sha256."""
    rows = np.load(job.file(f"rows-{chunk:06d}.npy"), mmap_mode="r")
    rows = rows[rows["source"] == source]
    rows = rows[job.array("reasons")[rows["id"]] == 0]
    key = f"cap {job.settings.write.seed} {job.sources[source]}".encode()
    salt, factor = np.frombuffer(hashlib.sha256(key).digest()[:16], "<u8")
    values = np.zeros(len(rows), [("value", "<u8"), ("id", "<u4")])
    mixed = (rows["high"] ^ salt) * (factor | np.uint64(1))
    values["value"], values["id"] = (mixed ^ mixed >> np.uint64(32)) * np.uint64(_MIX), rows["id"]
    return values


def _count_values(job: Job, chunk: int, sources: Sequence[int]) -> np.ndarray:
    first = [_values(job, chunk, source)["value"] >> np.uint64(48) for source in sources]
    return np.stack([np.bincount(values.astype(np.int64), minlength=1 << 16) for values in first])


def _values_at(job: Job, chunk: int, buckets: dict[int, int]) -> dict[int, np.ndarray]:
    values = {source: _values(job, chunk, source) for source in buckets}
    return {source: v[v["value"] >> np.uint64(48) == buckets[source]] for source, v in values.items()}


def _drop_above(job: Job, chunk: int, limits: dict[int, Any]) -> None:
    for source, limit in limits.items():
        values = _values(job, chunk, source)
        above = (values["value"] > limit["value"]) | (
            (values["value"] == limit["value"]) & (values["id"] >= limit["id"])
        )
        job.array("reasons")[values["id"][above]] = job.reasons.index(criteria.CAP)


def finish(job: Job, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Writes kept rows and reasons of each task of a chunk, and groups-<chunk>.parquet into the scratch directory.

    Returns (counts (sources, reasons) int64, selection.inputs of these tasks).
    """
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.parquet

    counts = np.zeros((len(job.sources), len(job.reasons)), np.int64)
    inputs, groups = np.zeros((len(job.source_of), 3), np.int64), []
    keeper, distance = job.array("keeper"), job.array("distance")
    for task in job.chunks[chunk]:
        codes = np.array(job.array("reasons")[job.rows_of(task)])
        kept = np.flatnonzero(codes == 0)
        for name, array in (("reasons", codes), ("kept", kept.astype(np.uint32))):
            files.write_npy(selection.path(job.out, job.digest, f"{name}-{task:06d}.npy"), array)
        table = job.parquet(task, ("input", "bytes", "caption", "detailed"))
        numbers = table["input"].to_numpy()
        np.add.at(counts, (job.source_of[numbers], codes), 1)
        lengths = (pa.compute.binary_length(table[name]).to_numpy() for name in ("caption", "detailed"))
        columns = np.ones(len(table)), table["bytes"].to_numpy(), sum(lengths) > 0
        for column, values in enumerate(columns):
            summed = np.bincount(numbers[kept], values[kept], len(inputs))  # float64: exact to 2^53
            inputs[:, column] += summed.astype(np.int64)
        rows = np.flatnonzero(keeper[job.rows_of(task)])
        groups.append(_groups(job, task, rows, codes[rows], keeper, distance))
    with pa.parquet.ParquetWriter(job.file(f"groups-{chunk:06d}.parquet"), groups[0].schema) as file:
        for table in groups:  # a row group each, whatever the chunks are
            if len(table):
                file.write_table(table)
    return counts, inputs


def _groups(job: Job, task: int, rows: np.ndarray, codes: np.ndarray, keeper: np.ndarray, distance: np.ndarray) -> Any:
    """groups.parquet's rows for the duplicates of a task. A keeper that was dropped for another one gives way to that."""
    import pyarrow as pa

    apart = distance[job.starts[task] + rows].astype(np.int64)
    last = keeper[job.starts[task] + rows].astype(np.int64) - 1
    while len(following := np.flatnonzero(keeper[last])):
        apart[following] += distance[last[following]]
        last[following] = keeper[last[following]].astype(np.int64) - 1
    keeper_task = np.searchsorted(job.starts, last, side="right") - 1
    return pa.table({
        "task": pa.array(np.full(len(rows), task, np.int32)), "row": pa.array(rows.astype(np.uint32)),
        "keeper_task": pa.array(keeper_task.astype(np.int32)),
        "keeper_row": pa.array((last - job.starts[keeper_task]).astype(np.uint32)),
        "reason": pa.array(np.array(job.reasons)[codes].tolist(), pa.string()),
        "distance": pa.array(np.where(apart < UNKNOWN, apart, -1).astype(np.int16)),
    })  # fmt: skip
