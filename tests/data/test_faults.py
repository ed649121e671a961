"""Odd inputs by kind: one bad record never ends a run and is counted, no wrong pixels of weight 1, nothing waits."""

import errno
import io
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from absl import logging
from PIL import Image

from lumos_jax import config, data, fileio
from lumos_jax.data import cameras, captions, files, pipeline, shards
from lumos_jax.data.decode import MAX_PIXELS, UndecodableImage, decode_cover, decode_square, size_of
from lumos_jax.data.sources.folder import FolderSource
from tests.fields import data_settings


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(level=100, side=9):
    return encode(Image.new("RGB", (side, side), (level,) * 3), "PNG")


@pytest.fixture
def warnings_(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    return said


class Failing(data.Source, data.base.HasCaptions):
    """Records 0 .. 5, of which number 3 raises."""

    def __init__(self, error):
        self.error = error

    @classmethod
    def open(cls, settings):
        raise NotImplementedError

    def __len__(self):
        return 6

    def read(self, index):
        if index == 3:
            raise self.error
        return png(10 * index)

    def captions(self, index):
        return f"number {index}", ""

    def describe(self, index):
        return f"record {index}"

    def fingerprint(self):
        return ""


SMALL = config.Data(image_size=8, holdout=0)


# --- Whatever a record raises.


@pytest.mark.parametrize(
    "error",
    [SystemError("AST constructor"), RecursionError(), AttributeError("None"), KeyError("x"), ZeroDivisionError(),
     UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates"), Warning("w"), OSError("truncated"), PermissionError(13, "no"),
     FileNotFoundError(2, "gone"), StopIteration(), data.CorruptRecord("bad")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_a_record_raises_is_counted_and_named(error):
    batches = data.make_train_iterator(SMALL, Failing(error), batch_size=6, rows=range(6), start_step=0)
    batch = next(batches)
    batches.close()
    bad = list(batch["record"]).index(3)
    assert list(batch["weight"]) == [float(row != bad) for row in range(6)]
    assert batch["problem"][bad].startswith("record 3: ")
    assert not batch["image"][bad].any()


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyboardInterrupt(), SystemExit(3), ImportError()], ids=lambda e: type(e).__name__
)
def test_memory_interrupts_and_missing_libraries_are_no_record_s_fault(error):
    with pytest.raises(type(error)):
        data.read_batch(SMALL, Failing(error), range(6))


@pytest.mark.parametrize("code", ["EMFILE", "ENFILE", "EIO", "ESTALE", "ETIMEDOUT", "ENOMEM"])
@pytest.mark.parametrize("quoted", [False, True])
def test_a_failing_system_ends_the_run_by_name(code, quoted, monkeypatch):
    monkeypatch.setattr(fileio, "delays", lambda retries: [0.0] * retries)
    number = getattr(errno, code)
    error = (
        RuntimeError(f"UNKNOWN: {os.strerror(number)}; reading x") if quoted else OSError(number, os.strerror(number))
    )
    with pytest.raises(OSError, match=f"record 3 cannot be read: {os.strerror(number)}") as raised:
        data.read_batch(SMALL, Failing(error), range(6))
    assert raised.value.errno == number


def test_a_passing_failure_is_tried_again(monkeypatch):
    monkeypatch.setattr(fileio, "delays", lambda retries: [0.0] * retries)
    source, tries = Failing(OSError(errno.ESTALE, "stale")), []
    read = source.read
    source.read = lambda index: tries.append(index) or (png(30) if tries.count(3) == 3 else read(index))
    assert data.read_batch(SMALL, source, range(6))["weight"].all()
    assert tries.count(3) == 3


def count_letters(batch):
    """A host function that some captions break, as tokenizers do."""
    for text in batch["caption"]:
        if "3" in text:
            raise TypeError("TextEncodeInput must be Union[...]")
    return batch | {"tokens": np.array([len(text) for text in batch["caption"]])}


def test_a_caption_that_cannot_be_tokenized_is_a_corrupt_record():
    chosen = data_settings(image_size=8, sample_type="captioned", captions__detailed_caption_prob=0.0)
    source = Failing(None)
    source.read = lambda index: png(10 * index)
    batch = data.read_batch(chosen, source, [2, 3, 4], count_letters)
    assert list(batch["weight"]) == [1, 0, 1]
    assert list(batch["tokens"]) == [8, 0, 8]
    assert list(batch["record"]) == [2, 3, 4]
    assert batch["problem"][1] == "record 3: TypeError: TextEncodeInput must be Union[...]"
    with pytest.raises(ZeroDivisionError):  # a fault of ours is none of a record
        data.read_batch(chosen, source, [2, 3, 4], lambda batch: 1 // 0)


# --- Text in any encoding.


@pytest.mark.parametrize(
    ("content", "text"),
    [("\ufeffa r\u00e9d".encode(), "a r\u00e9d"), ("a r\u00e9d".encode("utf-16"), "a r\u00e9d"),
     (b"\xfe\xff" + "a r\u00e9d".encode("utf-16-be"), "a r\u00e9d"), ("a\r\nr\u00e9d".encode("utf-32"), "a r\u00e9d"),
     ("r\u00e9d".encode("latin-1"), "r\ufffdd"), (b"", "")],
)  # fmt: skip
def test_captions_of_any_encoding(tmp_path, content, text):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_bytes(content)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.png", "a.txt"):
            tar.add(tmp_path / name, name)
    for source in ("folder", "webdataset"):
        path = tmp_path / ("a.tar" if source == "webdataset" else "")
        chosen = config.Data(source=source, path=str(path), sample_type="captioned", image_size=8)
        assert data.make_source(chosen).captions(0) == (text, "")


def test_text_that_is_none_is_counted():
    for content in ("red".encode("utf-16-le"), b"\0\1\2"):
        with pytest.raises(data.CorruptRecord, match="zero bytes"):
            captions.decode_text(content)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_half_a_surrogate_pair_is_replaced(tmp_path, encoding, warnings_):
    (tmp_path / "a.png").write_bytes(png())
    lines = [{"file": "a.png", "caption": "old"}, {"file": "a.png", "caption": "a \ud83d b \ud83d\ude00"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding=encoding)
    chosen = data_settings(
        source="folder", path=str(tmp_path), sample_type="captioned", captions__detailed_caption_prob=0.0
    )
    assert data.make_source(chosen).captions(0)[0] == "a \ufffd b \U0001f600"
    assert warnings_ == [f"{tmp_path}/captions.jsonl: 1 files have several lines, of which the last counts"]


# --- Pixels.


def corners(width=24, height=16):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[: height // 2, width // 2 :] = (255, 0, 0), (0, 255, 0)
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}])
def test_a_tiff_is_turned_once(orientation, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    # What is stored is turned the other way; `undo` holds the transpositions that make it upright.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    back = {0: 0, 1: 1, 3: 3, 5: 5, 6: 6, 2: 4, 4: 2}
    image = Image.fromarray(corners())
    stored = image if orientation == 1 else image.transpose(Image.Transpose(back[undo[orientation]]))
    whole = encode(stored, "TIFF", exif=exif, **options)
    assert np.array_equal(decode_square(whole, 16), decode_square(encode(image, "PNG"), 16))
    assert size_of(io.BytesIO(whole)) == (16, 24)
    assert decode_cover(whole, 16, 24)[1] == (16, 24)
    assert np.array_equal(decode_cover(whole, 16, 24)[0], corners())


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


@pytest.mark.parametrize(
    ("values", "kind"),
    [((RAMP * 65535).astype(np.uint16), "TIFF"), ((RAMP * 65535).astype(np.uint16), "PNG"),
     (RAMP.astype(np.float32), "TIFF"), ((RAMP * 255).astype(np.float32), "TIFF"), ((RAMP * 255).astype(np.uint8), "TIFF")],
)  # fmt: skip
def test_the_range_of_gray_files_is_that_of_their_type(values, kind):
    assert np.abs(decode_square(encode(Image.fromarray(values), kind), 64)[..., 0] - RAMP * 255).max() <= 1.01
    inverted = encode(Image.fromarray(values), kind, tiffinfo={262: 0}) if kind == "TIFF" else b""
    if inverted and values.dtype != np.uint8:  # white is zero
        assert np.abs(decode_square(inverted, 64)[..., 0] - (1 - RAMP) * 255).max() <= 1.01


@pytest.mark.parametrize(
    "values",
    [RAMP * 2 - 1, RAMP * 300, np.where(RAMP == 0, np.nan, RAMP), np.where(RAMP == 1, np.inf, RAMP), RAMP * 255e3],
)
def test_floating_point_files_of_no_known_range_are_counted(values):
    with pytest.raises(UndecodableImage, match=r"neither 0 \.\. 1 nor 0 \.\. 255"):
        decode_square(encode(Image.fromarray(values.astype(np.float32)), "TIFF"), 16)


def tiff(values, bits, sample_format):
    """A TIFF of one strip, uncompressed, little-endian."""
    raw, (height, width) = values.tobytes(), values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height),
            (279, len(raw)), (339, sample_format)]  # fmt: skip
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) if tag not in (279,) else
                       struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)  # fmt: skip
    return b"II*\0" + struct.pack("<I", 8 + len(raw)) + raw + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_integers_of_other_types():
    signed = decode_square(tiff((RAMP * 32767).astype("<i2"), 16, 2), 64)[..., 0]
    assert np.abs(signed - RAMP * 255).max() <= 1.01
    packed = np.packbits(((RAMP * 4095).astype(np.uint16)[..., None] >> np.arange(11, -1, -1)) & 1, axis=None)
    twelve = tiff(packed.reshape(64, 96), 12, 1).replace(
        struct.pack("<HHIHH", 256, 3, 1, 96, 0), struct.pack("<HHIHH", 256, 3, 1, 64, 0)
    )
    assert np.abs(decode_square(twelve, 64)[..., 0] - RAMP * 255).max() <= 1.01
    for values, bits, kind in (((RAMP * 255).astype("<i4"), 32, 2), ((RAMP * 255).astype("<u4"), 32, 1),
                               ((RAMP * 255 - 128).astype("<i2"), 16, 2), ((RAMP * 127).astype("i1"), 8, 2)):  # fmt: skip
        with pytest.raises(UndecodableImage, match=r"integers|signed"):
            decode_square(tiff(values, bits, kind), 64)


