"""Encoded bytes -> square uint8 RGB images, whatever a folder of images holds.

JPEGs of RGB and gray go through libjpeg-turbo, halved while decoding as often as the target allows (the decoder leaves out
detail that the resize would throw away); everything else, and every JPEG that libjpeg complains about, goes through Pillow,
whose verdict counts. The shorter side is resized to the target (bilinear, antialiased) and the longer one cropped, in one pass
over the part that is kept; an EXIF rotation is applied to the small square.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from lumos_jax.data.base import CorruptRecord

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 1 << 28  # of a JPEG, which is read scaled; other formats have Pillow's limit, about 179 million
_ORIENTATION, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 0x0112, 258, 262, 339  # the first is EXIF's, all are TIFF's
# libjpeg's complaints after which pixels are wrong. Others (stray bytes before the end or in the header, odd metadata) are
# harmless. Progressive files have tables and scans between their data.
_WRONG_PIXELS = re.compile("bad Huffman code|premature end of data segment|instead of RST|before marker 0xd[0-7]")
_WRONG_IF_PROGRESSIVE = re.compile(f"{_WRONG_PIXELS.pattern}|before marker 0x(c4|da)")


class UndecodableImage(CorruptRecord):
    """These bytes give no image; the message says why."""


def ignore_pillow_warnings() -> None:
    """Silences Pillow's warnings of odd metadata: the image is what counts. For the whole process, since filters are."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


@contextlib.contextmanager
def _undecodable() -> Iterator[None]:
    """Damaged files make the readers of Pillow and libjpeg raise nearly anything, MemoryError among it."""
    from PIL import Image

    try:
        yield
    except (UndecodableImage, ImportError):  # a library that is not installed is no damage
        raise
    except (Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UndecodableImage(str(error).split(" <")[0]) from error
    except Exception as error:
        raise UndecodableImage(f"{type(error).__name__}: {error}") from error


def decode_square(data: bytes | np.ndarray, size: int, *, shift: float = 0.5, flip: bool = False) -> np.ndarray:
    """Encoded image, or its pixels -> (size, size, 3) uint8; smaller ones are enlarged.

    data: the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file, of animations the first frame; or pixels (H, W, 3) uint8.
    shift: which part of the longer side to keep, 0 (left or top of the upright image) .. 1; 0.5 is the center.
    flip: mirror left and right.
    Raises UndecodableImage: empty, truncated, not an image, or too large to be one.
    """
    from PIL import Image

    if isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape == (size, size, 3):
        return data[:, ::-1] if flip else data
    with _undecodable():
        image, orientation, _, _ = _open(data, size)
        _, step_y, step_x = _UPRIGHT[orientation]
        short = min(image.size)
        left = (image.width - short) * (shift if step_x > 0 else 1 - shift)
        top = (image.height - short) * (shift if step_y > 0 else 1 - shift)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))
        pixels = _turned(image, orientation)
        return pixels[:, ::-1] if flip else pixels


def decode_cover(data: bytes | np.ndarray, height: int, width: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Encoded image, or its pixels (H, W, 3) uint8 -> (height, width, 3) uint8, and the image's own upright (H, W).

    Resized (bicubic, antialiased) so that it covers the target, and the middle of it cut out.
    Raises UndecodableImage: as `decode_square`.
    """
    from PIL import Image

    with _undecodable():
        image, orientation, own, _ = _open(data, max(height, width))
        target = (height, width) if _UPRIGHT[orientation][0] else (width, height)
        scale = max(target[0] / image.width, target[1] / image.height)
        inner = target[0] / scale, target[1] / scale
        left, top = (image.width - inner[0]) / 2, (image.height - inner[1]) / 2
        box = (max(left, 0), max(top, 0), min(left + inner[0], image.width), min(top + inner[1], image.height))
        if image.size != target:
            image = image.resize(target, Image.Resampling.BICUBIC, box=box)
        return _turned(image, orientation), own


class Luma(NamedTuple):
    """An image's luma. image: mode "L", as stored, of a JPEG reduced. size: (height, width) of the upright image in full."""

    image: Image.Image
    orientation: int
    size: tuple[int, int]
    format: str

    def upright(self, image: Image.Image) -> np.ndarray:
        """The pixels of an image made from `self.image`, upright."""
        return _turned(image, self.orientation)


def decode_luma(data: bytes, side: int) -> Luma:
    """Reads all data of an image, and so finds what is damaged; a JPEG's luma may come halved to sides of at least `side`.
    Raises UndecodableImage: as `decode_square`."""
    with _undecodable():
        image, orientation, size, kind = _open(data, side, "GRAY")
        return Luma(image.convert("L"), orientation, size, kind)


def size_of(file: BinaryIO) -> tuple[int, int]:
    """Upright (height, width) of an encoded image, by its header; (0, 0) where it has none that can be read."""
    try:
        with _undecodable(), _read_header(file) as image:
            return _upright(image)[1]
    except UndecodableImage:
        return 0, 0


# EXIF orientation -> whether the upright image has stored columns as its rows; and the steps through stored rows and columns.
_UPRIGHT = {
    1: (False, 1, 1), 2: (False, 1, -1), 3: (False, -1, -1), 4: (False, -1, 1),
    5: (True, 1, 1), 6: (True, -1, 1), 7: (True, -1, -1), 8: (True, 1, -1),
}  # fmt: skip


def _turned(image: Image.Image, orientation: int) -> np.ndarray:
    """The pixels of a stored image, upright."""
    swap, step_y, step_x = _UPRIGHT[orientation]
    pixels = np.asarray(image)[::step_y, ::step_x]
    return pixels.swapaxes(0, 1) if swap else pixels


def _open(data: bytes | np.ndarray, side: int, colors: str = "RGB") -> tuple[Image.Image, int, tuple[int, int], str]:
    """An image as stored, a JPEG reduced to sides of at least `side`; its orientation; its upright (height, width) in full; its
    format. colors: RGB, or GRAY for the luma of JPEGs; all others are RGB."""
    import simplejpeg
    from PIL import Image

    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] not in (1, 3) or not data.size:
            raise UndecodableImage(f"pixels of shape {data.shape} and type {data.dtype}, not (H, W, 3) uint8")
        return Image.fromarray(np.broadcast_to(data, (*data.shape[:2], 3))), 1, data.shape[:2], "pixels"
    if not data:
        raise UndecodableImage("empty")
    image = _read_header(io.BytesIO(data))
    orientation, own = _upright(image)
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        try:
            # Halving is as fast as not scaling at all; the steps between (7/8 .. 5/8) are slower and blur more.
            pixels = simplejpeg.decode_jpeg(data, colors, min_width=side, min_height=side, min_factor=2, strict=True)
            return Image.fromarray(pixels.squeeze(2) if colors == "GRAY" else pixels), orientation, own, "JPEG"
        except ValueError as error:
            # Pillow ignores what libjpeg warns of, but not a missing end.
            wrong = _WRONG_IF_PROGRESSIVE if image.info.get("progressive") else _WRONG_PIXELS
            if wrong.search(str(error)):
                raise UndecodableImage(str(error)) from error
    if image.format == "PNG":
        _check_png(data)
    return _to_rgb(image), orientation, own, image.format or ""


