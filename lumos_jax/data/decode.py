"""Encoded bytes -> square uint8 RGB pictures, whatever a folder of images holds.

JPEGs of RGB and grey go through libjpeg-turbo, halved while decoding as often as the target allows (the decoder leaves out
detail that the resize would throw away); everything else, and every JPEG that libjpeg complains about, goes through Pillow,
whose verdict counts. The shorter side is resized to the target (bilinear, antialiased) and the longer one cropped, in one pass
over the part that is kept; an EXIF rotation is applied to the small square.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 1 << 28  # of a JPEG, which is read scaled; other formats have Pillow's limit, about 179 million
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright

# What Pillow's and libjpeg's readers raise for damaged files. A damaged file must never end a run, so the list is long;
# Warning is there for programs that turn warnings into errors.
_DAMAGE = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError,
    SyntaxError, EOFError, MemoryError, BufferError, struct.error, zlib.error, Warning,
)  # fmt: skip

# Pillow warns of odd metadata; the picture is what counts here. Once for the process, since decoding threads share filters.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UndecodableImage(Exception):
    """These bytes give no picture; the message says why."""


def decode_square(data: bytes, size: int, *, shift: float = 0.5, flip: bool = False) -> np.ndarray:
    """Encoded image -> (size, size, 3) uint8.

    Args:
      data: the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file; animations give their first frame.
      size: side in pixels; smaller images are enlarged.
      shift: which part of the longer side to keep, 0 (left or top of the upright picture) .. 1; 0.5 is the centre.
      flip: mirror left and right.

    Raises:
      UndecodableImage: empty, truncated, not an image, or too large to be one.
    """
    if not data:
        raise UndecodableImage("empty")
    try:
        image, orientation, _ = _open(data, size)
        return _square(image, size, shift, orientation, flip)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UndecodableImage(str(error).split(" <")[0]) from error
    except _DAMAGE as error:
        raise UndecodableImage(f"{type(error).__name__}: {error}") from error


def fit_square(pixels: np.ndarray, size: int, *, shift: float = 0.5, flip: bool = False) -> np.ndarray:
    """Decoded pixels (H, W, 3) uint8 -> (size, size, 3) uint8, as `decode_square`."""
    if pixels.shape != (size, size, 3):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
            raise UndecodableImage(f"pixels of shape {pixels.shape} and type {pixels.dtype}, not (H, W, 3) uint8")
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2))
        return _square(image, size, shift, 1, flip)
    return pixels[:, ::-1] if flip else pixels


def decode_cover(data: bytes | np.ndarray, height: int, width: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Encoded image, or its pixels (H, W, 3) uint8 -> (height, width, 3) uint8, and the image's own upright (H, W).

    Resized (bicubic, antialiased) so that it covers the target, and the middle of it cut out.

    Raises:
      UndecodableImage: as `decode_square`.
    """
    try:
        if isinstance(data, np.ndarray):
            image, orientation, (own_width, own_height) = Image.fromarray(data), 1, data.shape[1::-1]
        else:
            image, orientation, (own_width, own_height) = _open(data, max(height, width))
        lying = orientation >= 5
        target = (height, width) if lying else (width, height)
        scale = max(target[0] / image.width, target[1] / image.height)
        inner = target[0] / scale, target[1] / scale
        left, top = (image.width - inner[0]) / 2, (image.height - inner[1]) / 2
        box = (max(left, 0), max(top, 0), min(left + inner[0], image.width), min(top + inner[1], image.height))
        if image.size != target:
            image = image.resize(target, Image.Resampling.BICUBIC, box=box)
        own = (own_width, own_height) if lying else (own_height, own_width)
        return _UPRIGHT[orientation][0](np.asarray(image)), own
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UndecodableImage(str(error).split(" <")[0]) from error
    except _DAMAGE as error:
        raise UndecodableImage(f"{type(error).__name__}: {error}") from error


def size_of(file: str | os.PathLike | io.BytesIO) -> tuple[int, int]:
    """Upright (height, width) of an encoded image, by its header; (0, 0) where it has none that can be read."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            return (width, height) if _orientation(image) >= 5 else (height, width)
    except (UnidentifiedImageError, Image.DecompressionBombError, *_DAMAGE):
        return 0, 0


# EXIF orientation -> upright view of the stored pixels, and whether the stored x and y run backwards in it.
_UPRIGHT = {
    1: (lambda a: a, False, False),
    2: (lambda a: a[:, ::-1], True, False),
    3: (lambda a: a[::-1, ::-1], True, True),
    4: (lambda a: a[::-1], False, True),
    5: (lambda a: a.swapaxes(0, 1), False, False),
    6: (lambda a: np.rot90(a, -1), False, True),
    7: (lambda a: a[::-1, ::-1].swapaxes(0, 1), True, True),
    8: (np.rot90, True, False),
}


def _square(image: Image.Image, size: int, shift: float, orientation: int, flip: bool) -> np.ndarray:
    turn, x_backwards, y_backwards = _UPRIGHT[orientation]
    width, height = image.size
    short = min(width, height)
    left = (width - short) * (1 - shift if x_backwards else shift)
    top = (height - short) * (1 - shift if y_backwards else shift)
    if (width, height) != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))
    pixels = turn(np.asarray(image))
    return pixels[:, ::-1] if flip else pixels


def _open(data: bytes, side: int) -> tuple[Image.Image, int, tuple[int, int]]:
    """An RGB picture as stored, reduced to sides of at least `side`; its EXIF orientation; its (width, height) in full."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise UndecodableImage(f"{image.width} x {image.height} pixels are too many")
    orientation, own = _orientation(image), image.size
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        try:
            # Halving is as fast as not scaling at all; the steps between (7/8 .. 5/8) are slower and blur more.
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=side, min_height=side, min_factor=2, strict=True)
            return Image.fromarray(pixels), orientation, own
        except ValueError:
            # libjpeg warned. Stray bytes between markers are harmless, a missing end is not: Pillow tells them apart.
            return _to_rgb(image), orientation, own
    return _to_rgb(image), orientation, own


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGE:
        return 1  # damaged metadata of a picture that may be whole
    return orientation if orientation in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: 16 bits are scaled, not clipped; transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float32)
        top = 255.0 if values.max(initial=0) <= 255 and image.mode == "F" else 65535.0
        image = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    image.load()
    return image.convert("RGB")
