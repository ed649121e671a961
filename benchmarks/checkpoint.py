"""How long a checkpoint stalls a run, and how long a restore takes.

    python -m benchmarks.checkpoint --width=384 --depth=12 --repeats=5

Makes the training state of a DiT of that size (parameters, EMA, two AdamW moments), saves it asynchronously into --directory
and prints the time until `save` returns (the stall), until it is on disk, and to restore it; and the stall's share of
`--interval` seconds between checkpoints.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import jax
import numpy as np

from configs import i2i
from lumos_jax import config
from lumos_jax.checkpoints import Checkpoints
from lumos_jax.config import io as config_io
from lumos_jax.train.experiment import Experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between checkpoints (60)")
    parser.add_argument("--directory", help="where to write; default: a temporary directory")
    args = parser.parse_args()
    made = i2i.get_config("desk")
    made.model.update(size=f"{args.width}x{args.depth}x{args.heads}", dtype="float32")
    settings = config_io.resolve(made)
    experiment = Experiment.build(settings)
    meta = {"settings": config_io.to_dict(settings), "fingerprints": {}, "memory": {}}
    abstract, state = experiment.abstract_state, experiment.init_state()
    jax.block_until_ready(state)
    size_mb = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    stalls, writes, restores = [], [], []
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        checkpoints = Checkpoints(directory, config.Checkpoint(keep=2))
        for step in range(1, args.repeats + 2):
            begun = time.perf_counter()
            checkpoints.save(step, vars(state), meta)
            stalls.append(time.perf_counter() - begun)
            checkpoints.wait()
            writes.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            restored = jax.block_until_ready(checkpoints.restore(step, vars(abstract)))
            restores.append(time.perf_counter() - begun)
        same = all(
            np.array_equal(a, b) for a, b in zip(jax.tree.leaves(vars(state)), jax.tree.leaves(restored), strict=True)
        )
        checkpoints.close()
    stall, write, restore = (statistics.median(times[1:]) for times in (stalls, writes, restores))  # the first warms up
    print(f"state {size_mb:.0f} MB, {args.repeats} saves, restored bit for bit: {same}")
    print(f"stall   {stall * 1e3:7.0f} ms  ({stall / args.interval:.2%} of an interval of {args.interval:.0f} s)")
    print(f"on disk {write * 1e3:7.0f} ms")
    print(f"restore {restore * 1e3:7.0f} ms")


if __name__ == "__main__":
    main()
