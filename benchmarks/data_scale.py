"""190 million records, simulated: start-up, memory, order, open files and requests of 20,000 shards of 9,500 records each.

    python -m benchmarks.data_scale --root=/tmp/scale          (7 GB there and 10 minutes; removed at the end)
    python -m benchmarks.data_scale --root=/tmp/scale --keep --cases=global,buckets

A few real shards have 20,000 names (hard links), and the arrays of prepared data sets are of their full size. Each case is a
process of its own with at most 1,000 open files. It prints the seconds from its start to the first batch and to the end of
`--steps` batches, its peak memory (the largest of its processes, and that which is not shared with others), open files, and how
many records were lost or were others than the order says: images tell their numbers by their colors. `before` is what the same
took before prepared data sets, on the same two cores, and for remote storage what a read of each record costs.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from lumos_jax import config, data
from lumos_jax.data import aspect, order
from lumos_jax.data.manifest import Input, Manifest, Shard, write_manifest

SHARDS, EACH, REAL, PARTS = 20_000, 9_500, 4, 5
RECORDS, HOSTS, BATCH, SIDE, DIGITS = SHARDS * EACH, 64, 2048, 32, 24
FILES = 1_000  # that a process may have open
DOLLARS = 0.4e-6  # a request
AHEAD = 8  # batches that may be ready when the first is taken, and do not count as speed


def seconds() -> float:
    """Since this process began."""
    began = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return round(float(pathlib.Path("/proc/uptime").read_text().split()[0]) - began, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=pathlib.Path)
    parser.add_argument("--keep", action="store_true", help="leave the files for another run")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(CASES[args.case](args)))
        return
    if not (args.root / "made").exists():
        make(args.root)
    environment = os.environ | {"LUMOS_JAX_CACHE": str(args.root / "cache")}
    print("| case | before | now |\n| --- | --- | --- |")
    for case in args.cases.split(","):
        options = [f"--root={args.root}", f"--steps={args.steps}", f"--case={case}"]
        command = [sys.executable, "-m", "benchmarks.data_scale", *options]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-2000:]}
        print(
            f"| {case} | {BEFORE.get(case, '')} | "
            + ", ".join(f"{name} {value}" for name, value in found.items())
            + " |",
            flush=True,
        )
    if not args.keep:
        shutil.rmtree(args.root)


def picture(number: int) -> bytes:
    """A picture whose color tells a number below 24^3."""
    digits = [10 * (number // DIGITS**i % DIGITS) + 5 for i in range(3)]
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), tuple(digits)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(image: np.ndarray) -> int:
    digits = image[image.shape[0] // 2, image.shape[1] // 2].astype(int) // 10
    return int((digits * DIGITS ** np.arange(3)).sum())


def make(root: pathlib.Path) -> None:
    """Shards, and prepared data sets of them: compacted; index, and url, the same behind URLs; part-0 ... of .tar files."""
    pictures = [picture(number) for number in range(EACH)]
    (root / "shards").mkdir(parents=True)
    data.write_arrayrecord(root / "real.arrayrecord", pictures, compress=False)
    with tarfile.open(root / "real.tar", "w") as tar:
        for number, content in enumerate(pictures):
            for name, member in ((f"{number}.png", content), (f"{number}.txt", f"number {number}".encode())):
                about = tarfile.TarInfo(name)
                about.size = len(member)
                tar.addfile(about, io.BytesIO(member))
    for kind in ("arrayrecord", "tar"):
        for number in range(SHARDS):
            if number % (SHARDS // REAL) == 0:
                real = shutil.copy(root / f"real.{kind}", root / "shards" / f"real-{number}.{kind}")
            os.link(real, root / "shards" / f"{number:05}.{kind}")
    with tarfile.open(root / "real.tar") as tar:
        places = np.reshape([(member.offset_data, member.size) for member in tar], (EACH, 4)).T
    names = ("offsets", "lengths", "caption_offsets", "caption_lengths")
    one = {name: row.astype(dtype) for name, row, dtype in zip(names, places, (np.uint64, np.uint32) * 2, strict=True)}
    one["caption_kinds"] = np.ones(EACH, np.uint8)
    some = np.array([(480, 640), (640, 480), (512, 512), (600, 400), (300, 900), (1024, 500)], np.uint16)
    sizes = np.random.default_rng(0).choice(some, EACH)
    shards = root / "shards"
    prepared(
        root / "compacted", "arrayrecord", [f"../shards/{i:05}.arrayrecord" for i in range(SHARDS)], {"sizes": sizes}
    )
    prepared(root / "index", "index", [f"{shards}/{i:05}.tar" for i in range(SHARDS)], {"sizes": sizes, **one})
    prepared(root / "url", "index", [f"file://{shards}/{i:05}.tar" for i in range(SHARDS)], root / "index")
    of_part = np.array_split(np.arange(SHARDS), PARTS)
    for part, numbers in enumerate(of_part):
        arrays = root / "part-0" if part else {"sizes": sizes, **one}
        prepared(root / f"part-{part}", "index", [f"{shards}/{i:05}.tar" for i in numbers], arrays)
    (root / "made").touch()


def prepared(path: pathlib.Path, layout: str, shards: list[str], arrays: dict[str, np.ndarray] | pathlib.Path) -> None:
    """A prepared data set. arrays: those of one shard, which all have; or a data set that has the same."""
    (path / "index").mkdir(parents=True)
    if isinstance(arrays, pathlib.Path):
        for name in ("sizes.npy", "index"):
            shutil.rmtree(path / name, ignore_errors=True)
            (path / name).symlink_to(arrays / name)
    else:
        for name, one in arrays.items():
            file = path / f"{name}.npy" if name == "sizes" else path / "index" / f"{name}.npy"
            whole = np.lib.format.open_memmap(file, "w+", one.dtype, (len(shards) * EACH, *one.shape[1:]))
            whole.reshape(len(shards), *one.shape)[:] = one
    kind = shards[0].rpartition(".")[2]
    size = (path.parent / f"real.{kind}").stat().st_size
    entries = tuple(Shard(file, kind, EACH, size, "0" * 64, (i,)) for i, file in enumerate(shards))
    inputs = tuple(Input(f"s3://bucket/{i:05}.tar", 500_000_000, "etag", "web", "0" * 64) for i in range(len(shards)))
    write_manifest(str(path), Manifest("plan", layout, len(shards) * EACH, layout == "index", inputs, entries))


def settings(args: argparse.Namespace, name: str = "compacted", url: bool = False, **fields: Any) -> config.Data:
    parts = tuple({"source": "prepared", "path": str(args.root / f"part-{i}"), "weight": 1.0 + i} for i in range(PARTS))
    path = {"source": "prepared", "path": f"{'file://' if url else ''}{args.root / name}"}
    own = {"mixture": parts} if fields.get("source") == "mixture" else path
    return config.Data(image_size=SIDE, holdout=50_000, **own | fields)


def run(args: argparse.Namespace, rows: range = range(BATCH // 4, BATCH // 2), **fields: Any) -> dict[str, Any]:
    """Seconds, memory, open files and lost records of the first batches that one host reads."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    chosen = settings(args, **fields)
    source = data.make_source(chosen)
    opened = seconds()
    batches = data.make_train_iterator(chosen, source, batch_size=BATCH, rows=rows, start_step=0)
    first, used, lost, wrong, files = 0.0, None, 0, 0, 0
    for step in range(args.steps):
        batch = next(batches)
        if step == AHEAD - 1:
            began = time.monotonic()
        if not first:
            first, used = seconds(), resource.getrusage(resource.RUSAGE_SELF)
        lost += int((batch["weight"] == 0).sum())
        wrong += sum(
            number_of(image) != record % EACH for image, record in zip(batch["image"], batch["record"], strict=True)
        )
        files = max(files, len(os.listdir("/proc/self/fd")))
    memory = memory_of("VmHWM"), memory_of("RssAnon")
    batches.close()
    return {
        "records": len(source), "source opened (s)": opened, "first batch (s)": first,
        "of it CPU (s)": round(used.ru_utime + used.ru_stime, 1),
        "records a second": round((args.steps - AHEAD) * len(rows) / (time.monotonic() - began)),
        "all batches (s)": seconds(), "peak memory (GB)": round(memory[0], 2),
        "own memory (GB)": round(memory[1], 2), "open files": files,
        "read": args.steps * len(rows), "lost": lost, "wrong": int(wrong),
    }  # fmt: skip


