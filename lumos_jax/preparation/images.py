"""What a scan measures of an image: that it decodes, its format and size, a perceptual hash, sharpness, entropy and borders.

The hash is that of the library imagehash (phash, hash_size 8, highfreq_factor 4): luma resized to 32 x 32 (Lanczos), discrete
cosine transform, its 8 x 8 lowest frequencies, each compared with their median. The image is first reduced by a whole factor, a
JPEG while decoding, to a short side of 128 to 255 pixels, which changes a few bits at most (tests/preparation/test_images.py)
and saves the time of resizing in full; sharpness, entropy and borders are measured there too, and do not depend on resolution.
Resize and transform are one matmul: the rounding of the 32 x 32 pixels between them is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from lumos_jax.data.decode import decode_luma

REDUCED = 128  # pixels, least short side after the reduction
_SIDE, _LOW = 32, 8
_DCT = np.cos(np.pi / (2 * _SIDE) * np.outer(np.arange(_LOW), 2 * np.arange(_SIDE) + 1)) * 2
# Of frequencies whose amplitude is smaller than this (in units of the unnormalized transform; 1 gray level of one frequency is
# 32^2), noise decides the bits.
_LEAST_AMPLITUDE = 0.05 * _SIDE**2
_FLAT = 10  # gray levels that a row or column of a border may span: JPEG's noise


@dataclasses.dataclass(frozen=True)
class Measured:
    """height, width: upright. phash: 64 bits, the most significant one is hash[0, 0]. phash_valid: False where most of the
    frequencies have no amplitude, as in solid colors and in images of two flat halves. blur: variance of the Laplacian.
    entropy: bits of the histogram. border: share of the area in borders of one shade."""

    format: str
    height: int
    width: int
    phash: int
    phash_valid: bool
    blur: float
    entropy: float
    border: float


def measure(data: bytes) -> Measured:
    """Decode an image completely and measure it. Raises UndecodableImage."""
    luma = decode_luma(data, REDUCED)
    height, width = luma.size
    factor = max(1, min(luma.image.size) // REDUCED)
    reduced = luma.image.reduce(factor) if factor > 1 else luma.image
    bits, valid = _phash(luma.upright(reduced))
    pixels = np.asarray(reduced)
    entropy = _entropy(np.asarray(reduced.histogram()))
    return Measured(luma.format, height, width, bits, valid, _blur(pixels), entropy, _border(pixels))


def _phash(pixels: np.ndarray) -> tuple[int, bool]:
    """The hash of luma (H, W) uint8, and whether it means anything."""
    height, width = pixels.shape
    low = (_transform(height) @ (pixels.astype(np.float64) @ _transform(width).T)).ravel()
    bits = np.packbits(low > _median(low))
    return int.from_bytes(bits.tobytes(), "big"), bool(_median(np.abs(low)) >= _LEAST_AMPLITUDE)


@functools.lru_cache(maxsize=512)
def _transform(size: int) -> np.ndarray:
    """(8, size): resizing to 32 by Lanczos' window of 3, antialiased, and the lowest frequencies of the cosine transform."""
    step = size / _SIDE
    center = (np.arange(_SIDE)[:, None] + 0.5) * step
    at = (np.arange(size)[None] + 0.5 - center) / max(step, 1.0)
    weights = np.where(np.abs(at) < 3, np.sinc(at) * np.sinc(at / 3), 0.0)
    return _DCT @ (weights / weights.sum(1, keepdims=True))


def _median(values: np.ndarray) -> float:
    """Of an even number of values; np.median takes ten times as long for so few."""
    ordered = np.sort(values)
    return (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2


def _blur(pixels: np.ndarray) -> float:
    """Variance of the Laplacian, 0 for images of fewer than 3 rows or columns."""
    if min(pixels.shape) < 3:
        return 0.0
    signed = pixels.astype(np.int16)
    around = signed[:-2, 1:-1] + signed[2:, 1:-1] + signed[1:-1, :-2] + signed[1:-1, 2:]
    values = (around - 4 * signed[1:-1, 1:-1]).ravel().astype(np.float64)  # whose sums are exact in any order
    return float(np.dot(values, values) / values.size - (values.sum() / values.size) ** 2)


def _entropy(histogram: np.ndarray) -> float:
    shares = histogram[histogram > 0] / histogram.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def _border(pixels: np.ndarray) -> float:
    inner = 1
    for axis in (1, 0):
        varied = np.flatnonzero(pixels.max(axis).astype(int) - pixels.min(axis) > _FLAT)
        inner *= varied[-1] - varied[0] + 1 if varied.size else 0
    return 1.0 - inner / math.prod(pixels.shape)