def _read_header(file: BinaryIO) -> Image.Image:
    """An image that is not decoded yet."""
    from PIL import Image, JpegImagePlugin

    head = file.read(3)
    file.seek(0)
    # JPEGs directly: Image.open holds them, which are read scaled, to its limit for all formats.
    image = JpegImagePlugin.JpegImageFile(file) if head == b"\xff\xd8\xff" else Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise UndecodableImage(f"{image.width} x {image.height} pixels are too many")
    return image


def _upright(image: Image.Image) -> tuple[int, tuple[int, int]]:
    """EXIF orientation, and the upright (height, width)."""
    orientation = 1
    if image.format != "TIFF":  # which Pillow turns upright itself, and says the size of the upright image
        with contextlib.suppress(Exception):  # damaged metadata of an image that may be whole
            orientation = image.getexif().get(_ORIENTATION, 1)
    orientation = orientation if orientation in _UPRIGHT else 1
    return orientation, image.size if _UPRIGHT[orientation][0] else image.size[::-1]


def _check_png(data: bytes) -> None:
    """Compares the checksums of the chunks that hold pixels, which Pillow passes by. A missing end is left to Pillow."""
    place, view = 8, memoryview(data)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            return
        sums = zlib.crc32(view[place + 4 : end - 4]), int.from_bytes(view[end - 4 : end])
        if (kind[:1].isupper() or kind == b"tRNS") and sums[0] != sums[1]:
            raise UndecodableImage(f"damaged: wrong checksum of chunk {kind.decode('latin-1')}")
        place = end


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: other types than 8 bits are scaled, not clipped; transparency is laid on white."""
    from PIL import Image

    tags = {}
    if image.format == "TIFF":
        tags = {tag: np.ravel(image.tag_v2.get(tag, 0))[0] for tag in (_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT)}
        if tags[_BITS] == 8 and tags[_SAMPLE_FORMAT] == 2:
            raise UndecodableImage("signed 8-bit values")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float32)
        top = _largest_value(image, values, int(tags.get(_BITS, 16)))
        if image.info.get("transparency") is not None:
            values = np.where(values == image.info["transparency"], np.float32(top), values)
        if tags and tags[_PHOTOMETRIC] == 0:  # white is zero, which Pillow heeds for 8 bits only
            values = top - values
        image = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    image.load()
    return image.convert("RGB")


def _largest_value(image: Image.Image, values: np.ndarray, bits: int) -> float:
    """What stands for white. Raises UndecodableImage for values whose range their type does not say."""
    least, most = float(values.min(initial=0)), float(values.max(initial=0))
    if image.mode == "F":
        if not (least >= 0 and most <= 255):  # false of NaN too
            raise UndecodableImage(f"floating-point values from {least:g} to {most:g}: neither 0 .. 1 nor 0 .. 255")
        return 1.0 if most <= 1 else 255.0
    if image.mode != "I":
        return 2.0**bits - 1
    if bits > 16:
        raise UndecodableImage(f"integers of {bits} bits, of which nothing says what is white")
    if least < 0:
        raise UndecodableImage(f"integers from {least:g} on, where black is 0")
    return 2.0 ** (bits - 1) - 1  # signed
