"""ArrayRecord shards and TFDS data sets."""

import io
import json
import pathlib
import pickle
import shutil

import pytest
from PIL import Image

from lumos_jax import config, data
from lumos_jax.data.sources.arrayrecord import ArrayRecordSource, image_of_example
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