def test_a_flipped_byte_in_a_png_is_noticed():
    whole = bytearray(encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)), "PNG"))
    at = whole.index(b"IDAT")
    for place in range(at + 6, at + 600, 37):
        damaged = whole.copy()
        damaged[place] ^= 1
        with pytest.raises(UndecodableImage):
            decode_square(bytes(damaged), 16)
    stored = bytearray(encode(Image.fromarray(corners()), "PNG", compress_level=0))  # zlib does not notice it either
    stored[stored.index(b"IDAT") + 50] ^= 255
    with pytest.raises(UndecodableImage, match="wrong checksum of chunk IDAT"):
        decode_square(bytes(stored), 16)


@pytest.mark.parametrize("options", [{"restart_marker_rows": 1}, {"progressive": True}])
def test_a_flipped_byte_in_a_jpeg_is_noticed_where_libjpeg_does(options):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole, noticed = encode(Image.fromarray(noise), "JPEG", **options), 0
    places = range(whole.index(b"\xff\xda") + 20, len(whole) - 2, 29)
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        try:
            decode_square(bytes(damaged), 64)
        except UndecodableImage:
            noticed += 1
    assert noticed > len(places) / 3


def test_jpegs_are_read_up_to_the_limit_and_others_up_to_theirs(monkeypatch):
    header = bytearray(encode(Image.new("L", (8, 8), 100), "JPEG"))
    at = header.index(b"\xff\xc0") + 5
    for side, fits in ((14_000, True), (16_384, True), (16_385, False)):
        header[at : at + 4] = struct.pack(">HH", side, side)
        assert (size_of(io.BytesIO(bytes(header))) == (side, side)) == fits
    assert MAX_PIXELS == 16_384**2


