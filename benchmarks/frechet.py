"""Time of a Frechet distance with its jackknife of 20 blocks, as `evaluate score` computes it.

    python -m benchmarks.frechet
    python -m benchmarks.frechet --samples=50000

Random features of 2,048 dimensions. Prints wall and processor seconds; linear algebra has one thread, as in the command.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from lumos_jax.evaluation import frechet
from lumos_jax.evaluation.references import Reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--samples", type=int, nargs="*", default=[2000, 10_000, 50_000])
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    scale = np.geomspace(0.01, 1, args.dim, dtype=np.float32)
    moments = frechet.Moments.of(rng.standard_normal((3 * args.dim, args.dim), np.float32) * scale)
    for count in args.samples:
        samples = rng.standard_normal((count, args.dim), np.float32) * scale
        reference = Reference(moments.mean, moments.covariance, moments.count, "inception")
        wall, processor = time.perf_counter(), time.process_time()
        estimate = frechet.frechet(samples, reference)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        print(
            f"{count} samples of {args.dim} features: {wall:.1f} s, {processor:.1f} s of one processor ({estimate.value:.4g})"
        )


if __name__ == "__main__":
    main()
