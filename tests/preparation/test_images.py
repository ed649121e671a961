"""What a scan measures, against imagehash and against the decoder of training."""

import collections
import io

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageOps

from lumos_jax.data.decode import UndecodableImage, decode_square
from lumos_jax.preparation import images
from tests.preparation import collections_of as made


def encoded(pixels, kind="JPEG", **how):
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(out, kind, **how)
    return out.getvalue()


def bits_apart(data):
    with Image.open(io.BytesIO(data)) as image:
        expected = int(str(imagehash.phash(ImageOps.exif_transpose(image))), 16)
    return (expected ^ images.measure(data).phash).bit_count()


def test_the_hash_is_imagehash_s_within_four_bits_and_mostly_exactly():
    rng = np.random.default_rng(0)
    apart = collections.Counter()
    for number in range(24):
        size = tuple(int(n) for n in rng.integers(130, 420, 2))
        kind = ("JPEG", "JPEG", "PNG", "WEBP")[number % 4]
        how = {"quality": 85} if kind == "JPEG" else {"compress_level": 1} if kind == "PNG" else {"method": 0}
        apart[bits_apart(made.photo(number, size, kind, **how))] += 1
    assert max(apart) <= 4
    assert apart[0] >= 14
    assert sum(apart[n] for n in (0, 1, 2)) >= 22


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_and_hash_are_of_the_upright_image(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = made.photo(3, (150, 260), exif=exif)
    measured = images.measure(data)
    assert (measured.height, measured.width) == ((150, 260) if orientation in (1, 3) else (260, 150))
    assert bits_apart(data) <= 4


def test_images_without_content_have_no_hash_and_others_do():
    half = np.zeros((200, 200, 3))
    half[100:] = 255
    assert not images.measure(made.solid()).phash_valid
    assert not images.measure(encoded(half, "PNG")).phash_valid
    assert all(images.measure(made.photo(number)).phash_valid for number in range(8))


def test_blur_entropy_and_borders():
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (200, 200, 3))
    sharp = images.measure(encoded(noise, "PNG"))
    smooth = images.measure(encoded(np.broadcast_to(np.linspace(0, 255, 200)[:, None, None], (200, 200, 3)), "PNG"))
    assert sharp.blur > 1000 > 1 > smooth.blur
    assert smooth.entropy == pytest.approx(np.log2(200), abs=0.01)
    framed = np.full((200, 200, 3), 255)
    framed[50:150, 20:180] = noise[50:150, 20:180]
    assert images.measure(encoded(framed, "PNG")).border == pytest.approx(1 - 0.5 * 0.8)
    plain = images.measure(made.solid())
    assert (plain.border, plain.entropy, plain.blur) == (1.0, 0.0, 0.0)
    assert images.measure(encoded(np.zeros((1, 2, 3)), "PNG")).blur == 0


def test_it_finds_the_same_damaged_files_as_training_does():
    rng = np.random.default_rng(2)
    verdicts = collections.Counter()
    files = [
        made.photo(1, quality=80),
        made.photo(2, progressive=True),
        made.photo(3, kind="PNG"),
        made.photo(4, kind="WEBP"),
    ]
    for number in range(160):
        data = bytearray(files[number % 4])
        if number % 3:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        else:
            del data[int(rng.integers(len(data))) :]
        found = []
        for decode in (images.measure, lambda data: decode_square(data, 64)):
            try:
                decode(bytes(data))
                found.append(True)
            except UndecodableImage:
                found.append(False)
        assert found[0] == found[1], number
        verdicts[found[0]] += 1
    assert min(verdicts.values()) > 30
