"""Kills a sampling job again and again, and checks that it ends with the samples of one that was never interrupted.

    python benchmarks/kill_evaluation.py --workdir=RUN [--kills=20] [--num=2000] [--shard-size=5]

Two processes sample the set `scenes` from the run (a :test run will do). Both are killed (SIGKILL) at a random moment after the
first new shard, and started again, until the kills are used up. One process, with other batches, ends the job. Prints what each
attempt left, and whether the digests of all shards are those of an uninterrupted job of one process.

    python benchmarks/kill_evaluation.py --workdir=RUN --topologies [--num=512] [--shard-size=64]

Samples on 1, 2, 4 and 8 devices of one process instead, in batches of 8 and 64 over all of them. Prints the share of values
that differ from the first job's, and the Frechet distance to the true images (features of the shipped ViT) beside the first's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

from lumos_jax.evaluation import features, frechet, scoring
from lumos_jax.evaluation.shards import Samples

ROOT = pathlib.Path(__file__).parent.parent


def start(args: argparse.Namespace, out: pathlib.Path, *flags: str, devices: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-m", "lumos_jax.evaluate", "sample", f"--workdir={args.workdir}", "--set=scenes"]
    command += [f"--num={args.num}", f"--shard-size={args.shard_size}", f"--out={out}", *flags]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }  # fmt: skip
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(output)


def count(out: pathlib.Path) -> int:
    return len(list(out.glob("shard_*.npz")))


def interrupt(args: argparse.Namespace, out: pathlib.Path, rng: random.Random) -> None:
    """Starts both processes and kills them after the first new shard."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    before = count(out)
    both = [
        start(args, out, f"--coordinator=localhost:{port}", "--processes=2", f"--process={i}", "--batch=8")
        for i in range(2)
    ]
    while count(out) == before and all(process.poll() is None for process in both):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, args.longest))
    ended = [process.poll() for process in both]
    for process in both:
        process.kill()
    outputs = [process.communicate()[0] for process in both]
    if ended != [None, None]:
        sys.exit(f"a process ended with code {ended} before it was killed: raise --num\n{''.join(outputs)}")


def compare_topologies(args: argparse.Namespace, folder: pathlib.Path) -> None:
    network, first, reference = features.open_network("scene_vit"), None, None
    for devices, batch in itertools.product((1, 2, 4, 8), (8, 64)):
        out = folder / f"{devices}_{batch}"
        finish(start(args, out, f"--batch={batch // devices}", devices=devices))
        samples = Samples(out)
        pixels = np.concatenate([shard for *_, shard in samples])
        if first is None:
            truth = [samples.references(shard) for shard in range(samples.shards)]
            reference = scoring.make_reference(network, truth, len(samples), {})
        distance = frechet.frechet(network(pixels), reference).value
        first = first or (pixels, distance)
        print(
            f"{devices} devices, batches of {batch}: {(pixels != first[0]).mean():.1e} of the values differ, Frechet distance "
            f"{distance:.8f}, relative difference {abs(distance / first[1] - 1):.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--shard-size", type=int, default=5)
    parser.add_argument(
        "--longest", type=float, default=0.2, help="seconds from the first new shard to the kill, at most"
    )
    parser.add_argument("--topologies", action="store_true")
    args, rng = parser.parse_args(), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        if args.topologies:
            compare_topologies(args, pathlib.Path(folder))
            return
        whole, killed = pathlib.Path(folder, "whole"), pathlib.Path(folder, "killed")
        finish(start(args, whole))
        for kill in range(args.kills):
            interrupt(args, killed, rng)
            partial = len(list(killed.glob("*.partial")))
            print(f"kill {kill + 1}: {count(killed)} of {count(whole)} shards, {partial} partial files", flush=True)
        finish(start(args, killed, "--batch=48"))
        a, b = Samples(whole), Samples(killed)
        b.verify()
        print(f"digests of {len(a.digests())} shards equal: {a.digests() == b.digests()}")


if __name__ == "__main__":
    main()
