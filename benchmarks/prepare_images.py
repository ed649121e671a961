"""Images for `prepare_corpus`: distinct ones by number, changed copies of them, and files that cannot be decoded.

Image b of a corpus is a scene, clip art, or a crop or mosaic of photographs: a pure function of (seed, b), so that copies of it
are made anywhere without keeping it.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from lumos_jax.scenes import render
from lumos_jax.scenes.scene import COLORS, Camera, make_scene

SIDES = (256, 400)  # pixels, sides of the images
PHOTO_SIDE = 1600  # longer side at which photographs are kept
WINDOWS = (256, 410, 656, 1050)  # sides of the crops of photographs
SHARES = {"scene": 0.15, "clip art": 0.35, "photograph": 0.5}
MUTATIONS = ("quality", "resized", "brightness", "cropped", "format")
NEGATIVES = ("mirrored", "other view", "other colors")
BROKEN = ("truncated", "checksum", "text", "empty", "bomb")
WORDS = (
    "river",
    "mountain",
    "paper",
    "light",
    "garden",
    "seven",
    "open",
    "market",
    "blue",
    "winter",
    "music",
    "letter",
)


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def encoded(image: Image.Image, kind: str = "JPEG", quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    options = {"JPEG": {"quality": quality}, "WEBP": {"quality": quality, "method": 1}, "PNG": {"compress_level": 1}}
    image.save(buffer, kind, **options[kind])
    return buffer.getvalue()


def prepare_photographs(folder: str, cache: pathlib.Path) -> int:
    """Stores the photographs of a folder as arrays that processes map; returns how many there are."""
    paths = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file()) if folder else []
    cache.mkdir(parents=True, exist_ok=True)
    kept = 0
    for path in paths:
        with Image.open(path) as image:
            image.draft("RGB", (PHOTO_SIDE, PHOTO_SIDE))
            image = image.convert("RGB")
            image.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
        if min(image.size) >= WINDOWS[0]:
            np.save(cache / f"{kept:04d}.npy", np.asarray(image))
            kept += 1
    return kept


@dataclasses.dataclass(frozen=True)
class Window:
    """A square of a photograph: its number, corner, side, and quarter turns."""

    photo: int
    y: int
    x: int
    side: int
    turns: int


class Images:
    """Image b, for b in [0, count), of a corpus.

    Args:
      seed: of everything.
      count: how many distinct images there may be.
      cache: where `prepare_photographs` stored photographs.
    """

    def __init__(self, seed: int, count: int, cache: pathlib.Path):
        self.seed, self.count = seed, count
        self.photos = [np.load(path, mmap_mode="r") for path in sorted(cache.glob("*.npy"))]
        self.windows = [w for i, photo in enumerate(self.photos) for w in _windows(i, photo)]
        self.prime = next(n for n in itertools.count(max(count, 3)) if all(n % d for d in range(2, math.isqrt(n) + 1)))

    def kind(self, number: int) -> str:
        shares = SHARES if self.windows else {name: SHARES[name] for name in ("scene", "clip art")}
        p = np.array(list(shares.values()))
        return str(generator(self.seed, 0, number).choice(list(shares), p=p / p.sum()))

    def image(self, number: int, negative: str = "") -> Image.Image:
        """The image of that number, or with `negative` one that resembles it and is no copy."""
        kind, rng = self.kind(number), generator(self.seed, 1, number)
        if negative == "mirrored":
            return self.image(number).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if kind == "scene":
            return _scene(number, rng, negative)
        if negative:
            image = self.image(number)
            return image.rotate(180) if negative == "other view" else _other_colors(image)
        return _clip_art(rng) if kind == "clip art" else self._photograph(number, rng)

    def _photograph(self, number: int, rng: np.random.Generator) -> Image.Image:
        """A crop that no other number has or, when those run out, a mosaic of two to four."""
        place = number * 48_271 % self.prime  # a permutation: the multiplier is no multiple of the prime
        size = _size(rng)
        if place < len(self.windows):
            return self._crop(self.windows[place], size)
        mosaic = Image.new("RGB", size)
        columns, rows = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))[rng.integers(5)]
        xs = [0, *sorted(int(size[0] * (i + rng.uniform(0.7, 1.3)) / columns) for i in range(columns - 1)), size[0]]
        ys = [0, *sorted(int(size[1] * (i + rng.uniform(0.7, 1.3)) / rows) for i in range(rows - 1)), size[1]]
        for (left, right), (top, bottom) in itertools.product(itertools.pairwise(xs), itertools.pairwise(ys)):
            window = self.windows[rng.integers(len(self.windows))]
            mosaic.paste(self._crop(window, (right - left, bottom - top)), (left, top))
        return mosaic

    def _crop(self, window: Window, size: tuple[int, int]) -> Image.Image:
        width, height = size
        short = window.side * min(1.0, width / height), window.side * min(1.0, height / width)
        columns, rows = (max(int(side), 1) for side in short)
        pixels = self.photos[window.photo][window.y : window.y + rows, window.x : window.x + columns]
        image = Image.fromarray(np.rot90(pixels, window.turns))
        return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _windows(number: int, photo: np.ndarray) -> list[Window]:
    """Windows of a photograph that overlap by half and show something, in four orientations."""
    found = []
    small = np.asarray(Image.fromarray(photo).convert("L").reduce(8), np.float32)
    for side in WINDOWS:
        for y in range(0, photo.shape[0] - side + 1, side // 2):
            for x in range(0, photo.shape[1] - side + 1, side // 2):
                part = small[y // 8 : (y + side) // 8, x // 8 : (x + side) // 8]
                edges = np.abs(np.diff(part, axis=0)).mean() + np.abs(np.diff(part, axis=1)).mean()
                if part.std() > 20 and edges > 6:
                    found += [Window(number, y, x, side, turns) for turns in range(4)]
    return found


def _size(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(*SIDES)), int(rng.integers(*SIDES))


def _scene(number: int, rng: np.random.Generator, negative: str) -> Image.Image:
    """A scene from a camera anywhere above the ground."""
    scene = make_scene(number)
    azimuth, polar = rng.uniform(0, 2 * math.pi), rng.uniform(math.radians(15), math.radians(75))
    radius = scene.camera.radius * rng.uniform(0.55, 1.1)
    width, height = _size(rng)
    if negative == "other view":
        azimuth += rng.uniform(0.6, 1.2)
    if negative == "other colors":
        names = list(COLORS)
        solids = [
            dataclasses.replace(s, color=names[(names.index(s.color) + int(rng.integers(1, len(names)))) % len(names)])
            for s in scene.solids
        ]
        tone = tuple(rng.permutation(scene.ground_tone) * rng.uniform(0.6, 1.0))
        scene = dataclasses.replace(scene, solids=tuple(solids), ground_tone=tone)
    camera = Camera(azimuth, polar, radius)
    small = render.render(scene, (height * 5 // 8, width * 5 // 8), camera=camera)  # a third of the time
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _color(rng: np.random.Generator) -> tuple[int, int, int]:
    return tuple(int(value) for value in rng.integers(0, 256, 3))


def _clip_art(rng: np.random.Generator) -> Image.Image:
    """Six to fourteen flat shapes and some words on a plain or graded ground."""
    width, height = _size(rng)
    image = Image.new("RGB", (width, height), _color(rng))
    if rng.random() < 0.4:
        gradient = Image.linear_gradient("L").rotate(90 * int(rng.integers(4))).resize((width, height))
        image = Image.composite(image, Image.new("RGB", (width, height), _color(rng)), gradient)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(6, 15)):
        x, y = rng.uniform(-0.1, 0.9) * width, rng.uniform(-0.1, 0.9) * height
        w, h = (rng.uniform(0.1, 0.55) * side for side in (width, height))
        box, color, shape = (x, y, x + w, y + h), _color(rng), rng.integers(6)
        if shape == 0:
            draw.ellipse(box, color, _color(rng), int(rng.integers(0, 5)))
        elif shape == 1:
            draw.rectangle(box, color, _color(rng), int(rng.integers(0, 5)))
        elif shape == 2:
            draw.rounded_rectangle(box, min(w, h) / 4, color)
        elif shape == 3:
            draw.polygon([(x + w * rng.random(), y + h * rng.random()) for _ in range(rng.integers(3, 7))], color)
        elif shape == 4:
            draw.pieslice(box, int(rng.integers(360)), int(rng.integers(360, 700)), color)
        else:
            draw.line([(x, y), (x + w, y + h), (x + w, y)], color, int(rng.integers(3, 20)))
    for _ in range(rng.integers(0, 4)):
        at = rng.uniform(0, 0.7) * width, rng.uniform(0, 0.9) * height
        font = ImageFont.load_default(float(rng.integers(14, 48)))
        draw.text(at, " ".join(rng.choice(WORDS, rng.integers(1, 4))), _color(rng), font)
    return image


def _other_colors(image: Image.Image) -> Image.Image:
    """The channels exchanged and one of them inverted."""
    red, green, blue = image.split()
    return Image.merge("RGB", (green.point(lambda value: 255 - value), blue, red))


def changed(image: Image.Image, how: str, rng: np.random.Generator) -> bytes:
    """A copy of an image as it is found elsewhere; how: one of MUTATIONS. At most 2 % of a side are cropped."""
    if how == "quality":
        return encoded(image, quality=int(rng.integers(40, 86)))
    if how == "resized":
        scale = rng.uniform(0.6, 1.5)
        width, height = (max(int(side * scale), 256) for side in image.size)
        return encoded(image.resize((width, height), Image.Resampling.LANCZOS), quality=85)
    if how == "brightness":
        return encoded(ImageEnhance.Brightness(image).enhance(rng.uniform(0.93, 1.07)))
    if how == "cropped":
        left, top = (int(side * rng.uniform(0, 0.01)) for side in image.size)
        right, bottom = (side - int(side * rng.uniform(0, 0.01)) for side in image.size)
        return encoded(image.crop((left, top, right, bottom)))
    return encoded(image, str(rng.choice(["PNG", "WEBP"])), quality=80)


def broken(content: bytes, how: str, rng: np.random.Generator) -> bytes:
    """A file that no decoder may accept; how: one of BROKEN."""
    if how == "truncated":
        return content[: int(len(content) * rng.uniform(0.2, 0.9))]
    if how == "checksum":
        png = bytearray(encoded(Image.open(io.BytesIO(content)), "PNG"))
        at = png.index(b"IDAT") + 4 + int(rng.integers(100))
        png[at] ^= 1 << int(rng.integers(8))
        return bytes(png)
    if how == "text":
        return f"<!DOCTYPE html><html><body><h1>404 Not Found</h1>{rng.integers(1 << 40)}</body></html>".encode()
    if how == "empty":
        return b""
    side = int(rng.integers(50_000, 60_000))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(*part) for part in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    )


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
