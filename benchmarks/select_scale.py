"""Selection at scale: near pairs among many hashes, a whole selection of synthetic rows; processor time, memory, for 500M.

    python -m benchmarks.select_scale pairs --rows=20000000 --distance=2
    python -m benchmarks.select_scale check                                # against all pairs of 200,000
    python -m benchmarks.select_scale select --rows=20000000 --workers=2

Hashes are random, with near ones planted: what is found beyond those is there by chance. Memory is the peak of one process,
pages of mapped files included. Extrapolations: time a row, and of comparisons a pair, at the number of tables for 500M.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import resource
import shutil
import tempfile

import numpy as np

from lumos_jax.preparation import engines, hamming, plan, scan, scan_rows, select
from lumos_jax.preparation.settings import Duplicates, Prepare, Source

GOAL = 500_000_000
_TASK = 250_000  # rows


def planted(rng: np.random.Generator, count: int, distance: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(hashes (count,), pairs (P, 2)): a share of the hashes differ from another one in 1 to `distance` bits."""
    base = rng.integers(0, 2**64, count, np.uint64)
    first, changed = np.arange(0, int(count * share)), np.arange(count - int(count * share), count)
    base[changed] = base[first]
    for bit in range(distance):  # the same bit twice leaves what was
        flips = rng.integers(0, 64, len(changed)).astype(np.uint64)
        base[changed] ^= np.uint64(1) << flips if bit == 0 else rng.integers(0, 2, len(changed), np.uint64) << flips
    pairs = np.sort(np.stack([base[first], base[changed]], 1), axis=1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return np.unique(base), np.unique(pairs, axis=0)


def peak(workers: int) -> float:
    """GB of the largest worker so far; of this process, which holds the hashes too, if there are no others."""
    kind = resource.RUSAGE_CHILDREN if workers > 1 else resource.RUSAGE_SELF
    return resource.getrusage(kind).ru_maxrss / 1e6


def processor() -> float:
    """Seconds of processor time so far, of this process and of workers that have ended."""
    used = [resource.getrusage(kind) for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def find(hashes: np.ndarray, distance: int, workers: int) -> tuple[np.ndarray, float]:
    """(pairs, seconds of processor time)."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        parts = [f"{folder}/part-{i}.npy" for i in range(-(-len(hashes) // select.ROWS_OF_PARTITION))]
        for name, some in zip(parts, np.array_split(hashes, len(parts)), strict=True):
            np.save(name, some)
        pathlib.Path(folder, "scratch").mkdir()
        began = processor()
        with engines.processes(workers) as run:
            found = hamming.near_pairs(parts, distance, f"{folder}/scratch", run)
        return found, processor() - began


def pairs(count: int, distance: int, workers: int) -> None:
    hashes, expected = planted(np.random.default_rng(0), count, distance, 0.05)
    found, seconds = find(hashes, distance, workers)
    found = np.unique(found, axis=0)
    known = np.dtype([("left", np.uint64), ("right", np.uint64)])
    both = np.isin(expected.view(known).ravel(), found.view(known).ravel())
    plan_here, plan_goal = hamming.tables(distance, count), hamming.tables(distance, GOAL)
    chance = count**2 / 2 * sum(math.comb(64, bits) for bits in range(1, distance + 1)) / 2**64
    print(
        f"{len(hashes):,} hashes, {distance} bits, {len(plan_here)} tables of {min(t.bits for t in plan_here)} bits: "
        f"{seconds:.1f} core-seconds, {peak(workers):.2f} GB; planted {both.sum():,} of {len(both):,} found, "
        f"{len(found) - both.sum():,} others ({chance:.2f} expected by chance)"
    )
    per_row = seconds / len(plan_here) / count
    compared = sum(GOAL**2 / 2 ** (table.bits + 1) for table in plan_goal)
    hours = (per_row * len(plan_goal) * GOAL + compared / comparisons_a_second()) / 3600
    print(
        f"extrapolated to {GOAL:,}: {len(plan_goal)} tables of {min(t.bits for t in plan_goal)} bits, {hours:.2f} core-hours"
    )


def comparisons_a_second() -> float:
    """Of pairs of hashes in buckets of 240, as 21 bits of 500M have."""
    words = np.sort(np.random.default_rng(0).integers(0, 2**13, 240 << 13, np.uint64) << np.uint64(51))
    words |= np.random.default_rng(1).integers(0, 2**51, len(words), np.uint64)
    words.sort()
    table = hamming.Table(tuple(range(63, -1, -1)), 13)
    began = processor()
    hamming.pairs_of_table(words, [table], 0, 2)
    return 2**13 * 240**2 / 2 / (processor() - began)


def check(count: int = 200_000) -> None:
    """All pairs one by one against the tables."""
    for distance in (1, 2, 3, 4):
        hashes, _ = planted(np.random.default_rng(distance), count, distance + 1, 0.1)
        began, expected = processor(), set()
        for number, one in enumerate(hashes):
            close = np.flatnonzero(np.bitwise_count(hashes[number + 1 :] ^ one) <= distance) + number + 1
            expected |= {(int(one), int(hashes[i])) for i in close}
        seconds = processor() - began
        found, fast = find(hashes, distance, 1)
        there = set(map(tuple, found.tolist()))
        print(
            f"{len(hashes):,} hashes, {distance} bits: {len(expected):,} pairs one by one in {seconds:.1f} s, {len(there):,} "
            f"by tables in {fast:.2f} s; missed {len(expected - there)}, false {len(there - expected)}, "
            f"twice {len(found) - len(there)}"
        )


def scanned(folder: pathlib.Path, count: int, wanted: Prepare) -> None:
    """A scan of `count` synthetic rows, of which 5 % are equal files and 5 % near hashes of earlier ones."""
    import pyarrow as pa
    from pyarrow import parquet

    rng, tasks = np.random.default_rng(0), -(-count // _TASK)
    for number in range(tasks):
        (folder / "tars").mkdir(exist_ok=True)
        (folder / "tars" / f"{number:05d}.tar").write_bytes(b"-")
    made = plan.make(str(folder / "out"), wanted, lambda _: None)
    (folder / "out" / "scan").mkdir()
    first_hashes, first_files = rng.integers(0, 2**64, _TASK, np.uint64), rng.integers(0, 256, (_TASK, 32), np.uint8)
    for number in range(tasks):
        size = min(_TASK, count - number * _TASK)
        hashes, files = rng.integers(0, 2**64, size, np.uint64), rng.integers(0, 256, (size, 32), np.uint8)
        kind = rng.random(size)
        hashes[kind < 0.1] = first_hashes[:size][kind < 0.1]
        files[kind < 0.05] = first_files[:size][kind < 0.05]
        hashes[(kind >= 0.05) & (kind < 0.1)] ^= np.uint64(1) << np.uint64(number % 64)
        names = [f"{number:05d}{i:06d}" for i in range(size)]
        given = {
            "input": np.full(size, number, np.int32), "row": np.arange(size, dtype=np.int32), "key": names,
            "url": [f"https://example.org/images/{name}.jpg" for name in names],
            "sha256": pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), size, [None, pa.py_buffer(files.tobytes())]),
            "bytes": rng.integers(20_000, 100_000, size), "height": rng.integers(220, 1200, size),
            "width": rng.integers(220, 1200, size), "offset": np.arange(size) * 1024, "phash": hashes,
            "phash_valid": np.ones(size, bool), "caption": [f"a photograph of something, number {name}" for name in names],
            **{name: rng.random(size) for name in ("blur", "entropy", "border", "similarity")},
            "aesthetic": rng.uniform(4.5, 7, size), "watermark": rng.random(size) / 2, "unsafe": rng.random(size) / 2,
        }  # fmt: skip
        columns = {name: given.get(name, [default] * size) for name, default in scan_rows.DEFAULTS.items()}
        table = pa.table(
            [pa.array(columns[field.name]).cast(field.type) for field in scan_rows.schema()], schema=scan_rows.schema()
        )
        file = io.BytesIO()
        parquet.write_table(table, file, compression="zstd")
        pathlib.Path(scan_rows.path(str(folder / "out"), number)).write_bytes(file.getvalue())
        digest = hashlib.sha256(file.getvalue()).hexdigest()
        done = scan.Done(size, size, digest, {"": size}, 0, (), 0.0, 0.0, made.digest)
        (folder / "out" / "scan" / f"{number:06d}.json").write_text(json.dumps(dataclasses.asdict(done)))


def whole_selection(count: int, distance: int, workers: int) -> None:
    folder = pathlib.Path(tempfile.mkdtemp(dir="."))
    try:
        source = Source(kind="tars", path=str(folder / "tars"))
        wanted = Prepare(sources=(source,), task_bytes=1, duplicates=Duplicates(phash_distance=distance))
        scanned(folder, count, wanted)
        began = processor()

        def say(line: str) -> None:
            print(f"{processor() - began:7.1f} core-seconds  {line}", flush=True)

        select.run(str(folder / "out"), wanted, workers, say)
        seconds = processor() - began
        rate = count / seconds
        print(
            f"{count:,} rows in {seconds:.1f} core-seconds: {rate:,.0f} rows/s a core, {peak(workers):.2f} GB; "
            f"extrapolated: 190M in {190e6 / rate / 60:.1f} core-minutes, 500M in {5e8 / rate / 60:.1f}"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pairs", "check", "select"))
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--distance", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    if given.what == "check":
        check()
    else:
        (pairs if given.what == "pairs" else whole_selection)(given.rows, given.distance, given.workers)
