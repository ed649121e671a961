"""Readers of the forms in which collections are downloaded: what each yields, and what it refuses."""

import gzip
import json
import struct
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lumos_jax.data import storage
from lumos_jax.data.shards import write_arrayrecord
from lumos_jax.preparation.readers import READERS, DamagedInput
from lumos_jax.preparation.settings import Source
from tests.preparation import collections_of as made

PHOTOS = [made.photo(number, (24, 32)) for number in range(6)]


def listed(kind, path, **more):
    return READERS[kind].list(Source(kind=kind, path=str(path), **more), 1 << 30)


def read(kind, path, **more):
    """All candidates of a source, and for those that have a place in the file, whether the image is there."""
    found = []
    for given in listed(kind, path, **more):
        own = list(READERS[kind].read(given))
        for candidate in own:
            if candidate.offset >= 0 and given.path.endswith(".tar"):
                assert storage.read(given.path, candidate.offset, len(candidate.data)) == candidate.data
        places = [(c.row, c.offset, len(c.data)) for c in own[1:]]
        assert list(READERS[kind].images(given, places)) == [c.data for c in own[1:]]
        found += own
    return found


def example(features):
    """A serialized tf.train.Example of features with bytes."""

    def field(number, content):
        length, size = bytearray(), len(content)
        while size > 127:
            length.append(size & 127 | 128)
            size >>= 7
        return bytes([number << 3 | 2]) + bytes(length) + bytes([size]) + content

    entries = [
        field(1, field(1, name.encode()) + field(2, field(1, field(1, value)))) for name, value in features.items()
    ]
    return field(1, b"".join(entries))


def test_img2dataset_has_captions_and_scores_of_json_and_of_the_parquet_beside_it(tmp_path):
    folder = tmp_path / "part" / "deeper"
    folder.mkdir(parents=True)
    fields = {"url": "https://a/1", "caption": "of the\njson", "AESTHETIC": 5.5, "punsafe": None}
    files = [("000.jpg", PHOTOS[0]), ("000.json", json.dumps(fields).encode()), ("000.txt", b"a text"),
             ("001.jpg", PHOTOS[1]), ("001.json", json.dumps(fields).encode()), ("002.png", PHOTOS[2])]  # fmt: skip
    (folder / "00000.tar").write_bytes(made.tar(files))
    table = pa.table({"key": ["000", "002"], "pwatermark": [0.25, 0.75], "URL": ["https://b/0", "https://b/2"]})
    parquet.write_table(table, folder / "00000.parquet")
    first, second, third = read("img2dataset", tmp_path)
    assert (first.key, first.url, first.caption, first.caption_kind) == ("000", "https://a/1", "a text", 1)
    assert first.scores == {"aesthetic": 5.5, "watermark": 0.25}
    assert (second.caption, second.caption_kind, second.scores) == ("of the json", 2, {"aesthetic": 5.5})
    assert (third.url, third.caption, third.scores) == ("https://b/2", "", {"watermark": 0.75})
    for path in (folder / "00000.tar", tmp_path / "*" / "*" / "*.tar"):
        assert [given.metadata for given in listed("img2dataset", path)] == [str(folder / "00000.parquet")]
    data = (folder / "00000.tar").read_bytes()
    assert data[first.caption_offset :][: first.caption_size] == b"a text"
    assert json.loads(data[second.caption_offset :][: second.caption_size]) == fields


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_in_tars(tmp_path, format):
    long = "d/" + "n" * 120 + "é"
    files = [("1.5 km.jpg", PHOTOS[0]), ("a.jpg", PHOTOS[1]), ("a.mask.png", PHOTOS[2]), (".hidden.jpg", PHOTOS[3]),
             ("a.txt", b"caption of a"), ("a.detailed.txt", b"more"), ("d/a.JPEG", PHOTOS[4]), ("x.bin", b"?"),
             ("1.5 km.txt", b"late"), ("a.jpg", PHOTOS[5])]  # fmt: skip
    if format != tarfile.USTAR_FORMAT:
        files.append((f"{long}.jpg", PHOTOS[2]))
    (tmp_path / "a.tar").write_bytes(made.tar(files, format))
    found = read("tars", tmp_path)
    keys = ["1.5 km", "a", "d/a", "a", *([long] if format != tarfile.USTAR_FORMAT else [])]
    assert [candidate.key for candidate in found] == keys
    assert [candidate.row for candidate in found] == list(range(len(keys)))
    assert (found[0].caption, found[1].caption, found[1].detailed) == ("late", "caption of a", "more")
    assert found[3].data == PHOTOS[5]


@pytest.mark.parametrize("damage", ["truncated", "compressed", "text", "header", "within"])
def test_damaged_tars(tmp_path, damage):
    data = made.tar([("a.jpg", PHOTOS[0]), ("b.jpg", PHOTOS[1])])
    second = 512 + -(-len(PHOTOS[0]) // 512) * 512
    data = {
        "truncated": data[: second + 100], "compressed": gzip.compress(data), "text": b"no tar " * 200,
        "header": data[:second] + b"?" + data[second + 1 :], "within": data[:900],
    }[damage]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DamagedInput):
        read("tars", tmp_path)


def test_sa1b_leaves_masks_out(tmp_path):
    files = [("./sa_1.jpg", PHOTOS[0]), ("./sa_1.json", b'{"caption": "no"}'), ("./sa_2.jpg", PHOTOS[1])]
    (tmp_path / "sa_000000.tar").write_bytes(made.tar(files))
    (tmp_path / "other.tar").write_bytes(made.tar([("a.jpg", PHOTOS[2])]))
    assert [(c.key, c.caption) for c in read("sa1b", tmp_path)] == [("sa_1", ""), ("sa_2", "")]


