"""Order (invariant 1), held-out records, corrupt records, and every kind of file that people have."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from lumos_jax import config, data
from lumos_jax.data import order, sources
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


@pytest.fixture
def folder(tmp_path):
    """23 JPEGs whose grey level is their number times ten."""
    for i in range(23):
        Image.new("RGB", (20, 20), (i * 10,) * 3).save(tmp_path / f"{i:02}.jpg", quality=95)
    return config.Data(source="folder", path=str(tmp_path), image_size=8, holdout=3, threads=2)


def steps(settings, rows, count, *, batch=6, start=0):
    source = data.make_source(settings)
    iterator = data.make_train_iterator(settings, source, batch_size=batch, rows=rows, start_step=start)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_rows_do_not_depend_on_the_number_of_hosts(folder, hosts):
    whole = steps(folder, range(12), 4, batch=12)
    parts = [steps(folder, range(h * 12 // hosts, (h + 1) * 12 // hosts), 4, batch=12) for h in range(hosts)]
    for step in range(4):
        for name in ("record", "image", "weight"):
            joined = np.concatenate([part[step][name] for part in parts])
            assert np.array_equal(joined, whole[step][name])


@pytest.mark.parametrize("start", [1, 5, 11])
def test_the_position_is_a_number(folder, start):
    folder = dataclasses.replace(folder, crop="random", flip=True)
    whole = steps(folder, range(6), 13)
    resumed = steps(folder, range(6), 13 - start, start=start)
    for a, b in zip(whole[start:], resumed, strict=True):
        assert np.array_equal(a["record"], b["record"])
        assert np.array_equal(a["image"], b["image"])


def test_each_epoch_is_another_permutation_of_the_training_records(folder):
    source = data.make_source(folder)
    held = data.holdout_records(folder, source)
    positions = order.training_order(folder, source)
    epochs = [[int(positions[e * 20 + i]) for i in range(20)] for e in range(3)]
    for epoch in epochs:
        assert sorted([*epoch, *held]) == list(range(23))
    assert epochs[0] != epochs[1] != epochs[2]
    other = dataclasses.replace(folder, seed=1)
    assert data.holdout_records(other, source) == held
    assert [int(order.training_order(other, source)[i]) for i in range(20)] != epochs[0]


def test_worker_processes_give_the_same_batches(folder):
    folder = dataclasses.replace(folder, crop="random", flip=True)
    plain = steps(folder, range(6), 5)
    worked = steps(dataclasses.replace(folder, workers=2), range(6), 5)
    for a, b in zip(plain, worked, strict=True):
        for name in ("record", "image", "weight", "problem"):
            assert np.array_equal(a[name], b[name]), name


def test_batches_hold_the_records_they_name(folder):
    for batch in steps(folder, range(6), 3):
        assert np.abs(batch["image"].mean((1, 2, 3)) - 10 * batch["record"]).max() < 2
        assert (batch["problem"] == "").all()


def test_holding_out_everything_is_refused(folder):
    source = data.make_source(folder)
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        data.holdout_records(dataclasses.replace(folder, holdout=23), source)


def test_mixture_follows_its_weights_and_holds_out_from_all(tmp_path):
    for name, count, grey in (("a", 8, 50), ("b", 30, 200)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (9, 9), grey).save(tmp_path / name / f"{i}.png")
    entries = tuple(
        {"source": "folder", "path": str(tmp_path / name), "weight": weight}
        for name, weight in (("a", 0.75), ("b", 0.25))
    )
    settings = config.Data(source="mixture", mixture=entries, image_size=8, holdout=4, threads=2)
    source = data.make_source(settings)
    assert len(source) == 38
    held = data.holdout_records(settings, source)
    assert sorted(source.locate(r)[0] for r in held) == [0, 0, 0, 1]
    batches = steps(settings, range(8), 20, batch=8)
    records = np.concatenate([b["record"] for b in batches])
    assert np.isclose(np.mean(records < 8), 0.75, atol=0.02)
    assert not set(records) & set(held)
    assert {source.locate(r)[0] for r in records} == {0, 1}
    light = np.concatenate([b["image"].mean((1, 2, 3)) for b in batches])
    assert np.array_equal(light > 100, records >= 8)
    bad = dataclasses.replace(settings, mixture=({"source": "folder", "path": "x", "wieght": 1},))
    with pytest.raises(ValueError, match="wieght"):
        data.make_source(bad)


def test_corrupt_records_are_named_weighted_zero_and_counted(folder, tmp_path):
    (tmp_path / "03.jpg").write_bytes(b"not an image")
    whole = (tmp_path / "04.jpg").read_bytes()
    (tmp_path / "05.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "06.jpg").write_bytes(b"")
    (tmp_path / "07.jpg").unlink()
    (tmp_path / "07.jpg").mkdir()  # listed below only if it were a file
    batches = steps(dataclasses.replace(folder, holdout=0), range(22), 1, batch=22)
    bad = {p.split("/")[-1].split(":")[0]: p for p in batches[0]["problem"] if p}
    assert set(bad) == {"03.jpg", "05.jpg", "06.jpg"}
    assert "empty" in bad["06.jpg"]
    zero = batches[0]["weight"] == 0
    assert zero.sum() == 3
    assert (batches[0]["image"][zero] == 0).all()

    meter = data.CorruptMeter(0.2)
    lines = meter.add(batches[0])
    assert len(lines) == 3
    assert meter.counts() == {"corrupt_records": 3}
    resumed = data.CorruptMeter(0.1, meter.state())
    for _ in range(8):  # below 200 records a rate says little
        resumed.add(batches[0])
    with pytest.raises(data.TooManyCorruptRecords, match=r"max_corrupt_rate=10"):
        resumed.add(batches[0])


def test_a_file_that_vanishes_is_a_corrupt_record(folder, tmp_path):
    source = data.make_source(folder)
    (tmp_path / "00.jpg").unlink()
    batch = data.read_batch(folder, source, [0, 1])
    assert list(batch["weight"]) == [0.0, 1.0]
    assert "00.jpg" in batch["problem"][0]


NASTY = {
    "grey jpeg": lambda: encode(corners().convert("L"), format="JPEG"),
    "progressive jpeg": lambda: encode(corners(), format="JPEG", progressive=True),
    "cmyk jpeg": lambda: encode(corners().convert("CMYK"), format="JPEG"),
    "palette png": lambda: encode(corners().quantize(8), format="PNG"),
    "webp": lambda: encode(corners(), format="WEBP", lossless=True),
    "gif": lambda: encode(corners(), format="GIF", save_all=True, append_images=[Image.new("RGB", (48, 32))]),
    "tall": lambda: encode(corners(2, 400), format="PNG"),
    "one pixel": lambda: encode(Image.new("RGB", (1, 1), (255, 0, 0)), format="PNG"),
}


@pytest.mark.parametrize("kind", NASTY)
def test_every_kind_of_file_decodes(kind):
    pixels = decode_square(NASTY[kind](), 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert pixels.max() > 150


def test_centre_crop_keeps_the_quarters_and_flip_swaps_them():
    data_ = encode(corners(), format="PNG")
    pixels = decode_square(data_, 16)
    assert tuple(pixels[2, 2]) == (255, 0, 0)
    assert tuple(pixels[13, 13]) == (255, 255, 255)
    assert np.array_equal(decode_square(data_, 16, flip=True), pixels[:, ::-1])
    left = decode_square(data_, 16, shift=0.0)
    assert tuple(left[2, 10]) == (255, 0, 0)  # the middle of the picture has moved to the right


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["JPEG", "PNG"])
def test_exif_orientation_is_undone(orientation, suffix):
    upright = corners(64, 64)
    undo = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_square(encode(stored, format=suffix, exif=exif), 16).astype(int)
    for (row, column), colour in {(2, 2): (255, 0, 0), (2, 13): (0, 255, 0), (13, 2): (0, 0, 255)}.items():
        assert np.abs(pixels[row, column] - colour).max() < 30


def test_sixteen_bits_are_scaled_and_transparency_is_white():
    ramp = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    pixels = decode_square(encode(Image.fromarray(ramp), format="PNG"), 64)
    assert np.abs(pixels[..., 0].astype(int) - ramp // 257).max() <= 1
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (decode_square(encode(clear, format="PNG"), 8) == 255).all()
    palette = corners().quantize(8)
    palette.info["transparency"] = 0
    assert decode_square(encode(palette, format="PNG", transparency=0), 8).max() == 255


def test_adobe_cmyk_is_not_inverted():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    red = decode_square(encode(cmyk, format="JPEG", quality=95), 8)
    assert red[4, 4, 0] > 200
    assert red[4, 4, 1] < 60


@pytest.mark.parametrize("junk", [b"", b"\xff\xd8\xff", b"GIF89a", b"hello" * 100, b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_rubbish_is_undecodable(junk):
    with pytest.raises(UndecodableImage):
        decode_square(junk, 8)


def test_bombs_are_refused_before_they_are_decoded():
    bomb = encode(Image.new("1", (17_000, 17_000)), format="PNG")
    with pytest.raises(UndecodableImage, match="pixels"):
        decode_square(bomb, 8)


def test_scaled_decoding_agrees_with_a_full_decode():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    data_ = encode(smooth, format="JPEG", quality=95)
    full = Image.open(io.BytesIO(data_)).resize((32, 32), Image.Resampling.BILINEAR, box=(80, 0, 560, 480))
    assert np.abs(decode_square(data_, 32).astype(int) - np.asarray(full)).mean() < 2


def test_folder_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="not a directory"):
        sources.FolderSource(str(tmp_path / "absent"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no images"):
        sources.FolderSource(str(tmp_path))


def test_fingerprint_follows_names_and_sizes(folder, tmp_path):
    before = data.make_source(folder).fingerprint()
    assert data.make_source(folder).fingerprint() == before
    (tmp_path / "00.jpg").rename(tmp_path / "99.jpg")
    assert data.make_source(folder).fingerprint() != before


def test_arrayrecord_round_trip(tmp_path):
    images = [encode(Image.new("RGB", (8, 8), (i, i, i)), format="PNG") for i in range(10)]
    assert data.write_arrayrecord(tmp_path / "a-00000.arrayrecord", images[:6]) == 6
    data.write_arrayrecord(tmp_path / "a-00001.arrayrecord", images[6:])
    settings = config.Data(source="arrayrecord", path=str(tmp_path), image_size=8, threads=1)
    source = data.make_source(settings)
    assert len(source) == 10
    assert [source.read(i) for i in range(10)] == images
    batch = data.read_batch(settings, source, [9, 0])
    assert list(batch["image"][:, 0, 0, 0]) == [9, 0]
    with pytest.raises(ValueError, match="no ArrayRecord shards"):
        sources.ArrayRecordSource(str(tmp_path / "*.none"))


def test_truncated_shard_is_an_error(tmp_path):
    path = tmp_path / "a.arrayrecord"
    data.write_arrayrecord(path, [bytes([i]) * 5000 for i in range(50)])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        sources.ArrayRecordSource(str(path))


def test_load_image_names_the_file(tmp_path):
    path = tmp_path / "a.png"
    corners().save(path)
    assert data.load_image(path, 8).shape == (8, 8, 3)
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        data.load_image(tmp_path / "b.png", 8)
    (tmp_path / "c.png").write_text("no")
    with pytest.raises(ValueError, match=r"c\.png is not a readable image"):
        data.load_image(tmp_path / "c.png", 8)