# --- Tars.


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "a.png"
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b""))


def tar_source(path, **fields):
    return data.make_source(data_settings(source="webdataset", path=str(path), **fields))


def tar_names(source):
    return [source.describe(i).partition("#")[2] for i in range(len(source))]


def test_names_with_dots_are_records_unless_they_belong_to_one(tmp_path, warnings_, monkeypatch):
    members = [("plain.png", png(10)), ("plain.mask.png", png(20)), ("22.05.png", png(30)), ("22.05.txt", b"early"),
               ("d.e/Photo 2.0 (x).JPG", png(40)), ("left.right.detailed.txt", b"x"), ("left.right.png", png(50))]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path / "index"))
    for _ in range(2):  # the second time from the index
        source = tar_source(tmp_path / "a.tar")
        assert tar_names(source) == ["plain", "22.05", "d.e/Photo 2.0 (x)", "left.right"]
        assert [source.read(i) for i in range(4)] == [png(10), png(30), png(40), png(50)]
        assert source.captions(1) == ("early", "")
        assert source.captions(3) == ("", "x")
        reason = "files belong to an image of the name before their first dot and are left out"
        assert warnings_.pop() == f"{tmp_path}/a.tar: 1 {reason}"
        assert not warnings_


def test_what_tars_leave_out_is_counted(tmp_path, warnings_):
    members = [("a.png", png(1)), ("a.txt", b"old"), ("a.png", png(2)), ("a.txt", b"new"), ("a.cls", b"7"),
               ("link.png", None), (".hidden.png", png(3)), ("b.txt", b"alone")]  # fmt: skip
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", members)
    (tmp_path / "2.tar").mkdir()
    source = tar_source(tmp_path)
    assert tar_names(source) == ["a", "a"]
    assert source.read(0) == png(2)
    assert source.captions(1)[0] == "new"
    assert warnings_ == [
        f"{tmp_path}: 1 are no files and are left out, as {tmp_path}/2.tar",
        f"{tmp_path}: 6 files in shards are no images or captions and are left out",
        f"{tmp_path}: 4 names stand twice in a shard, as after tar -r: the last counts",
        f"{tmp_path}: 2 records in shards have no image and are left out",
    ]