def test_journeydb_is_streamed_and_takes_its_lines(tmp_path):
    for archive in ("000", "001"):
        files = [(f"./{archive}/a.jpg", PHOTOS[0]), (f"./{archive}/b.jpg", PHOTOS[1])]
        (tmp_path / f"{archive}.tgz").write_bytes(made.tar(files, mode="w:gz"))
    lines = [
        {"img_path": f"./{n}/a.jpg", "prompt": f"prompt {n}", "Task2": {"Caption": "long"}} for n in ("000", "001")
    ]
    (tmp_path / "train_anno.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read("journeydb", tmp_path)
    assert [c.caption for c in found] == ["prompt 000", "", "prompt 001", ""]
    assert (found[0].detailed, found[0].offset, found[0].caption_kind) == ("long", -1, 0)
    (tmp_path / "001.tgz").write_bytes((tmp_path / "001.tgz").read_bytes()[:900])
    with pytest.raises(DamagedInput):
        read("journeydb", tmp_path)


def test_imagenet_in_its_three_forms(tmp_path):
    classes = {name: made.tar([(f"{name}_{i}.JPEG", PHOTOS[i]) for i in range(2)]) for name in ("n01", "n02")}
    keys = ["n01/n01_0", "n01/n01_1", "n02/n02_0", "n02/n02_1"]
    for form in ("classes", "one", "folders"):
        (tmp_path / form).mkdir()
    for name, data in classes.items():
        (tmp_path / "classes" / f"{name}.tar").write_bytes(data)
        (tmp_path / "folders" / name).mkdir()
        for i in range(2):
            (tmp_path / "folders" / name / f"{name}_{i}.JPEG").write_bytes(PHOTOS[i])
    (tmp_path / "one" / "train.tar").write_bytes(made.tar([(f"{name}.tar", data) for name, data in classes.items()]))
    for form in ("classes", "one", "folders"):
        assert [c.key for c in read("imagenet", tmp_path / form)] == keys, form


def test_folders_are_slices_of_directories(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(PHOTOS[i])
    (tmp_path / "0.txt").write_text("first")
    (tmp_path / "0.detailed.txt").write_text("longer")
    (tmp_path / "sub" / "x.png").write_bytes(PHOTOS[3])
    reader, source = READERS["folder"], Source(kind="folder", path=str(tmp_path))
    inputs = reader.list(source, len(PHOTOS[0]) + len(PHOTOS[1]))
    assert [given.part for given in inputs] == [("0.jpg", "1.jpg"), ("2.jpg", "2.jpg"), ("x.png", "x.png")]
    found = [candidate for given in inputs for candidate in reader.read(given)]
    assert [(c.row, c.key.split("/")[1], c.caption, c.detailed) for c in found[:2]] == [
        (0, "0", "first", "longer"),
        (1, "1", "", ""),
    ]
    assert found[3].data == PHOTOS[3]
    assert [reader.etag(given) for given in inputs] == [given.etag for given in inputs]
    (tmp_path / "1.jpg").write_bytes(PHOTOS[4])
    assert reader.etag(inputs[0]) != inputs[0].etag
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "sub/x.png", "caption": "of x"}))
    assert [c.caption for c in read("folder", tmp_path)] == ["", "", "", "of x"]


def test_parquet_of_images(tmp_path):
    images = [{"bytes": PHOTOS[0], "path": "a.jpg"}, {"bytes": PHOTOS[1], "path": None}]
    table = pa.table({"text": ["one", None], "image": images, "similarity": [0.3, np.nan]})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second = read("parquet", tmp_path)
    assert (first.key, first.caption, first.scores, first.offset) == ("a", "one", {"similarity": 0.3}, -1)
    assert (second.key, second.caption, second.scores) == ("1", "", {})
    parquet.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(DamagedInput, match="it has text"):
        read("parquet", tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is not all")
    with pytest.raises(DamagedInput):
        read("parquet", tmp_path)


def test_records_of_tfds_in_both_formats(tmp_path):
    records = [PHOTOS[0], example({"image": PHOTOS[1], "caption": b"of it"})]
    write_arrayrecord(tmp_path / "set-train.array_record-00000-of-00001", records)
    framed = b"".join(struct.pack("<QI", len(r), 0) + r + bytes(4) for r in records)
    (tmp_path / "set-test.tfrecord-00000-of-00001").write_bytes(framed)
    found = read("tfds", tmp_path)
    assert [(c.data, c.caption) for c in found] == [(PHOTOS[0], ""), (PHOTOS[1], "of it")] * 2
    assert [c.offset for c in found] == [-1, -1, 0, 1]
    (tmp_path / "set-test.tfrecord-00000-of-00001").write_bytes(framed[:-9])
    with pytest.raises(DamagedInput):
        read("tfds", tmp_path)
    (tmp_path / "set-train.array_record-00000-of-00001").rename(tmp_path / "set-train.array_record-00001-of-00003")
    with pytest.raises(ValueError, match=r"00000-of-00003 is missing \(2 of 3"):
        listed("tfds", tmp_path)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"source sa1b: no \*\*/sa_\*.tar at"):
        listed("sa1b", tmp_path)


def test_remote_tars_are_read_ahead():
    import fsspec

    data = made.tar([(f"{n}.jpg", PHOTOS[n % 6]) for n in range(9)])
    fsspec.filesystem("memory").pipe_file("/scan-test/0.tar", data)
    found = read("tars", "memory://scan-test")
    assert [c.data for c in found] == [PHOTOS[n % 6] for n in range(9)]