def memory_of(field: str) -> float:
    """GB, of the largest of this process and its workers."""
    processes = ["self", *(child.pid for child in multiprocessing.active_children())]
    texts = [pathlib.Path(f"/proc/{process}/status").read_text() for process in processes]
    return max(int(text.partition(f"{field}:")[2].split()[0]) for text in texts) / 2**20


def hosts(args: argparse.Namespace, steps: int = 3, **fields: Any) -> dict[str, Any]:
    """Whether 64 hosts, each with an order of its own, together read the rows of the global order; and an epoch of pieces."""
    chosen = settings(args, **fields)
    source = data.make_source(chosen)

    def batch_of() -> order.BatchOf:
        if chosen.has_buckets:
            return aspect.BucketOrder(chosen, source, aspect.assign(chosen, source, BATCH), BATCH).batch_of
        one = order.training_order(chosen, source, BATCH)
        return lambda step: (one, step)

    kept = [batch_of() for _ in range(2 if chosen.has_buckets else HOSTS)]
    began, equal, start = time.monotonic(), True, 12_345
    for step in range(steps):
        whole = order.host_steps(kept[0], batch_size=BATCH, rows=range(BATCH), start_step=start)(step)
        union: list = []
        for host in range(HOSTS):
            rows = range(host * BATCH // HOSTS, (host + 1) * BATCH // HOSTS)
            own = order.host_steps(kept[host % len(kept)], batch_size=BATCH, rows=rows, start_step=start + step)
            union += own(0)
        equal &= union == whole
    spent = (time.monotonic() - began) / (2 * steps * BATCH)
    return {"hosts": HOSTS, "steps": steps, "union is the global order": equal, "us a record": round(1e6 * spent, 1)}


def requests(args: argparse.Namespace, latency: float = 0.0, **fields: Any) -> dict[str, Any]:
    """Requests of one of 64 hosts a record that it reads from URLs: of records, and of the indices of ArrayRecord shards, which
    are read once and kept. latency: seconds that each takes longer."""
    from fsspec.implementations.local import LocalFileSystem

    found: list[tuple[bool, int]] = []
    original = LocalFileSystem.cat_file

    def counted(
        self: LocalFileSystem, path: str, start: int | None = None, end: int | None = None, **more: Any
    ) -> bytes:
        time.sleep(latency)
        data = original(self, path, start=start, end=end, **more)
        if "/shards/" in path:
            found.append((end == os.path.getsize(path), len(data)))
        return data

    LocalFileSystem.cat_file = counted
    told = run(args, rows=range(17 * BATCH // HOSTS, 18 * BATCH // HOSTS), **fields)
    count, read = sum(not index for index, _ in found), told["read"]
    return {
        "requests a record": round(count / read, 4), "dollars an epoch": round(DOLLARS * RECORDS * count / read, 2),
        "requests of indices": len(found) - count, **told,
    }  # fmt: skip


BEFORE = {
    "global": "10.0 s to open every shard; 348 of 1,344 records lost; 1.4 GB of indices a process",
    "buckets": "126 GB and 398 s on every host, 328 GB of futures, every record read",
    "URL global": "$76 an epoch",
    "URL global 50 ms": "79 records a second",
}
BLOCK = {"order": "block"}
BUCKETS = {"sample_type": "captioned", "aspect_ratios": (0.5, 2.0)}
CASES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "global": run,
    "block": functools.partial(run, **BLOCK),
    "index with captions": functools.partial(run, name="index", sample_type="captioned"),
    "mixture of five": functools.partial(run, source="mixture"),
    "index two workers": functools.partial(run, name="index", sample_type="captioned", workers=2),
    "buckets": functools.partial(run, name="index", **BUCKETS),
    "buckets again": functools.partial(run, name="index", **BUCKETS),
    "buckets two workers": functools.partial(run, name="index", workers=2, **BUCKETS),
    "buckets of a mixture": functools.partial(run, source="mixture", **BUCKETS),
    "hosts global": hosts,
    "hosts block": functools.partial(hosts, **BLOCK),
    "hosts mixture": functools.partial(hosts, source="mixture"),
    "hosts mixture block": functools.partial(hosts, source="mixture", **BLOCK),
    "hosts buckets": functools.partial(hosts, name="index", **BUCKETS),
    "URL global": functools.partial(requests, name="url"),
    "URL global 50 ms": functools.partial(requests, latency=0.05, name="url"),
    "URL block 50 ms": functools.partial(requests, latency=0.05, name="url", **BLOCK),
    "URL block": functools.partial(requests, name="url", **BLOCK),
    "URL block captions": functools.partial(requests, name="url", sample_type="captioned", **BLOCK),
    "URL block compacted": functools.partial(requests, url=True, **BLOCK),
}

if __name__ == "__main__":
    main()
