"""Twenty thousand shards on this machine: start, memory, open files and reads of ArrayRecord, and the headers of .tar shards.

    python -m benchmarks.shards_at_scale
    python -m benchmarks.shards_at_scale --shards=2000 --tars=16

ArrayRecord: one shard of `--records` records of 2 kB under `--shards` names (hard links), under a limit of 1,000 open files.
    start       seconds until the source is open: the first time, and again, when the counts are kept
    reads       of random records: those that are not what was written, microseconds each, open files and memory at the end
    reader      memory of an open reader and time of a read, with its index in memory and on disk
.tar: shards as img2dataset writes them (jpg, json, txt), 10,000 records of 55 kB each, their content a hole in the file.
    tarfile     microseconds a member of Python's tarfile, which read the headers of earlier versions
    headers     the same of lumos_jax.data.tar_index, in one process
    index       seconds for `--tars` shards by processes, and bytes kept a record
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import resource
import tarfile
import tempfile
import time

import numpy as np

from lumos_jax import data
from lumos_jax.data import shards as readers
from lumos_jax.data import storage, tar_index
from lumos_jax.data.sources.arrayrecord import ArrayRecordSource
from lumos_jax.data.sources.webdataset import TarSource

SIZE, RECORDS_OF_A_TAR, ALL = 2048, 10_000, 190_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--records", type=int, default=9_500, help="of a shard")
    parser.add_argument("--reads", type=int, default=5_000)
    parser.add_argument("--tars", type=int, default=64)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with tempfile.TemporaryDirectory() as folder:
        arrayrecord(pathlib.Path(folder) / "arrayrecord", args)
        tars(pathlib.Path(folder) / "tars", args.tars)


def arrayrecord(folder: pathlib.Path, args: argparse.Namespace) -> None:
    folder.mkdir()
    first = folder / f"a-00000-of-{args.shards:05}.arrayrecord"
    data.write_arrayrecord(first, (content(i) for i in range(args.records)), compress=False)
    for number in range(1, args.shards):
        os.link(first, folder / f"a-{number:05}-of-{args.shards:05}.arrayrecord")
    before = memory()
    for name in ("first", "again"):
        began = time.perf_counter()
        source = ArrayRecordSource(str(folder), kept=folder.parent / "kept")
        print(f"start, {name:6} {time.perf_counter() - began:6.1f} s for {args.shards} shards, {len(source):,} records")
    chosen = random.Random(0).sample(range(len(source)), args.reads)
    began = time.perf_counter()
    wrong = sum(source.read(index) != content(index % args.records) for index in chosen)
    each, files = (time.perf_counter() - began) / args.reads * 1e6, len(os.listdir("/proc/self/fd"))
    print(
        f"reads         {wrong} wrong of {args.reads}, {each:.0f} us each; {files} open files; {memory() - before:.0f} MB"
    )
    readers._readers.clear()
    for name, options in (("in memory", readers._RANDOM_ACCESS), ("on disk", readers._SMALL)):
        before, opened = (
            memory(),
            [readers._open(str(first), options, file_reader_buffer_size=32768) for _ in range(200)],
        )
        [reader.read([i]) for i, reader in enumerate(opened)]
        began = time.perf_counter()
        [reader.read([args.records - 1 - i]) for i, reader in enumerate(opened)]
        each = (time.perf_counter() - began) / len(opened) * 1e6
        print(f"reader        index {name}: {(memory() - before) / len(opened) * 1e3:.1f} kB, {each:.0f} us a read")


def tars(folder: pathlib.Path, count: int) -> None:
    folder.mkdir()
    first = folder / "00000.tar"
    with open(first, "wb") as file:
        for number in range(RECORDS_OF_A_TAR):
            for ending, size in (("jpg", 55_000 + number), ("json", 700), ("txt", 60)):
                member = tarfile.TarInfo(f"{number:09}.{ending}")
                member.size = size
                file.write(member.tobuf(tarfile.GNU_FORMAT))
                file.seek(-(-size // 512) * 512, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    for number in range(1, count):
        os.link(first, folder / f"{number:05}.tar")
    members = 3 * RECORDS_OF_A_TAR
    began = time.process_time()
    with tarfile.open(first) as tar:
        assert sum(1 for _ in tar) == members
    print(f"tarfile       {(time.process_time() - began) / members * 1e6:.1f} us a member")
    began = time.process_time()
    tar_index.index_of(storage.stat(str(first)), None)
    each = (time.process_time() - began) / members
    print(
        f"headers       {each * 1e6:.1f} us a member, {each * 3 * ALL / 3600:.2f} core-hours for {ALL:,} (extrapolated)"
    )
    began, cpu = time.perf_counter(), children()
    source = TarSource(str(folder), folder / "kept")
    seconds, cpu = time.perf_counter() - began, children() - cpu
    kept = sum(file.stat().st_size for file in (folder / "kept").rglob("*.index")) / len(source)
    print(f"index         {seconds:.1f} s for {count} shards, {cpu / len(source) / 3 * 1e6:.1f} us of CPU a member")
    print(f"              {kept:.1f} bytes a record, {kept * ALL / 1e9:.1f} GB on disk for {ALL:,} (extrapolated)")
    before, began = memory(), time.perf_counter()
    tar_index._tables.clear()
    source = TarSource(str(folder), folder / "kept")
    print(f"again         {time.perf_counter() - began:.2f} s, {memory() - before:.0f} MB of memory of its own")


def children() -> float:
    """CPU seconds of processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def memory() -> float:
    """MB of this process that no other shares."""
    with open("/proc/self/smaps_rollup") as file:
        lines = dict(line.split(":", 1) for line in file if ":" in line)
    return sum(int(lines[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) / 1e3


if __name__ == "__main__":
    main()
