"""Mutated files of every kind through their sources: nothing but a refusal at the start or a counted record may come of them.

    python -m benchmarks.fuzz_data [--files=10000] [--seed=0]

Prints how many files of each kind were refused, corrupt or fine, and the slowest; ends with code 1 if anything else was raised.
What a file holds is random bits from the seed, so that a failure can be repeated.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import io
import json
import pathlib
import sys
import tarfile
import tempfile
import time

import numpy as np
from PIL import Image

from lumos_jax import config, data

SECONDS = 60  # a file that takes longer hangs
VIDEOS = {"a.mp4": "libx264", "a.mkv": "libx264", "a.webm": "libvpx", "a.avi": "mpeg4", "a.ts": "libx264"}


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def images(rng: np.random.Generator) -> dict[str, bytes]:
    pixels = rng.integers(0, 255, (24, 32, 3), np.uint8)
    gray = pixels[..., 0]
    return {
        "jpeg": encoded(pixels, "JPEG"), "progressive": encoded(pixels, "JPEG", progressive=True),
        "png": encoded(pixels, "PNG"),
        "png16": encoded(gray.astype(np.uint16) * 256, "PNG"), "webp": encoded(pixels, "WEBP"), "gif": encoded(gray, "GIF"),
        "bmp": encoded(pixels, "BMP"), "tiff": encoded(pixels, "TIFF"), "lzw": encoded(pixels, "TIFF", compression="tiff_lzw"),
        "float": encoded(gray / np.float32(255), "TIFF"), "deflate": encoded(pixels, "TIFF", compression="tiff_deflate"),
    }  # fmt: skip


def video(path: pathlib.Path, codec: str) -> bytes:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for level in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def kinds(rng: np.random.Generator, folder: pathlib.Path) -> dict[str, tuple[str, bytes, dict[str, bytes], dict]]:
    """Name -> (the file that is mutated, its content, files beside it, fields of config.data)."""
    made = images(rng)
    found = {f"image {k}": (f"a.{k}.png", v, {}, {"source": "folder"}) for k, v in made.items()}
    tar, matrix = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as out:
        for name, content in {
            "a.png": made["png"],
            "a.txt": b"x",
            "b.jpg": made["jpeg"],
            "b.json": b'{"text": "y"}',
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    np.save(matrix, np.concatenate([np.eye(3), np.ones((3, 1))], axis=1))
    data.write_arrayrecord(folder / "a.arrayrecord", [made["jpeg"], made["png"]])
    captioned, png = {"sample_type": "captioned"}, {"a.png": made["png"]}
    line = json.dumps({"file": "a.png", "caption": "a b", "detailed": "a b c"}).encode()
    view = {f"o/00{i}.png": made["png"] for i in range(2)} | {"o/001.npy": matrix.getvalue()}
    clip = {"source": "videos", "sample_type": "clip", "clips": config.Clips(frames=4, frame_stride=(2, 2))}
    return (
        found
        | {
            "tar": ("a.tar", tar.getvalue(), {}, {"source": "webdataset", **captioned}),
            "arrayrecord": ("a.arrayrecord", (folder / "a.arrayrecord").read_bytes(), {}, {"source": "arrayrecord"}),
            "jsonl": ("captions.jsonl", line, png, {"source": "folder", **captioned}),
            "text": ("a.txt", "a b".encode("utf-16"), png, {"source": "folder", **captioned}),
            "npy": ("o/000.npy", matrix.getvalue(), view, {"source": "objaverse", "sample_type": "views"}),
            "csv": ("list.csv", b'video,caption,motion score\na.mp4,"x, y",3.5\n', {}, clip),
        }
        | {f"video {name}": (name, video(folder / name, codec), {}, clip) for name, codec in VIDEOS.items()}
    )


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    changed, how = bytearray(content), rng.integers(5)
    if how == 0:
        return content[: rng.integers(len(content))]
    for _ in range(rng.integers(1, 6)):
        at = int(
            rng.integers(max(1, min(len(changed), 120 if rng.random() < 0.5 else len(changed))))
        )  # headers more often
        if how == 1:
            changed[at : at + 1] = rng.bytes(1)
        elif how == 2:
            changed[at : at + 1] = bytes(byte ^ 1 << int(rng.integers(8)) for byte in changed[at : at + 1])
        elif how == 3:
            changed[at:at] = rng.bytes(rng.integers(1, 9))
        else:
            del changed[at : at + rng.integers(1, 9)]
    return bytes(changed)


def outcome(path: pathlib.Path, fields: dict) -> str:
    tables = [file for file in path.iterdir() if file.suffix in (".tar", ".arrayrecord", ".csv")]
    chosen = config.Data(path=str(tables[0] if tables else path), image_size=8, **fields)
    try:
        source = data.make_source(chosen)
        batch = data.read_batch(chosen, source, range(len(source)))
    except ValueError:  # a refusal at the start
        return "refused"
    assert all(bool(problem) != bool(weight) for problem, weight in zip(batch["problem"], batch["weight"], strict=True))
    return "fine" if batch["weight"].all() else "corrupt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, counts, slowest, escaped = (
        np.random.default_rng(args.seed),
        collections.defaultdict(collections.Counter),
        0.0,
        0,
    )
    with tempfile.TemporaryDirectory() as temporary:
        seeds = kinds(rng, pathlib.Path(temporary))
        names = list(seeds)
        for number in range(args.files):
            kind = names[number % len(names)]
            name, content, beside, fields = seeds[kind]
            folder = pathlib.Path(temporary, str(number))
            for file, part in (beside | {name: mutated(content, rng)}).items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(part)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            begun = time.monotonic()
            try:
                counts[kind][outcome(folder, fields)] += 1
            except Exception as error:  # noqa: BLE001, what is looked for
                escaped += 1
                print(f"file {number}, {kind}: {type(error).__name__}: {error}")
            slowest = max(slowest, time.monotonic() - begun)
            faulthandler.cancel_dump_traceback_later()
    for kind, counted in counts.items():
        print(f"{kind:20}", ", ".join(f"{what} {number}" for what, number in sorted(counted.items())))
    print(f"{args.files} files, {escaped} escaped, the slowest took {slowest:.1f} s")
    sys.exit(bool(escaped))


if __name__ == "__main__":
    main()
