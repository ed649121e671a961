"""Features of images and clips from files against the bare network, and known answers of I3D.

    python -m benchmarks.evaluation_speed
    python -m benchmarks.evaluation_speed --networks=inception --weights=pt_inception-2015-12-05-6726825d.pth --side=256
    python -m benchmarks.evaluation_speed --known

Per round, alternating:
    bare      the compiled network again and again on one batch that is on the devices
    features  `FeatureNetwork.stream` over shards of uint8 arrays that are read from disk
Prints rows per second, the median over rounds, and the median over rounds of the ratio; and the ratio by processor time, for
machines that others use too. `--known` prints the squared distance
between the logits of a black and a white clip, beside what other ports of I3D publish.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from lumos_jax.evaluation import features

KNOWN = {15: 134.24, 16: 153.110, 24: 66.081, 30: 151.168}  # frames: published


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="scene_vit,vgg16,i3d", help="of lumos_jax.evaluation.features.NETWORKS")
    parser.add_argument("--weights", default="", help="official file of the one network that needs it")
    parser.add_argument("--side", type=int, default=64, help="of the images, pixels")
    parser.add_argument("--frames", type=int, default=16, help="of the clips")
    parser.add_argument("--batches", type=int, default=8, help="that a shard holds; there are two shards")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--known", action="store_true")
    return parser.parse_args()


def rate(rows: int, run: Callable[[], None]) -> np.ndarray:
    """Rows a second, and rows a second of processor time."""
    start = np.array([time.perf_counter(), time.process_time()])
    run()
    return rows / (np.array([time.perf_counter(), time.process_time()]) - start)


def compare(network: features.FeatureNetwork, args: argparse.Namespace, folder: pathlib.Path) -> None:
    size = args.batches * network.batch_size
    frames = (args.frames,) if network.kind == "clip" else ()
    shape = (size, *frames, args.side, args.side, 3)
    paths = [folder / f"{network.name}_{i}.npy" for i in range(2)]
    for seed, path in enumerate(paths):
        np.save(path, np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
    batch = np.load(paths[0])[: network.batch_size]
    network(batch)  # compiles
    program = network._program
    on_devices = jax.device_put((batch,), program._rows)

    def bare():
        for _ in range(2 * args.batches):
            made = program._run(program._params, on_devices)
        jax.block_until_ready(made)

    def streamed():
        for _ in network.stream(map(np.load, paths)):
            pass

    rates = np.array([(rate(2 * size, bare), rate(2 * size, streamed)) for _ in range(args.rounds)])
    (bare_rate, _), (our_rate, _) = np.median(rates, axis=0)
    wall, processor = np.median(rates[:, 1] / rates[:, 0], axis=0)
    print(
        f"{network.name} {shape[1:]} uint8, batches of {network.batch_size}: bare {bare_rate:.1f}, features {our_rate:.1f} a "
        f"second; ratio {wall:.3f}, by processor time {processor:.3f}"
    )


def print_known_answers() -> None:
    network = features.open_network("i3d", rows=2, devices=jax.local_devices()[:1])
    for frames, published in KNOWN.items():
        black = np.zeros((1, frames, 224, 224, 3), np.uint8)
        logits = network(np.concatenate([black, black + np.uint8(255)]))
        print(f"I3D, {frames} frames: {((logits[0] - logits[1]) ** 2).sum():.3f}, published {published}")


def main() -> None:
    args = parse()
    if args.known:
        print_known_answers()
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks.split(","):
            compare(features.open_network(name, args.weights), args, pathlib.Path(folder))


if __name__ == "__main__":
    main()