def test_a_name_may_look_like_a_pattern(tmp_path):
    write_tar(tmp_path / "a[1].tar", [("a.png", png())])
    assert len(tar_source(tmp_path / "a[1].tar")) == 1
    data.write_arrayrecord(tmp_path / "b[1].arrayrecord", [png()])
    assert len(data.make_source(config.Data(source="arrayrecord", path=str(tmp_path / "b[1].arrayrecord")))) == 1


# --- Open files.


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i:03}.arrayrecord" for i in range(40)]
    for number, path in enumerate(paths):
        data.write_arrayrecord(path, [png(number)])
    source = data.make_source(config.Data(source="arrayrecord", path=str(tmp_path)))
    shards._readers.clear()
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    batches = data.make_train_iterator(SMALL, source, batch_size=40, rows=range(40), start_step=0)
    batch = next(batches)
    batches.close()
    assert batch["weight"].all()
    assert np.array_equal(batch["image"][:, 0, 0, 0], batch["record"])
    assert len(os.listdir("/proc/self/fd")) - before <= 12


# --- Numbers that are none.


@pytest.mark.parametrize("score", ["nan", "inf", "-inf", "1e39", "", "fast"])
def test_motion_scores_are_finite(tmp_path, score):
    (tmp_path / "list.csv").write_text(f"video,motion score\na.mp4,3.5\nb.mp4,{score}\n")
    with pytest.raises(ValueError, match=r"list\.csv, line 3: motion score is .*, not a number that is finite"):
        data.make_source(config.Data(source="videos", path=str(tmp_path / "list.csv")))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 1e300])
@pytest.mark.parametrize("place", [(0, 0), (1, 3)])
def test_camera_matrices_are_finite_in_what_is_made_of_them(value, place):
    matrix = np.eye(3, 4)
    matrix[:, 3] = 1, 2, 3
    matrix[place] = value
    with pytest.raises(ValueError, match="not finite, or beyond 1e"):
        cameras.check_matrix(matrix)


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<i4", "|u1", "|b1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_files_without_numpy_s_parser(dtype, order):
    array = np.asarray(np.arange(12).reshape(3, 4) % 2, dtype=dtype, order=order)
    buffer = io.BytesIO()
    np.save(buffer, array)
    read = files.read_npy(buffer.getvalue())
    assert read.dtype == array.dtype
    assert np.array_equal(read, array)
    for end in range(0, len(buffer.getvalue()), 7):
        with pytest.raises(ValueError):  # noqa: PT011, of several kinds
            files.read_npy(buffer.getvalue()[:end])


