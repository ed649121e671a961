"""ArrayRecord shards and TFDS data sets."""

import io
import json
import os
import pathlib
import pickle
import shutil
import uuid

import numpy as np
import pytest
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from lumos_jax import config, data, fileio
from lumos_jax.data import storage
from lumos_jax.data.sources import arrayrecord, scenes
from lumos_jax.data.sources.arrayrecord import ArrayRecordSource, image_of_example
from lumos_jax.data.sources.mixture import MixtureSource
from tests.fields import data_settings, replace


def png(level, side=9):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (level,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


IMAGES = [png(10 * i) for i in range(10)]


@pytest.fixture
def shards(tmp_path):
    assert data.write_arrayrecord(tmp_path / "a-00000.arrayrecord", IMAGES[:6]) == 6
    assert data.write_arrayrecord(tmp_path / "a-00001.arrayrecord", IMAGES[6:]) == 4
    return tmp_path


def test_round_trip(shards):
    settings = config.Data(source="arrayrecord", path=str(shards), image_size=8)
    source = data.make_source(settings)
    assert [source.read(i) for i in range(len(source))] == IMAGES
    assert [source.describe(i) for i in (0, 5, 6, 9)] == [
        f"{shards}/a-0000{shard}.arrayrecord#{index}" for shard, index in ((0, 0), (0, 5), (1, 0), (1, 3))
    ]
    assert pickle.loads(pickle.dumps(source)).read(7) == IMAGES[7]
    batch = data.read_batch(settings, source, [9, 0])
    assert list(batch["image"][:, 0, 0, 0]) == [90, 0]


def test_directory_glob_and_file_are_paths(shards):
    (shards / "notes.txt").write_text("x")
    everything = ArrayRecordSource(str(shards))
    assert len(everything) == 10
    assert len(ArrayRecordSource(str(shards / "a-*1.arrayrecord"))) == 4
    one = ArrayRecordSource(str(shards / "a-00000.arrayrecord"))
    assert len(one) == 6
    assert one.fingerprint() != everything.fingerprint() == ArrayRecordSource(f"{shards}/a-*.arrayrecord").fingerprint()


def test_what_is_no_shard_is_named(shards):
    with pytest.raises(ValueError, match="no ArrayRecord shards"):
        ArrayRecordSource(str(shards / "*.none"))
    whole = (shards / "a-00001.arrayrecord").read_bytes()
    (shards / "a-00001.arrayrecord").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a-00001\.arrayrecord cannot be read as ArrayRecord: truncated"):
        ArrayRecordSource(str(shards))
    empty = shards / "empty.arrayrecord"
    assert data.write_arrayrecord(empty, []) == 0
    with pytest.raises(ValueError, match="hold no records"):
        ArrayRecordSource(str(empty))


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    def broken():
        yield IMAGES[0]
        raise RuntimeError("the source went away")

    with pytest.raises(RuntimeError, match="went away"):
        data.write_arrayrecord(tmp_path / "a.arrayrecord", broken())
    assert list(tmp_path.iterdir()) == []


def test_records_may_be_examples(tmp_path):
    def field(number, body):
        assert len(body) < 2**14
        length = bytes([len(body) & 0x7F | 0x80, len(body) >> 7])  # a varint of two bytes
        return bytes([number << 3 | 2]) + length + body

    def example(**features):
        return field(1, b"".join(field(1, field(1, k.encode()) + field(2, v)) for k, v in features.items()))

    def bytes_list(*values):
        return field(1, b"".join(field(1, v) for v in values))

    label = field(3, field(1, b"\x07"))  # an int64 list
    name = {"image/encoded": bytes_list(IMAGES[1])}
    assert image_of_example(example(label=label, image=bytes_list(IMAGES[2]))) == IMAGES[2]
    assert image_of_example(example(**name, label=label, thumbnail=bytes_list(IMAGES[3]))) == IMAGES[1]
    assert image_of_example(example(caption=bytes_list(b"two"), photo=bytes_list(IMAGES[4], IMAGES[5]))) == IMAGES[4]
    for nothing in (b"", b"\xff" * 40, IMAGES[0], example(caption=bytes_list(b"two")), example(**name)[:-5]):
        assert image_of_example(nothing) is None

    data.write_arrayrecord(tmp_path / "x.array_record-00000-of-00001", [example(**name, label=label), b"rubbish"])
    settings = config.Data(source="arrayrecord", path=str(tmp_path), image_size=8)
    batch = data.read_batch(settings, data.make_source(settings), [0, 1])
    assert list(batch["weight"]) == [1, 0]
    assert batch["image"][0, 0, 0, 0] == 10
    assert str(batch["problem"][1]) == f"{tmp_path}/x.array_record-00000-of-00001#1: cannot identify image file"


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """The directory of a small data set that TFDS itself prepared."""
    import tensorflow_datasets as tfds

    class TinyFlowers(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
            features = {"label": tfds.features.ClassLabel(num_classes=9), "image": image, "text": tfds.features.Text(),
                        "detailed": tfds.features.Sequence({"text": tfds.features.Text()})}  # fmt: skip
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(7):
                told = {
                    "text": f"Number\n {i} ",
                    "detailed": [{"text": f"first of {i}"}, {"text": "second"}][: 2 * (i > 0)],
                }
                # An encoded file: TFDS encodes arrays by TensorFlow.
                yield i, {"image": io.BytesIO(png(30 * i)), "label": i, **told}

    path = tmp_path_factory.mktemp("tfds")
    TinyFlowers(data_dir=path, file_format="array_record").download_and_prepare()
    return str(path)


@pytest.mark.filterwarnings("default")  # TensorFlow's and TFDS's own
def test_tfds_data_sets_by_name(flowers):
    settings = data_settings(source="tfds", tfds__name="tiny_flowers", path=flowers, image_size=8)
    source = data.make_source(settings)
    assert len(source) == 7
    assert source.read(0)[:4] == b"\x89PNG"  # still encoded
    batch = data.read_batch(settings, source, range(7))
    assert sorted(batch["image"][:, 4, 4, 2]) == [30 * i for i in range(7)]
    assert source.describe(3) == "tiny_flowers/train#3"
    part = data.make_source(
        data_settings(source="tfds", tfds__name="tiny_flowers:1.0.0", path=flowers, tfds__split="train[:3]")
    )
    assert len(part) == 3
    assert part.fingerprint() != source.fingerprint() == pickle.loads(pickle.dumps(source)).fingerprint()
    captioned = data_settings(
        source="tfds",
        tfds__name="tiny_flowers",
        path=flowers,
        image_size=8,
        sample_type="captioned",
        captions__detailed_caption_prob=0.5,
    )
    source, levels = data.make_source(captioned), batch["image"][:, 4, 4, 2] // 30
    assert [pickle.loads(pickle.dumps(source)).captions(i) for i in range(7)] == [
        (f"Number {level}", f"first of {level}" if level else "") for level in levels
    ]
    assert list(data.read_batch(captioned, source, [0, 1])["weight"]) == [1, 1]
    # Another one, without words.
    silent = pathlib.Path(shutil.copytree(f"{flowers}/tiny_flowers", f"{flowers}/silent_flowers"), "1.0.0")
    for file in silent.iterdir():
        file.rename(silent / file.name.replace("tiny", "silent"))
    info = (silent / "dataset_info.json").read_text()
    (silent / "dataset_info.json").write_text(info.replace("tiny", "silent"))
    told = json.loads((silent / "features.json").read_text())
    for name in ("text", "detailed"):
        del told["featuresDict"]["features"][name]
    (silent / "features.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"silent_flowers has no feature caption, text, .*; it has image, label"):
        data.make_source(replace(captioned, tfds__name="silent_flowers"))

    # Its shards are ArrayRecord files of Examples.
    same = data.make_source(config.Data(source="arrayrecord", path=f"{flowers}/tiny_flowers/1.0.0"))
    assert [same.read(i) for i in range(7)] == [source.read(i) for i in range(7)]

    # One that TFDS prepared as it does unless told otherwise.
    info = pathlib.Path(flowers, "tiny_flowers/1.0.0/dataset_info.json")
    other = pathlib.Path(flowers, "other/tiny_flowers/1.0.0")
    other.mkdir(parents=True)
    (other / "dataset_info.json").write_text(info.read_text().replace("array_record", "tfrecord"))
    (other / "features.json").write_text((info.parent / "features.json").read_text())
    with pytest.raises(
        ValueError, match=r"cannot be read at random: .*data_dir='DIRECTORY', file_format='array_record'"
    ):
        data.make_source(data_settings(source="tfds", tfds__name="tiny_flowers", path=f"{flowers}/other"))

    for field, value, message in (
        ("split", "test", r"Unknown split 'test'.* \(splits: train;"),
        ("name", "no_such_set", "no_such_set', split='train': TFDS has no such data set, nor is one prepared in"),
        ("name", "mnist", r"mnist.* is not prepared in .* with: python -c .*tfds\.builder\('mnist', data_dir='"),
    ):
        with pytest.raises(ValueError, match=message):
            data.make_source(
                data_settings(
                    **{"source": "tfds", "tfds__name": "tiny_flowers", "path": flowers, f"tfds__{field}": value}
                )
            )


def test_a_missing_shard_of_a_numbered_set_is_named(tmp_path):
    for number in (0, 1, 3):
        data.write_arrayrecord(tmp_path / f"train-{number:05d}-of-00004.arrayrecord", [IMAGES[number]])
    with pytest.raises(ValueError, match=r"1 of 4 shards are missing, as .*train-00002-of-00004\.arrayrecord"):
        ArrayRecordSource(str(tmp_path))
    assert len(ArrayRecordSource(str(tmp_path / "*.arrayrecord"))) == 3
    data.write_arrayrecord(tmp_path / "train-00002-of-00004.arrayrecord", [IMAGES[2]])
    assert len(ArrayRecordSource(str(tmp_path))) == 4


def test_the_fingerprint_sees_changed_content_of_the_same_size(shards):
    path = shards / "a-00000.arrayrecord"
    before, old = ArrayRecordSource(str(shards)).fingerprint(), path.read_bytes()
    copied = shutil.copytree(shards, shards / "copy")
    os.utime(path, (1, 1))
    assert ArrayRecordSource(str(shards)).fingerprint() == ArrayRecordSource(str(copied)).fingerprint() == before
    data.write_arrayrecord(path, [image[::-1] for image in IMAGES[:6]], compress=False)
    data.write_arrayrecord(shards / "other", IMAGES[:6], compress=False)
    assert path.stat().st_size == (shards / "other").stat().st_size == len(old)
    after = ArrayRecordSource(str(shards)).fingerprint()
    assert not data.same_fingerprint(before, after)
    assert data.same_fingerprint(before, before)
    assert data.same_fingerprint(
        before.partition("-")[0], after
    )  # a run of an older version, which knew names and sizes
    mixed = [
        MixtureSource([ArrayRecordSource(str(path)), scenes.ScenesSource(9, 8)], [1.0, 2.0])
        for path in (shards, copied)
    ]
    changed, unchanged = (source.fingerprint() for source in mixed)
    assert changed.partition("-")[0] == unchanged.partition("-")[0]
    assert not data.same_fingerprint(changed, unchanged)


def test_a_bad_shard_of_many_is_left_out_and_named(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path / "cache"))
    for number in range(10):
        data.write_arrayrecord(tmp_path / f"{number}.arrayrecord", [IMAGES[number]])
    whole = (tmp_path / "4.arrayrecord").read_bytes()
    (tmp_path / "4.arrayrecord").write_bytes(whole[:5000])
    settings = config.Data(source="arrayrecord", path=str(tmp_path), max_failed_shards=0.1)
    for _ in range(2):  # it is looked at again
        source = data.make_source(settings)
        assert [source.read(i) for i in range(9)] == IMAGES[:4] + IMAGES[5:]
        assert "a shard is left out: " in said[-1]
        assert "4.arrayrecord" in said.pop()
    with pytest.raises(ValueError, match=r"4\.arrayrecord cannot be read.*1 such shards of 10"):
        data.make_source(replace(settings, max_failed_shards=0.05))
    (tmp_path / "4.arrayrecord").write_bytes(whole)
    assert len(data.make_source(settings)) == 10
    monkeypatch.setattr(arrayrecord, "count_records", lambda *_: pytest.fail("it is known"))
    assert data.make_source(settings).read(4) == IMAGES[4]


def test_a_reader_that_failed_is_opened_again(shards, monkeypatch):
    path = shards / "a-00000.arrayrecord"
    data.write_arrayrecord(path, [*IMAGES[:6], b"x" * 2**20], compress=False)
    source, whole = ArrayRecordSource(str(shards)), path.read_bytes()
    assert source.read(0) == IMAGES[0]

    def replace_handle(name):
        """The open file no longer reads."""
        handles = [int(number) for number in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{number}")]
        (handle,) = [number for number in handles if os.readlink(f"/proc/self/fd/{number}") == str(path)]
        other = os.open(name, os.O_RDONLY)
        os.dup2(other, handle)
        os.close(other)

    replace_handle(shards)
    with pytest.raises(data.CorruptRecord, match=r"shard damaged: pread\(\) failed: Is a directory"):
        source.read(6)
    assert source.read(6) == b"x" * 2**20
    replace_handle("/proc/self/mem")  # at byte 0 that is EIO, as of a file server that restarts
    monkeypatch.setattr(fileio, "delays", lambda retries: [0.0] * retries)
    settings = config.Data(source="arrayrecord", path=str(shards), image_size=8)
    assert data.read_batch(settings, source, [5])["weight"].all()
    path.write_bytes(whole[:100])  # in place: the open file is the same
    with pytest.raises(data.CorruptRecord, match="shard damaged"):
        source.read(6)
    path.write_bytes(whole)
    assert source.read(6) == b"x" * 2**20


@pytest.mark.parametrize("options", ["group_size:1,uncompressed", "group_size:1", "group_size:3,brotli:3"])
def test_shards_behind_a_url_are_read_by_ranges(tmp_path, monkeypatch, options):
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    records = [rng.bytes(int(size)) for size in rng.integers(1, 90_000, 40)] + [b""]
    base = f"memory://{uuid.uuid4().hex}"
    for number, part in enumerate((records[:17], records[17:])):
        writer = ArrayRecordWriter(str(tmp_path / "x"), options)
        for record in part:
            writer.write(record)
        writer.close()
        storage.write_whole(f"{base}/{number}-of-2.arrayrecord", (tmp_path / "x").read_bytes())
    source = data.make_source(config.Data(source="arrayrecord", path=base))
    assert [source.read(i) for i in range(41)] == records
    assert source.describe(18) == f"{base}/1-of-2.arrayrecord#1"
    found = source.fetch([40, 3, 18], [5])
    assert found.images == {i: records[i] for i in (40, 3, 18)}
    assert isinstance(found.captions[5], data.CorruptRecord)
    storage.write_whole(f"{base}/0-of-2.arrayrecord", b"x" * 65536)
    with pytest.raises(data.CorruptRecord, match="shard damaged"):
        source.read(2)
    storage.remove(f"{base}/1-of-2.arrayrecord")
    with pytest.raises(ValueError, match=r"1 of 2 shards are missing, as memory://.*/1-of-2"):
        data.make_source(config.Data(source="arrayrecord", path=base))
