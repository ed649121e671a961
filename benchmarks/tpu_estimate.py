"""What a training step of each size costs on each TPU, by the TPU compiler alone: no TPU is needed.

    pip install libtpu
    python -m benchmarks.tpu_estimate                          the table, beside the figures of benchmarks/tpu_estimate.json
    python -m benchmarks.tpu_estimate --sizes XL --targets v5e:4x4 --check      exits with 1 if any figure got worse by 2 %
    python -m benchmarks.tpu_estimate --update                 writes the figures into that file

Compiles configs/i2i.py on cached features, as `lumos_jax.plan` does. Run it in two checkouts to see that a change made for
another backend costs a TPU nothing. The golden file holds what libtpu 0.0.42.1 said.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from configs import i2i
from lumos_jax.config import io as config_io
from lumos_jax.planning import ahead, parse_target
from lumos_jax.planning.figures import Figures, estimate

GOLDEN = pathlib.Path(__file__).with_suffix(".json")
WORSE = 1.02  # times the golden figure; compilers of one version differ by nothing


def plan(size: str, target: str, batch: int, remat: str, fsdp: int) -> Figures:
    """The step's figures: `batch` images a chip, parameters split over `fsdp` chips."""
    made = parse_target(target)
    config = i2i.get_config()
    config.data.path = "unopened"
    config.model.size, config.model.remat = size, remat
    config.mesh.fsdp = fsdp
    config.train.batch_size = batch * made.chips
    return estimate(config_io.resolve(config), made, ahead.devices_of(made), cached=True)


def figures(f: Figures) -> dict[str, float]:
    """What the golden file keeps: the smaller the better, all of them."""
    return {
        "milliseconds": round((f.seconds or 0.0) * 1e3, 2),
        "computing_milliseconds": round((f.times.computing if f.times else 0.0) * 1e3, 2),
        "memory_gib": round(f.step.memory.total / 2**30, 3),
        "received_megabytes": round((f.step.program.received if f.step.program else 0.0) / 1e6, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["S", "B", "L", "XL"])
    parser.add_argument("--targets", nargs="+", default=["v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
    parser.add_argument("--batch", type=int, default=16, help="images a chip (16)")
    parser.add_argument("--fsdp", type=int, default=16, help="chips that parameters are split over (16)")
    parser.add_argument("--remat", default="mlp", choices=("none", "dots", "qkv", "mlp", "full"))
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure is worse than its golden one")
    parser.add_argument("--update", action="store_true", help="write the figures into the golden file")
    args = parser.parse_args()
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    worse = []
    print("| run | fits | step | MFU | images/s a chip | memory | received | step before |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for size in args.sizes:
        for target in args.targets:
            name = f"{size} {target}, {args.batch} a chip, remat {args.remat}, fsdp {args.fsdp}"
            f = plan(size, target, args.batch, args.remat, args.fsdp)
            now, before = figures(f), golden.get(name, {})
            speed = "" if f.seconds is None else f"{f.mfu:.1%} | {f.images_per_second / f.target.chips:.1f}"
            print(
                f"| {name} | {'yes' if f.fits else 'no'} | {now['milliseconds']} ms | {speed or ' | '} | "
                f"{now['memory_gib']} GiB | {now['received_megabytes']} MB | {before.get('milliseconds', '')} |",
                flush=True,
            )
            worse += [f"{name}: {k} {now[k]}, before {v}" for k, v in before.items() if now[k] > v * WORSE]
            golden[name] = now
    if args.update:
        partial = GOLDEN.with_suffix(".partial")
        partial.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + "\n")
        os.replace(partial, GOLDEN)
    print(*worse, sep="\n", file=sys.stderr)
    return 1 if args.check and worse else 0


if __name__ == "__main__":
    sys.exit(main())
