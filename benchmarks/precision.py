"""Loss curves in several precisions: the same network, scenes, first weights and keys, trained side by side.

    python -m benchmarks.precision                        float32 and bfloat16; 300 steps
    python -m benchmarks.precision --variants float32 bfloat16 --steps 1000

A variant is a compute dtype (config.model.dtype). It trains configs/i2i.py:test at width 64. All steps of a run are one
program, so that machines with other work on them lose little time between steps.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from configs import i2i
from lumos_jax import config, data
from lumos_jax.config import io as config_io
from lumos_jax.train.experiment import Experiment


def settings_of(variant: str, steps: int) -> config.Settings:
    made = i2i.get_config("test")
    made.data.scenes.num_scenes = 100_000
    made.model.size = "64x2x2"
    made.optimizer.decay, made.optimizer.learning_rate = "constant", 1e-3
    made.train.steps = steps
    made.model.dtype = variant
    return config_io.resolve(made)


def curve(settings: config.Settings, images: np.ndarray) -> np.ndarray:
    """The loss of each step; images: uint8 (steps, B, H, W, 3)."""
    experiment = Experiment.build(settings, jax.devices()[:1])

    @jax.jit
    def run(state, frozen, images):
        def one(state, image):
            return experiment.train_step(state, frozen, {"image": image, "weight": np.ones(len(image), np.float32)})

        return jax.lax.scan(one, state, images)[1]["loss"]

    return np.asarray(run(experiment.init_state(), experiment.frozen, images))


def read(settings: config.Settings) -> np.ndarray:
    """The images of every step."""
    size = settings.train.batch_size
    batches = data.make_train_iterator(
        settings.data, data.make_source(settings.data), batch_size=size, rows=range(size), start_step=0
    )
    images = np.stack([next(batches)["image"] for _ in range(settings.train.steps)])
    batches.close()
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    images = read(settings_of("float32", args.steps))
    parts, exact = np.array_split(np.arange(args.steps), 6), None
    heads = " | ".join(f"steps {part[0]} to {part[-1]}" for part in parts if len(part))
    print(f"| variant | {heads} | deviation from the first | seconds |")
    for variant in args.variants:
        start = time.perf_counter()
        losses = curve(settings_of(variant, args.steps), images)
        exact = losses if exact is None else exact
        means = " | ".join(f"{losses[part].mean():.4f}" for part in parts if len(part))
        off = np.sqrt(np.mean(np.square(losses / exact - 1)))
        print(f"| {variant} | {means} | {off:.2%} | {time.perf_counter() - start:.0f} |", flush=True)


if __name__ == "__main__":
    main()
