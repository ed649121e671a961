"""Speed of `prepare scan` on one core as a ratio to a bare strict decode of the same JPEG files, alternating in one run.

    python -m benchmarks.prepare_speed [--rounds=7] [--seconds=1.5] [--folder=DIR]

    bare    simplejpeg.decode_jpeg(data, "RGB", strict=True) of files in memory
    scan    a task of the scan on a .tar of them as img2dataset writes it, with captions and scores: reading (from a warm page
            cache), sha256, strict decode, perceptual hash, blur, entropy, borders, rows, the parquet file

Synthetic photographs of about 55, 225 and 970 kB; --folder: JPEG files of your own. Processor time of the process, since other
processes may share the machine. Prints the median over rounds of each, and of the ratios of neighboring rounds.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import pathlib
import statistics
import tarfile
import tempfile
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as lumos_jax.prepare does

import numpy as np
import simplejpeg

from benchmarks.input_pipeline import photograph
from lumos_jax.preparation import plan, scan
from lumos_jax.preparation.settings import Prepare, Source

SIZES = {55: (500, 375), 225: (1024, 768), 970: (2250, 1500)}  # kB: width, height


def photographs(kilobytes: int, count: int) -> list[bytes]:
    """JPEG files of that size, within a few percent."""
    rng, files = np.random.default_rng(0), []
    image = photograph(rng, *SIZES[kilobytes])
    for quality in range(40, 99):
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        if out.tell() >= kilobytes * 1000:
            break
    for _ in range(count):
        out = io.BytesIO()
        photograph(rng, *SIZES[kilobytes]).save(out, "JPEG", quality=quality)
        files.append(out.getvalue())
    return files


def write_tar(path: pathlib.Path, files: list[bytes], count: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(itertools.islice(itertools.cycle(files), count)):
            fields = {
                "url": f"https://a.example/{number}",
                "aesthetic": 5.5,
                "pwatermark": 0.1,
                "width": 500,
                "height": 375,
            }
            text = json.dumps(fields | {"caption": "a photograph of noise at all scales"}).encode()
            for ending, content in (("jpg", data), ("json", text), ("txt", b"a photograph of noise at all scales")):
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def bare(files: list[bytes], count: int) -> float:
    began = time.process_time()
    for data in itertools.islice(itertools.cycle(files), count):
        simplejpeg.decode_jpeg(data, "RGB", strict=True)
    return (time.process_time() - began) / count


def scanned(folder: pathlib.Path, number: int, count: int) -> float:
    out = str(folder / f"out-{number}")
    plan.make(out, Prepare(sources=(Source(kind="img2dataset", path=str(folder / "a.tar")),)), lambda _: None)
    began = time.process_time()
    scan.run_task(out, 0)
    seconds = time.process_time() - began
    (found,) = scan.finish(out)
    assert found.reasons == {"": count}, found
    return seconds / count


def measure(name: str, files: list[bytes], rounds: int, seconds: float) -> None:
    count = max(16, round(seconds / bare(files, len(files))))
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_tar(folder / "a.tar", files, count)
        scanned(folder, -1, count)
        pairs = [(bare(files, count), scanned(folder, number, count)) for number in range(rounds)]
    decode, whole = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    size = sum(map(len, files)) / len(files) / 1e3
    print(
        f"{name:>8}  {size:7.0f} kB  bare {decode:7.3f} ms  scan {whole:7.3f} ms  ratio {ratio:.2f}  ({count} files)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5, help="of bare decoding a round")
    parser.add_argument("--folder", type=pathlib.Path, help="of JPEG files")
    args = parser.parse_args()
    if args.folder:
        files = [
            path.read_bytes() for path in sorted(args.folder.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")
        ]
        measure("yours", files, args.rounds, args.seconds)
        return
    for kilobytes in SIZES:
        measure(f"{kilobytes} kB", photographs(kilobytes, 24 if kilobytes < 500 else 6), args.rounds, args.seconds)


if __name__ == "__main__":
    main()
