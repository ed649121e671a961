"""Scenes in the form of a download by img2dataset, to try preparation without data: .tar shards with captions and scores.

Among the images are what a collection from the web has: copies, re-encoded and smaller versions, images too small or too long,
truncated files and solid colors. The scores in the .json files are made up from the number of the image.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable

import numpy as np
from PIL import Image

from lumos_jax.data import storage
from lumos_jax.scenes import render, scene

SHARD = 60  # images of a shard
SIDE = 288  # pixels


def write(folder: str, count: int, say: Callable[[str], None]) -> None:
    """Writes the shards that are missing, of `count` images."""
    for shard in range(-(-count // SHARD)):
        path = storage.join(folder, f"{shard:05d}.tar")
        if not storage.exists(path):
            if not shard:
                say(f"rendering {count} scenes as a collection to try: {folder}")
            numbers = range(shard * SHARD, min((shard + 1) * SHARD, count))
            storage.write_whole(path, _shard(numbers))


def _shard(numbers: range) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in numbers:
            image, caption = _image(number)
            key = f"{number:09d}"
            fields = {"url": f"https://example.org/{key}.jpg", "key": key, "caption": caption, **_scores(number)}
            for ending, data in (("jpg", image), ("json", json.dumps(fields).encode()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _scores(number: int) -> dict[str, float]:
    a, b, c = np.frombuffer(hashlib.sha256(str(number).encode()).digest()[:3], np.uint8) / 255
    return {"aesthetic": round(4.5 + 2.0 * a, 3), "pwatermark": round(0.55 * b, 3), "punsafe": round(0.52 * c, 3)}


def _image(number: int) -> tuple[bytes, str]:
    """The file of an image, and its caption; one of twelve is not simply a scene."""
    kind = number % 12
    shown = scene.make_scene(number - 7 if kind in (7, 8, 9) else number)
    size = (SIDE // 2, SIDE // 2) if kind == 3 else (SIDE, 5 * SIDE) if kind == 10 else (SIDE, SIDE)
    pixels = np.full((SIDE, SIDE, 3), 8 * (number % 32), np.uint8) if kind == 5 else render.render(shown, size)
    image = Image.fromarray(pixels)
    if kind == 8:
        image = image.resize((SIDE - 20, SIDE - 20), Image.Resampling.LANCZOS)
    data = _encoded(image, 70 if kind == 9 else 90)
    return data[: len(data) // 2] if kind == 11 else data, scene.captions(shown)[0]


def _encoded(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()
