"""Processor time of `prepare write` a record, beside a bare strict decode of the same JPEG files, with a hot page cache.

    python -m benchmarks.write_speed [--side=400] [--records=12000]

Files are made of 64 images, each with its number in a comment. A side of 400 makes about 55 kB, 900 about 225 kB.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import pathlib
import resource
import tarfile
import tempfile
import time

import numpy as np
import simplejpeg
from PIL import Image

from lumos_jax.preparation import plan, scan, select, write
from lumos_jax.preparation.settings import Criteria, Duplicates, Prepare, Source, Write

_PER_FILE = 1000


def texture(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG of noise at all scales, as photographs have."""
    image = np.zeros((side, side, 3), np.float32)
    size = 4
    while size < side:
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
        image += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), np.float32) / size**0.4
        size *= 2
    image = (image - image.min()) / (image.max() - image.min()) * 255
    file = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


def numbered(jpeg: bytes, number: int) -> bytes:
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + jpeg[2:]


def make(folder: pathlib.Path, images: list[bytes], records: int, captions: bool) -> None:
    for first in range(0, records, _PER_FILE):
        with tarfile.open(folder / f"{first // _PER_FILE:05d}.tar", "w") as tar:
            for number in range(first, min(first + _PER_FILE, records)):
                content = {".jpg": numbered(images[number % len(images)], number)}
                content |= {".txt": b"a caption of some length, for a picture"} if captions else {}
                for ending, data in content.items():
                    member = tarfile.TarInfo(f"{number:09d}{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=400)
    parser.add_argument("--records", type=int, default=12_000)
    parser.add_argument("--captions", action="store_true")
    args = parser.parse_args()
    images = [texture(np.random.default_rng(i), args.side) for i in range(64)]
    size = sum(map(len, images)) / len(images)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = pathlib.Path(folder)
        make(root, images, args.records, args.captions)
        off = Duplicates(exact=False, phash_distance=-1)
        source = Source(kind="tars", path=str(root))
        settings = Prepare(sources=(source,), criteria=Criteria(short_side=16), duplicates=off, write=Write())
        out = str(root / "out")
        made = plan.make(out, settings, print)
        for number in scan.tasks(made):
            scan.run_task(out, number)
        select.run(out, settings)
        for layout in ("arrayrecord", "index"):
            chosen = dataclasses.replace(settings, write=Write(layout=layout))
            began = time.process_time()
            for image in images * 8:
                simplejpeg.decode_jpeg(image, strict=True)
            decode = (time.process_time() - began) / len(images) / 8
            began = time.process_time()
            for number in write.tasks(out, chosen):
                write.run_task(out, number)
            each = (time.process_time() - began) / args.records
            write.finish(out)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(
                f"{layout}: {size / 1e3:.0f} kB, bare decode {1e3 * decode:.3f} ms, write {1e3 * each:.4f} ms a record: "
                f"{decode / each:.1f} times the decode, {size / each / 1e6:.0f} MB/s; peak {peak:.2f} GB"
            )


if __name__ == "__main__":
    main()
