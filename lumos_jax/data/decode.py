"""Encoded bytes -> square uint8 RGB pictures, whatever a folder of images holds.

JPEGs of RGB and grey go through libjpeg-turbo with scaled decoding (the decoder leaves out detail that the resize would throw
away); everything else goes through Pillow. The shorter side is resized to the target (bilinear, antialiased) and the rest
cropped, in one pass over the part that is kept.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
MAX_PIXELS = 1 << 28  # more than this is taken for a decompression bomb
_WHITE = (255, 255, 255)


class UndecodableImage(Exception):
    """These bytes give no picture; the message says why."""


def decode_square(data: bytes, size: int, *, shift: float = 0.5, flip: bool = False) -> np.ndarray:
    """Encoded image -> (size, size, 3) uint8.

    Args:
      data: the bytes of a JPEG, PNG, WebP, GIF (first frame), BMP or TIFF file.
      size: side in pixels; smaller images are enlarged.
      shift: which part of the longer side to keep, 0 (left or top) .. 1; 0.5 is the centre.
      flip: mirror left and right.

    Raises:
      UndecodableImage: empty, truncated, not an image, or too large to be one.
    """
    if not data:
        raise UndecodableImage("empty")
    try:
        image = _open(data, size)
    except UndecodableImage:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UndecodableImage(str(error).split(" <")[0]) from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, MemoryError, OverflowError) as error:
        # What Pillow's and libjpeg's readers raise for damaged files.
        raise UndecodableImage(f"{type(error).__name__}: {error}") from error
    return square(image, size, shift=shift, flip=flip)


def square(image: Image.Image, size: int, *, shift: float = 0.5, flip: bool = False) -> np.ndarray:
    """An RGB picture's square part at `shift`, resized to (size, size, 3) uint8."""
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) * shift, (height - short) * shift
    if (width, height) != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))
    pixels = np.asarray(image)
    return pixels[:, ::-1] if flip else pixels


def _open(data: bytes, size: int) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns about odd metadata and palettes; the picture is what counts here.
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise UndecodableImage(f"{image.width} x {image.height} pixels are too many")
        orientation = image.getexif().get(ORIENTATION, 1)
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=size, min_height=size, strict=True)
            upright = Image.fromarray(pixels)
        else:
            upright = _to_rgb(image)
        return upright if orientation == 1 else _turn(upright, orientation)


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    """Applies an EXIF orientation (2 to 8; others are ignored)."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: 16 bits are scaled, not clipped; transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float32)
        top = 255.0 if values.max(initial=0) <= 255 and image.mode == "F" else 65535.0
        image = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*_WHITE, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    image.load()
    return image.convert("RGB")