# --- What would wait.


@pytest.fixture
def special(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket.jpg"))
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    yield tmp_path
    listener.close()


def test_pipes_sockets_and_devices_are_left_out_and_counted(special, warnings_):
    (special / "a.png").write_bytes(png())
    (special / "gone.png").symlink_to(special / "nowhere")  # a file that cannot be read
    assert list(FolderSource(str(special)).names) == ["a.png", "gone.png"]
    assert warnings_ == [f"{special}: 4 pipes, sockets or devices are left out, as {special}/device.png"]


def test_no_reader_waits_for_a_pipe(special):
    for name in ("pipe.png", "socket.jpg", "link.png", "device.png"):
        with pytest.raises(OSError, match=r"regular file|No such device"):
            files.read_file(special / name)
    with pytest.raises(ValueError, match="cannot be read"):
        pipeline.load_image(special / "pipe.png", 8)
    (special / "a.png").write_bytes(png())
    os.mkfifo(special / "a.txt")
    chosen = config.Data(source="folder", path=str(special), sample_type="captioned", image_size=8)
    batch = data.read_batch(chosen, data.make_source(chosen), [0])
    assert "a.png: a pipe or a device" in batch["problem"][0]
    for name in ("b.tar", "b.arrayrecord", "b.csv"):
        os.mkfifo(special / name)
    for source, name in (("webdataset", "b.tar"), ("arrayrecord", "b.arrayrecord"), ("videos", "b.csv")):
        with pytest.raises(ValueError, match=r"no .*shards there|neither a directory nor a csv"):
            data.make_source(config.Data(source=source, path=str(special / name)))


# --- The package.


def test_importing_data_loads_no_heavy_library():
    code = "import lumos_jax.data, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    names = ["jax", "grain", "tensorflow", "tensorflow_datasets", "av", "cv2", "array_record", "torch"]
    run = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


TOY = '''
"""Plain gray squares."""
import numpy as np
from lumos_jax.data.base import Source, register

@register("toy")
class ToySource(Source):
    needs = "tfds.name"
    def __init__(self, name): self.name = name
    @classmethod
    def open(cls, data): return cls(data.tfds.name)
    def __len__(self): return 50
    def read(self, index): return np.full((4, 4, 3), index, np.uint8)
    def describe(self, index): return f"{self.name} {index}"
    def fingerprint(self): return self.name
'''
USE_TOY = """
from lumos_jax import config, data
from lumos_jax.data import order
for fields in ({}, {"tfds.name": "gray", "sample_type": "clip"}):
    try: config.validate(config.Settings(data=config.replace(config.Data(), {"source": "toy", **fields})))
    except ValueError as error: print(error)
chosen = config.replace(config.Data(), {"source": "toy", "tfds.name": "gray", "image_size": 4})
config.validate(config.Settings(data=chosen))
source = data.make_source(chosen)
batch = data.read_batch(chosen, source, [order.training_order(chosen, source)(i) for i in range(8)])
print(batch["weight"].sum(), (batch["image"][:, 0, 0, 0] == batch["record"]).all())
"""


def test_a_new_source_is_one_file(tmp_path):
    package = files.pathlib.Path(data.__file__).parents[1]
    root = tmp_path / "lumos_jax"
    (root / "data" / "sources").mkdir(parents=True)
    for folder in (package, package / "data", package / "data" / "sources"):
        for path in folder.iterdir():
            link = root / path.relative_to(package)
            if not link.exists():
                link.symlink_to(path)
    (root / "data" / "sources" / "toy.py").write_text(TOY)
    run = subprocess.run([sys.executable, "-c", USE_TOY], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert run.stdout.splitlines() == [
        "config.data.source=toy needs config.data.tfds.name",
        "config.data.source=toy does not go with config.data.sample_type=clip: that goes with mixture, scenes, videos",
        "8.0 True",
    ], run.stderr[-2000:]
