"""Every kind of image file that people have, and every kind of damage."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from lumos_jax.data.decode import UndecodableImage, decode_square


def encode(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def corners(width=48, height=32):
    """Red, green, blue and white quarters: orientation and crops can be read off."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 255)
    return Image.fromarray(pixels)


def smooth(width=640, height=480):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


QUARTERS = {
    "progressive jpeg": lambda: encode(corners(), format="JPEG", progressive=True, quality=95, subsampling=0),
    "rgb jpeg": lambda: encode(corners(), format="JPEG", keep_rgb=True, quality=95),
    "cmyk jpeg": lambda: encode(corners().convert("CMYK"), format="JPEG", quality=95),
    "palette png": lambda: encode(corners().quantize(8), format="PNG"),
    "palette png with transparency": lambda: encode(corners().quantize(8), format="PNG", transparency=bytes([255] * 8)),
    "rgba png": lambda: encode(corners().convert("RGBA"), format="PNG"),
    "sixteen-bit rgb png": lambda: rgb16_png(corners()),
    "webp": lambda: encode(corners(), format="WEBP", lossless=True),
    "animated webp": lambda: encode(
        corners(), format="WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (48, 32))]
    ),
    "gif": lambda: encode(corners(), format="GIF", save_all=True, append_images=[Image.new("RGB", (48, 32))]),
    "animated png": lambda: encode(corners(), format="PNG", save_all=True, append_images=[Image.new("RGB", (48, 32))]),
    "bmp": lambda: encode(corners(), format="BMP"),
    "tiff": lambda: encode(corners(), format="TIFF"),
}


def rgb16_png(image):
    """Pillow writes no RGB PNG of 16 bits, but people have them."""
    pixels = (np.asarray(image).astype(">u2") * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", image.width, image.height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", QUARTERS)
def test_every_kind_of_file_gives_its_picture(kind):
    pixels = decode_square(QUARTERS[kind](), 16).astype(int)
    assert pixels.shape == (16, 16, 3)
    for (row, column), color in {
        (2, 2): (255, 0, 0), (2, 13): (0, 255, 0), (13, 2): (0, 0, 255), (13, 13): (255, 255, 255),
    }.items():  # fmt: skip
        assert np.abs(pixels[row, column] - color).max() < 30


def test_gray_files_give_three_equal_channels():
    for data in (encode(corners().convert("L"), format="JPEG"), encode(corners().convert("LA"), format="PNG")):
        pixels = decode_square(data, 16).astype(int)
        assert np.ptp(pixels, axis=2).max() == 0
        # 0.299, 0.587 and 0.114 of 255
        assert np.abs(pixels[[2, 2, 13, 13], [2, 13, 2, 13], 0] - (76, 150, 29, 255)).max() < 12


def test_bilevel_files():
    data = encode(corners().convert("L").point(lambda v: v > 100).convert("1"), format="PNG")
    assert set(np.unique(decode_square(data, 32))) <= {0, 255}


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
@pytest.mark.parametrize("suffix", ["JPEG", "PNG"])
def test_extreme_shapes(size, suffix):
    pixels = decode_square(encode(Image.new("RGB", size, (250, 5, 5)), format=suffix), 8, shift=1.0)
    assert np.abs(pixels.astype(int) - (250, 5, 5)).max() < 4


