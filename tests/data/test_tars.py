"""WebDataset shards: which files make a record, in which order, what is kept of a shard, and what is no shard."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from absl import logging
from PIL import Image

from lumos_jax import config, data
from lumos_jax.data import aspect, storage, tar_index
from lumos_jax.data.sources.webdataset import TarSource
from tests.fields import data_settings


def png(level):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (level,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    told = json.dumps({"caption": "told by  json", "detailed": "at length", "width": 9}).encode()
    first = [("b.png", png(10)), ("b.txt", b"raw\n b "), ("b.json", told), ("b.cls", b"3"),
             ("deep/a.PNG", png(20)), ("deep/a.json", told), ("lonely.txt", b"no picture")]  # fmt: skip
    second = [("x.0.txt", b"of another ending"), ("x.png", png(30)), ("x.detailed.txt", b"detailed x"), ("y.png", png(40)),
              ("z.json", b"[1"), ("z.png", b"no picture at all")]  # fmt: skip
    write_tar(tmp_path / "00000.tar", first)
    write_tar(tmp_path / "00001.tar", second)
    return tmp_path


def settings(path, **fields):
    return data_settings(**{"source": "webdataset", "path": str(path), "image_size": 8} | fields)


def test_files_of_one_stem_are_a_record(shards):
    source = data.make_source(settings(shards))
    assert [source.describe(i) for i in range(5)] == [
        f"{shards}/{name}" for name in ("00000.tar#b", "00000.tar#deep/a", "00001.tar#x", "00001.tar#y", "00001.tar#z")
    ]
    assert source.read(3) == png(40)
    assert [source.captions(i) for i in range(3)] == [
        ("raw b", "at length"), ("told by json", "at length"), ("", "detailed x"),
    ]  # fmt: skip
    again = pickle.loads(pickle.dumps(source))
    assert again.read(1) == png(20)
    assert again.fingerprint() == source.fingerprint() != TarSource(str(shards / "00000.tar")).fingerprint()


def test_batches_have_pictures_and_captions_and_name_what_has_none(shards):
    chosen = settings(shards, sample_type="captioned", captions__detailed_caption_prob=0.0)
    batch = data.read_batch(chosen, data.make_source(chosen), range(5))
    assert list(batch["caption"]) == ["raw b", "told by json", "detailed x", "", ""]
    assert list(batch["weight"]) == [1, 1, 1, 0, 0]
    assert list(batch["image"][:3, 0, 0, 0]) == [10, 20, 30]
    assert "00001.tar#y: no caption: there is no .txt of its name" in batch["problem"][3]
    assert "00001.tar#z: cannot identify image file" in batch["problem"][4]
    with pytest.raises(data.CorruptRecord, match=r"its \.json is none"):
        data.make_source(chosen).captions(4)


def test_order_is_that_of_any_source(shards):
    chosen = settings(shards, max_corrupt_rate=1.0, seed=3)
    source = data.make_source(chosen)

    def records(rows, start):
        batches = data.make_train_iterator(chosen, source, batch_size=4, rows=rows, start_step=start)
        found = [list(next(batches)["record"]) for _ in range(3)]
        batches.close()
        return found

    whole = records(range(4), 0)
    assert sorted(np.concatenate(whole)[:5]) == [0, 1, 2, 3, 4]
    assert records([1, 3], 1)[:2] == [row[1::2] for row in whole[1:]]


def names(source):
    return [source.describe(i).partition("#")[2] for i in range(len(source))]


def test_headers_are_read_once(shards, tmp_path, monkeypatch):
    kept = tmp_path / "index"
    source = TarSource(str(shards), kept)
    found = sorted(kept.rglob("*.index"))
    assert len(found) == 2
    monkeypatch.setattr(tar_index, "walk", None)  # not asked again
    tar_index._tables.clear()
    again = TarSource(str(shards), kept)
    assert names(again) == names(source) == ["b", "deep/a", "x", "y", "z"]
    assert again.captions(0) == source.captions(0)
    monkeypatch.undo()
    write_tar(shards / "00001.tar", [("n.png", png(50))])  # a changed shard is
    assert names(TarSource(str(shards), kept)) == ["b", "deep/a", "n"]
    assert len(TarSource(str(shards), shards / "00000.tar")) == 3  # no place for an index: only slower
    (file,) = set(kept.rglob("*.index")) - set(found)
    whole = file.read_bytes()
    for at in [*range(0, 150, 3), *range(512, len(whole), 3), None]:  # whatever byte is damaged, or cut off
        file.write_bytes(whole[:40] if at is None else whole[:at] + bytes([whole[at] ^ 9]) + whole[at + 1 :])
        tar_index._tables.clear()
        assert names(TarSource(str(shards), kept)) == ["b", "deep/a", "n"]
    file.write_bytes(whole)
    tar_index._tables.clear()
    monkeypatch.setattr(tar_index, "walk", None)  # and it is whole again
    TarSource(str(shards), kept)


LONG = "folder/" * 20 + "name " * 30


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(tmp_path, kind):
    members = [(f"{i:05}.png" if i % 3 else f"d/{i:05}.png", bytes([i]) * (i * 37)) for i in range(40)]
    if kind != tarfile.USTAR_FORMAT:
        members += [(f"{LONG}.png", b"long"), (f"{LONG}.txt", b"told"), ("\u00e9t\u00e9 \U0001f600.png", b"accents")]
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5
            tar.addfile(member, io.BytesIO(content))
        for kind_of_link in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind_of_link, "00001.png"
            tar.addfile(link)
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    entry = storage.stat(str(tmp_path / "a.tar"))
    assert [found for found in tar_index._members(entry) if found[2] >= 0] == expected
    source = TarSource(str(tmp_path))
    images = [content for name, content in members if name.endswith("png")]
    assert [source.read(i) for i in range(len(source))] == images
    if kind != tarfile.USTAR_FORMAT:
        assert source.captions(40) == ("told", "")


def test_many_shards_are_indexed_by_processes(tmp_path):
    for number in range(70):
        write_tar(tmp_path / f"{number:05}.tar", [(f"{number}.png", png(number)), (f"{number}.txt", b"x")])
    source = TarSource(str(tmp_path), tmp_path / "index")
    assert len(source) == len(list((tmp_path / "index").rglob("*.index"))) == 70
    assert source.read(33) == png(33)
    assert source.fingerprint() == TarSource(str(tmp_path)).fingerprint()


def test_a_bad_shard_of_many_is_left_out_and_named(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    for number in range(10):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.png", png(number))])
    (tmp_path / "4.tar").write_bytes(b"damaged" * 99)
    with pytest.raises(
        ValueError, match=r"4\.tar cannot be read .*1 such shards of 10; config.data.max_failed_shards=0\.05"
    ):
        TarSource(str(tmp_path), max_failed=0.05)
    source = data.make_source(settings(tmp_path, max_failed_shards=0.1))
    assert [source.read(i) for i in range(9)] == [png(i) for i in range(10) if i != 4]
    assert any("a shard is left out: " in line and "4.tar" in line for line in said)


def test_what_is_no_shard_is_named(shards):
    whole = (shards / "00001.tar").read_bytes()
    for content in (
        whole[:700],
        whole[: len(whole) // 1024 * 512],
        whole[:1024] + b"x" * 512 + whole[1536:],
        b"",
        b"text" * 999,
    ):
        (shards / "00001.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"00001\.tar cannot be read as \.tar: truncated, compressed"):
            TarSource(str(shards))
    (shards / "00001.tar").unlink()
    write_tar(shards / "z.tar", [("a.png", png(1))], "w:gz")
    with pytest.raises(ValueError, match=r"z\.tar cannot be read as \.tar"):
        TarSource(str(shards))
    with pytest.raises(ValueError, match=r"no \.tar shards there"):
        TarSource(str(shards / "*.none"))
    write_tar(shards / "z.tar", [("a.txt", b"x")])
    with pytest.raises(ValueError, match="hold no images"):
        TarSource(str(shards / "z.tar"))
    with pytest.raises(ValueError, match=r"source webdataset needs path"):
        data.make_source(config.Data(source="mixture", mixture=({"source": "webdataset", "weight": 1},)))


def test_buckets_take_sizes_from_the_headers(shards):
    chosen = settings(shards, sample_type="captioned", aspect_ratios=(0.5, 2.0))
    assert aspect.record_sizes(data.make_source(chosen))(0, 5).tolist() == [[9, 9]] * 4 + [[0, 0]]
