"""Records from object stores behind 50 ms of latency and 1 % of 503s: rate, losses, order; and stores that do not answer.

    python -m benchmarks.remote_reads
    python -m benchmarks.remote_reads --stores=s3 --records=4000

Local servers speak the real protocols (moto for s3://, gcp-storage-emulator for gs://) behind a proxy that adds the latency and
the 503s (tests/servers.py). The emulators answer some 200 to 400 requests a second on a core, fewer than are measured here, so
that a first pass asks each range of them and the following ones have the proxy replay the same bytes. For .tar and ArrayRecord
shards of 55 kB JPEGs it prints

    fetch     records a second of Source.fetch, in random order, batches of 128 in four threads, as the loader calls it
    blocks    the same of blocks of 128 consecutive records, which are one request each, not replayed
    batches   the same of data.make_train_iterator at 256 px, decoding included, and what differs from the same files on disk
    block     batches with config.data.order=block
    nobody    seconds until the error about a port at which nothing listens, or which accepts and is silent; and the error

with the CPU time that this process took for a record: its inverse is what one core can do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent import futures

import numpy as np

from benchmarks.input_pipeline import photograph
from lumos_jax import config, data
from lumos_jax.data import storage
from tests import servers

BATCH, THREADS = 128, 4
BUCKET = "pictures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", default="s3,gs")
    parser.add_argument("--records", type=int, default=2048)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--failures", type=float, default=0.01, help="share of 503s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = pathlib.Path(folder)
        os.environ["LUMOS_JAX_CACHE"] = str(root / "cache")
        write_shards(root, args.records)
        for kind in args.stores.split(","):
            port = stack.enter_context(servers.store(kind, BUCKET))
            slow = stack.enter_context(servers.proxy(port, args.latency, args.failures))
            os.environ |= servers.environment(kind, slow)
            for form in ("arrayrecord", "webdataset"):
                for file in sorted((root / form).iterdir()):
                    storage.write_whole(f"{kind}://{BUCKET}/{form}/{file.name}", file.read_bytes())
                measure(kind, form, root / form, slow)
            unreachable(kind)


def write_shards(root: pathlib.Path, count: int) -> None:
    """Four shards of each form with the same records; no two are the same bytes."""
    rng, encoded = np.random.default_rng(0), []
    for _ in range(32):
        buffer = io.BytesIO()
        photograph(rng).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    images = [encoded[i % 32] + i.to_bytes(8, "little") for i in range(count)]
    for form in ("arrayrecord", "webdataset"):
        (root / form).mkdir()
    for shard, part in enumerate(np.array_split(np.arange(count), 4)):
        data.write_arrayrecord(root / "arrayrecord" / f"{shard}.arrayrecord", [images[i] for i in part], compress=False)
        with tarfile.open(root / "webdataset" / f"{shard}.tar", "w") as tar:
            for i in part:
                member = tarfile.TarInfo(f"{i:06d}.jpg")
                member.size = len(images[i])
                tar.addfile(member, io.BytesIO(images[i]))
    print(f"{count} records of {sum(map(len, images)) / count / 1e3:.0f} kB, {os.cpu_count()} cores")


def measure(kind: str, form: str, folder: pathlib.Path, port: int) -> None:
    settings = config.Data(source=form, path=f"{kind}://{BUCKET}/{form}", image_size=256, holdout=0)
    began = time.perf_counter()
    source = data.make_source(settings)
    print(f"{kind}://  {form}: opened in {time.perf_counter() - began:.1f} s")
    same = source.fingerprint() == data.make_source(config.replace(settings, {"path": str(folder)})).fingerprint()
    print(f"    the fingerprint is that of the files on disk: {same}")
    local = data.make_source(config.replace(settings, {"path": str(folder)}))
    rng = np.random.default_rng(0)
    blocks = rng.permutation(len(source) // BATCH)[:, None] * BATCH + np.arange(BATCH)
    scattered = rng.permutation(len(source)).tolist()
    for name, order in (
        ("first", scattered),
        ("fetch", scattered),
        ("fetch", scattered),
        ("blocks", blocks.ravel().tolist()),
    ):
        before = servers.counts(port)
        elapsed, cpu, wrong = fetch(source, local, order)
        now = {key: value - before[key] for key, value in servers.counts(port).items()}
        rate, each = len(order) / elapsed, cpu / len(order) * 1e3
        print(f"    {name:8} {rate:6.0f} records/s, {each:.2f} ms of CPU each; {wrong} wrong; {now}")
    for order in ("global", "block"):
        chosen = config.replace(settings, {"order": order, "block_records": 64, "block_window": 8})
        at_home = batches(config.replace(chosen, {"path": str(folder)}), local)
        here = batches(chosen, source)
        differing = 0
        for found, expected in zip(here, at_home, strict=True):
            same = [np.array_equal(found[name], expected[name]) for name in ("record", "image", "weight")]
            differing += not (all(same) and found["weight"].all())
        began, cpu, rows = time.perf_counter(), time.process_time(), 0
        for found in batches(chosen, source):
            rows += len(found["record"])
        elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
        rate, each = rows / elapsed, cpu / rows * 1e3
        print(
            f"    {order:8} {rate:6.0f} records/s decoded, {each:.2f} ms of CPU each; {differing} batches differ from disk"
        )


def fetch(source: data.Source, local: data.Source, order: list[int]) -> tuple[float, float, int]:
    """Seconds, CPU seconds, and how many records are not those on disk."""
    parts = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    began, cpu = time.perf_counter(), time.process_time()
    with futures.ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(source.fetch, parts))
    elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    wrong = sum(one.images[i] != local.read(i) for one, part in zip(found, parts, strict=True) for i in part)
    return elapsed, cpu, wrong


def batches(settings: config.Data, source: data.Source) -> Iterator[dict[str, np.ndarray]]:
    """An epoch."""
    iterator = data.make_train_iterator(settings, source, batch_size=BATCH, rows=range(BATCH), start_step=0)
    for _ in range(len(source) // BATCH):
        yield next(iterator)
    iterator.close()


def unreachable(kind: str) -> None:
    code = f"from lumos_jax import config, data; data.make_source(config.Data(source='arrayrecord', path='{kind}://{BUCKET}/x'))"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(200)
        for name, port in (("closed", servers.free_port()), ("silent", silent.getsockname()[1])):
            began = time.perf_counter()
            run = subprocess.run([sys.executable, "-c", code], env=os.environ | servers.environment(kind, port),
                                 capture_output=True, text=True, timeout=200, check=False)  # fmt: skip
            print(f"    {name}   {time.perf_counter() - began:.0f} s: {run.stderr.strip().splitlines()[-1][:200]}")


if __name__ == "__main__":
    main()
