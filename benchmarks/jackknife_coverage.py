"""Whether jackknife intervals of Frechet distances cover the truth as often as they say.

    python -m benchmarks.jackknife_coverage

Samples are drawn from a Gaussian, so that the true distance to the reference, another Gaussian, is known: sets of 2,000
samples in 48 dimensions. Prints for several pairs of Gaussians the truth, the means of the plain and the corrected value, the
error that the jackknife states beside the true spread of values, and the share of 95 % intervals that hold the truth; and the
same of a bootstrap of 50 resamples, which is why none is used.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from lumos_jax.evaluation import frechet
from lumos_jax.evaluation.references import Reference

BOOTSTRAPS = 50


def pairs(dim: int, rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Name -> covariance of the samples, of the reference, and what the means differ by in each dimension."""
    spectrum = np.geomspace(0.5, 8, dim)
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    first, second = np.diag(spectrum), (rotation * spectrum) @ rotation.T
    mixing = rng.standard_normal((dim, dim)) * np.geomspace(0.1, 1, dim)
    few = mixing @ mixing.T  # a few directions have most of the variance
    return {
        "near": (first, 0.7 * first + 0.3 * second, 0.0),
        "shifted": (first, first, 0.25),
        "far": (first, second, 0.0),
        "few directions": (few, 0.5 * few + 0.5 * np.eye(dim) * np.trace(few) / dim, 0.1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("dim", 48), ("samples", 2000), ("repeats", 1000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    for name, (covariance, other, shift) in pairs(args.dim, rng).items():
        reference, root = Reference(np.full(args.dim, shift), other, 0, "scene_vit"), np.linalg.cholesky(covariance)
        truth = frechet.frechet_distance(np.zeros(args.dim), covariance, reference)
        found, resampled = [], []
        for repeat in range(args.repeats):
            samples = rng.standard_normal((args.samples, args.dim)) @ root.T
            found.append(frechet.frechet(samples, reference))
            if repeat < args.repeats // 10:  # they are slow, and far off
                rows = rng.integers(args.samples, size=(BOOTSTRAPS, args.samples))
                moments = [frechet.Moments.of(samples[chosen]) for chosen in rows]
                values = [frechet.frechet_distance(one.mean, one.covariance, reference) for one in moments]
                resampled.append((np.mean(values), *np.quantile(values, [0.025, 0.975])))
        plain, corrected, error = (
            np.array([getattr(one, f) for one in found]) for f in ("value", "corrected", "error")
        )
        covered = np.mean([one.low <= truth <= one.high for one in found])
        middle, low, high = np.array(resampled).T
        print(
            f"{name}: truth {truth:.3f}, plain {plain.mean():.3f}, corrected {corrected.mean():.3f} with spread "
            f"{corrected.std(ddof=1):.3f}, jackknife error {error.mean():.3f}, truth within in {covered:.1%}; bootstrap "
            f"{middle.mean():.3f}, within in {np.mean((low <= truth) & (truth <= high)):.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
