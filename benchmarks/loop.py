"""What the training loop adds to the bare compiled step, on the desk configuration.

    python -m benchmarks.loop --rounds=4

Alternates, in one process: the compiled step alone, over and over on one batch that is already on the device; the loop with
batches that lie in memory (what the loop itself costs: order, collating, transfer, metrics, progress); the loop with scenes
rendered on the same cores while it trains. Prints milliseconds a step and the loop's share, as medians over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
import time

import jax
import numpy as np

from configs import i2i
from lumos_jax import data
from lumos_jax.config import io as config_io
from lumos_jax.train import loop


class InMemory(data.Source):
    """The first records of another source, decoded beforehand."""

    def __init__(self, source, count: int):
        self.pixels = [source.read(i) for i in range(count)]

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> np.ndarray:
        return self.pixels[index]

    def describe(self, index: int) -> str:
        return f"record {index} in memory"

    def fingerprint(self) -> str:
        return "in memory"


def bare(run, steps: int) -> float:
    """Seconds per step of the compiled step alone."""
    size = run.settings.train.batch_size
    host = data.read_batch(run.settings.data, run.source, list(range(size)))
    batch = run.experiment.device_batch(host, size)
    step, state = run.experiment.train_step, run.start.state
    for number in range(steps + 5):
        if number == 5:
            begun = time.perf_counter()
        state, metrics = step(state, run.experiment.frozen, batch)
        jax.block_until_ready(metrics)
    return (time.perf_counter() - begun) / steps


def looped(run) -> float:
    """Seconds per step of the loop, from its own metrics, without the first window, which holds the compilation."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        loop.train(run)
    lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["step_seconds"] for line in lines[1:] if "loss" in line)


def prepare(directory: str, steps: int, memory: bool):
    config = i2i.get_config("desk")
    config.data.holdout = config.eval.every = 0
    config.optimizer.warmup_steps = 0
    config.log.every = steps // 4
    config.checkpoint.every = 10**6
    config.train.steps = steps
    config.data.scenes.num_scenes = 1024 if memory else 10**6
    with contextlib.redirect_stdout(io.StringIO()):
        run = loop.prepare(config_io.resolve(config), directory)
    return dataclasses.replace(run, source=InMemory(run.source, 1024)) if memory else run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="steps a measurement (60)")
    args = parser.parse_args()
    times: dict[str, list[float]] = {"bare step": [], "loop, batches in memory": [], "loop, scenes rendered": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as root:
            times["bare step"].append(bare(prepare(f"{root}/a", args.steps, True), args.steps))
            times["loop, batches in memory"].append(looped(prepare(f"{root}/b", args.steps, True)))
            times["loop, scenes rendered"].append(looped(prepare(f"{root}/c", args.steps, False)))
    for name, values in times.items():
        share = statistics.median(v / b - 1 for v, b in zip(values, times["bare step"], strict=True))
        print(f"{name:<26}{statistics.median(values) * 1e3:8.1f} ms a step  {share:+7.1%}")


if __name__ == "__main__":
    main()
