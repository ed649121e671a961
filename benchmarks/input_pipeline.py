"""The input pipeline against the bare decoder on the same files, alternating in one run.

    python -m benchmarks.input_pipeline
    python -m benchmarks.input_pipeline --path=DIR --size=256 --cores=2

Per round, each for `--seconds`, all of it pinned to the same `--cores` CPUs:
    decode      read the file, simplejpeg.decode_jpeg: no resize, no crop, nothing kept
    bare        the same, then the center square resized with Pillow (bilinear, antialiased): the work itself, as a plain loop
    threads     data.make_train_iterator, decoding threads
    workers     data.make_train_iterator, data.workers = cores, one thread each
    torch       torch DataLoader with as many workers, Pillow decode and resize (where PyTorch is installed)
The plain loops run once per core, in processes of their own. Prints images per second per core, the median over rounds, and the
median over rounds of the ratios. Without `--path`, synthetic photographs: 500 x 375 JPEGs of quality 90, noise of all scales.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import simplejpeg
from PIL import Image

from lumos_jax import config, data


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="a folder of JPEG photographs")
    parser.add_argument("--files", type=int, default=300, help="synthetic photographs")
    parser.add_argument("--size", type=int, default=256, help="side of the square, pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="least duration of one turn")
    return parser.parse_args()


def photograph(rng: np.random.Generator, width: int = 500, height: int = 375) -> Image.Image:
    """Noise of octaves, weaker as it gets finer, mostly common to the channels, and a little grain."""
    pixels = np.full((height, width, 3), 120.0, np.float32)
    for octave in range(2, 9):
        shape = (max(2, height * 2**octave // 375), max(2, width * 2**octave // 375))
        common = rng.normal(size=shape)
        for channel in range(3):
            noise = Image.fromarray((common + 0.3 * rng.normal(size=shape)).astype(np.float32))
            pixels[..., channel] += (
                np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) * 110 / 1.5**octave
            )
    return Image.fromarray(np.clip(pixels + rng.normal(size=pixels.shape) * 4, 0, 255).astype(np.uint8))


def write_photographs(directory: pathlib.Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        photograph(rng).save(directory / f"{i:04}.jpg", quality=90)


def decode(path: str, size: int) -> np.ndarray:
    with open(path, "rb") as file:
        return simplejpeg.decode_jpeg(file.read(), "RGB", min_width=size, min_height=size, min_factor=2)


def bare(path: str, size: int) -> np.ndarray:
    pixels = decode(path, size)
    height, width = pixels.shape[:2]
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box=box))


def loop(work: Callable[[str, int], np.ndarray], paths: list[str], size: int, seconds: float) -> float:
    """Images per second of one process."""
    begin = time.perf_counter()
    for count, path in enumerate(itertools.cycle(paths), start=1):
        work(path, size)
        if count % 16 == 0 and (spent := time.perf_counter() - begin) > seconds:
            return count / spent
    raise AssertionError("no files")


def drain(batches: Iterator, size: int, seconds: float, ready: int) -> float:
    """Images per second, once the batches that were read ahead meanwhile are gone."""
    for _ in range(ready):
        next(batches)
    begin, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        next(batches)
        count += size
    return count / spent


class TorchImages:
    """What a PyTorch user writes without further libraries: Pillow decodes, resizes and crops."""

    def __init__(self, paths: list[str], size: int):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        size = self.size
        with Image.open(self.paths[index]) as image:
            image = image.convert("RGB")
            scale = size / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
            left, top = (image.width - size) // 2, (image.height - size) // 2
            return np.array(image.crop((left, top, left + size, top + size)))


def torch_batches(paths: list[str], size: int, batch: int, cores: int) -> Iterator | None:
    try:
        from torch.utils.data import DataLoader
    except ImportError:
        return None
    loader = DataLoader(
        TorchImages(paths, size), batch, shuffle=True, num_workers=cores, drop_last=True, persistent_workers=True,
        multiprocessing_context="spawn",
    )  # fmt: skip
    return itertools.chain.from_iterable(itertools.repeat(loader))


def measure(args: argparse.Namespace, path: pathlib.Path) -> dict[str, list[float]]:
    """Images per second per core of each side, one number a round."""
    settings = config.Data(source="folder", path=str(path), image_size=args.size)
    source = data.make_source(settings)
    paths = [source.describe(i) for i in range(len(source))]
    problems = [problem for problem in data.read_batch(settings, source, range(len(source)))["problem"] if problem]
    if problems:
        raise SystemExit(f"{len(problems)} files cannot be decoded, as {problems[0]}: the plain loops would stop there")
    print(
        f"{len(paths)} files, {sum(map(os.path.getsize, paths)) / len(paths) / 1024:.0f} KiB each; {args.cores} core(s)"
    )

    def ours(**changes) -> data.pipeline.BatchIterator:
        changed = dataclasses.replace(settings, **changes)
        return data.make_train_iterator(changed, source, batch_size=args.batch, rows=range(args.batch), start_step=0)

    def plain(work) -> float:
        jobs = [pool.submit(loop, work, paths, args.size, args.seconds) for _ in range(args.cores)]
        return sum(job.result() for job in jobs)

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.cores, mp_context=context) as pool:
        list(pool.map(bare, paths[: 4 * args.cores], [args.size] * 4 * args.cores))
        threads, workers = ours(), ours(workers=args.cores)
        theirs = torch_batches(paths, args.size, args.batch, args.cores)
        # Enough to empty every buffer; what is timed afterwards was all decoded meanwhile.
        ready = 2 * settings.prefetch + 4 * args.cores
        sides = {
            "decode": lambda: plain(decode),
            "bare": lambda: plain(bare),
            "threads": lambda: drain(threads, args.batch, args.seconds, ready),
            "workers": lambda: drain(workers, args.batch, args.seconds, ready),
        }
        if theirs is not None:
            sides["torch"] = lambda: drain(theirs, args.batch, args.seconds, ready)
        results = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, side in sides.items():
                results[name].append(side() / args.cores)
                time.sleep(0.5)  # for read-ahead to fill up and fall silent
        threads.close()
        workers.close()
    return results


def main() -> None:
    args = parse()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(args.path or scratch)
        if not args.path:
            write_photographs(path, args.files)
        results = measure(args, path)
    print(f"{'':8} {'images/s/core':>13} {'of bare':>8} {'of decode':>10}")
    for name, rates in results.items():
        ratios = [
            statistics.median(a / b for a, b in zip(rates, results[base], strict=True)) for base in ("bare", "decode")
        ]
        print(f"{name:8} {statistics.median(rates):13.0f} {ratios[0]:8.1%} {ratios[1]:10.1%}")
    if "torch" not in results:
        print("torch    not installed: pip install torch to compare with its DataLoader")


if __name__ == "__main__":
    main()