def test_centre_crop_keeps_the_quarters_and_flip_swaps_them():
    data = encode(corners(), format="PNG")
    pixels = decode_square(data, 16)
    assert tuple(pixels[2, 2]) == (255, 0, 0)
    assert tuple(pixels[13, 13]) == (255, 255, 255)
    assert np.array_equal(decode_square(data, 16, flip=True), pixels[:, ::-1])
    left = decode_square(data, 16, shift=0.0)
    assert tuple(left[2, 10]) == (255, 0, 0)  # the middle of the picture has moved to the right


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(64, 40), (40, 64)])
@pytest.mark.parametrize("suffix", ["JPEG", "PNG"])
def test_exif_orientation_is_undone(orientation, size, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(corners(*size), format=suffix, exif=exif)
    upright = encode(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), format="PNG")
    for shift in (0.0, 0.5, 1.0):
        turned, straight = decode_square(data, 16, shift=shift), decode_square(upright, 16, shift=shift)
        assert np.abs(turned.astype(int) - straight).mean() < 12, shift  # a quarter elsewhere makes 40 and more


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # as decode does for the process, but pytest starts afresh
def test_damaged_exif_is_no_damaged_picture():
    plain = encode(smooth(), format="JPEG")
    odd = encode(smooth(), format="JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"x" * 20)
    assert np.array_equal(decode_square(odd, 16), decode_square(plain, 16))


def test_sixteen_bits_are_scaled():
    ramp = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    pixels = decode_square(encode(Image.fromarray(ramp), format="PNG"), 64)
    assert np.abs(pixels[..., 0].astype(int) - ramp // 257).max() <= 1


def test_transparency_is_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (decode_square(encode(clear, format="PNG"), 8) == 255).all()
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert (
        np.abs(decode_square(encode(half, format="WEBP", lossless=True), 8)[0, 0].astype(int) - (255, 127, 127)).max()
        <= 1
    )
    red = corners().quantize(8).getpixel((0, 0))  # the palette's entry that becomes transparent
    for transparency in (red, bytes(0 if i == red else 255 for i in range(8))):
        pixels = decode_square(encode(corners().quantize(8), format="PNG", transparency=transparency), 16)
        assert tuple(pixels[2, 2]) == (255, 255, 255)
        assert tuple(pixels[2, 13]) == (0, 255, 0)


def test_adobe_cmyk_is_not_inverted():
    # Pillow writes CMYK as Adobe does: an Adobe marker and inverted values.
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), format="JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(decode_square(data, 8)[4, 4].astype(int) - (255, 0, 0)).max() < 10


@pytest.mark.parametrize("junk", [b"", b"\xff\xd8\xff", b"GIF89a", b"hello" * 100, b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_rubbish_is_undecodable(junk):
    with pytest.raises(UndecodableImage, match="." if junk else "empty"):
        decode_square(junk, 8)


@pytest.mark.parametrize("options", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_truncated_files_are_undecodable(options, share):
    data = encode(smooth(), **options)
    with pytest.raises(UndecodableImage, match=r"truncated|Truncated"):
        decode_square(data[: int(share * len(data))], 32)


def test_stray_bytes_in_a_jpeg_are_harmless():
    data = encode(smooth(), format="JPEG")
    stray = data[:-2] + b"\0\0junk" + data[-2:]
    with pytest.raises(ValueError, match="extraneous"):  # what the strict decoder thinks of it
        simplejpeg.decode_jpeg(stray)
    assert np.abs(decode_square(stray, 32).astype(int) - decode_square(data, 32)).mean() < 3


def test_bombs_are_refused_before_they_are_decoded():
    bomb = encode(Image.new("1", (17_000, 17_000)), format="PNG")
    with pytest.raises(UndecodableImage, match="pixels"):
        decode_square(bomb, 8)


def test_random_damage_raises_one_exception_only():
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [encode(smooth(60, 40), format=kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")]
    whole.append(encode(smooth(60, 40).convert("CMYK"), format="JPEG"))
    whole.append(encode(smooth(60, 40).quantize(16), format="GIF"))
    refused = 0
    for trial in range(300):
        data = np.frombuffer(whole[trial % len(whole)], np.uint8).copy()
        where = rng.integers(0, len(data) if trial % 3 else 120, 4)
        data[where] = rng.integers(0, 256, 4)
        try:
            assert decode_square(data.tobytes(), 8).shape == (8, 8, 3)
        except UndecodableImage:
            refused += 1
    assert 30 < refused < 270


@pytest.mark.parametrize("size", [32, 100, 256])
def test_scaled_decoding_agrees_with_a_full_decode(size):
    data = encode(smooth(), format="JPEG", quality=95)
    full = Image.open(io.BytesIO(data)).resize((size, size), Image.Resampling.BILINEAR, box=(80, 0, 560, 480))
    assert np.abs(decode_square(data, size).astype(int) - np.asarray(full)).mean() < 2


def test_pixels_fit_like_files():
    pixels = np.asarray(corners())
    assert np.array_equal(decode_square(pixels, 16, shift=0.2, flip=True), decode_square(
        encode(corners(), format="PNG"), 16, shift=0.2, flip=True))  # fmt: skip
    square = np.asarray(corners(16, 16))
    assert np.array_equal(decode_square(square, 16), square)
    assert np.array_equal(decode_square(square, 16, flip=True), square[:, ::-1])
    with pytest.raises(UndecodableImage, match=r"\(3, 4\)"):
        decode_square(np.zeros((3, 4), np.uint8), 16)
