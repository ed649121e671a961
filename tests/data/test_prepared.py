"""Prepared data sets: compacted shards and indices over original ones, on disk and behind URLs; tombstones; order."""

import dataclasses
import io
import json
import pickle
import tarfile
import uuid

import numpy as np
import pytest
from PIL import Image

from lumos_jax import config, data
from lumos_jax.data import aspect, order, storage
from lumos_jax.data import manifest as manifests
from lumos_jax.data.manifest import Manifest, Shard, Tombstones
from tests.fields import data_settings

COUNT = 24  # records, of the shades 10 n


def image(number, height=12, width=12):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (number * 10,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def size(number):
    return (12, 24) if number % 3 == 0 else (12, 12)


def put(path, array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    storage.write_whole(path, buffer.getvalue())


def add_tombstones(base, records):
    put(storage.join(base, manifests.TOMBSTONES), np.array(sorted(records), np.uint64))
    before = manifests.read_manifest(base)
    stones = Tombstones(before.tombstones.version + 1, len(records))
    manifests.write_manifest(base, dataclasses.replace(before, tombstones=stones))


def finish(base, layout, shards, captions):
    put(storage.join(base, manifests.SIZES), np.array([size(n) for n in range(COUNT)], np.uint16))
    manifests.write_manifest(base, Manifest("plan", layout, COUNT, captions, (), tuple(shards)))
    return base


def make_index(base, originals):
    """Two .tar files of which every second picture is a record, with its caption in a .txt or a .json."""
    rows, shards = [], []
    for number in range(2):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for n in range(COUNT // 2 * number, COUNT // 2 * (number + 1)):
                text, kind = (
                    (f"shade {n}".encode(), ".txt"),
                    (json.dumps({"caption": f"shade {n}"}).encode(), ".json"),
                )[n % 2]
                for name, content in (
                    ("rejected.jpg", b"x" * 999),
                    (f"{n}.png", image(n, *size(n))),
                    (f"{n}{kind}", text),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                rows.append([len(image(n, *size(n))), len(text), manifests.CAPTION_KINDS.index(kind)])
        content = buffer.getvalue()
        path = storage.join(originals, f"{number:05}.tar")
        storage.write_whole(path, content)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            kept = [member.offset_data for member in tar if member.name != "rejected.jpg"]
        for row, place in zip(rows[-COUNT // 2 :], np.reshape(kept, (-1, 2)), strict=True):
            row += list(map(int, place))
        shards.append(Shard(path, "tar", COUNT // 2, len(content)))
    lengths, caption_lengths, kinds, offsets, caption_offsets = zip(*rows, strict=True)
    arrays = {
        "offsets": np.array(offsets, np.uint64), "lengths": np.array(lengths, np.uint32),
        "caption_kinds": np.array(kinds, np.uint8), "caption_offsets": np.array(caption_offsets, np.uint64),
        "caption_lengths": np.array(caption_lengths, np.uint32),
    }  # fmt: skip
    for name, array in arrays.items():
        put(storage.join(base, "index", f"{name}.npy"), array)
    return finish(base, "index", shards, captions=True)


def make_compacted(base, folder):
    """Shards of 10 records; written locally and taken to `base`."""
    shards = []
    for first in range(0, COUNT, 10):
        name = f"data/shard-{first:05}.arrayrecord"
        count = data.write_arrayrecord(
            folder / "shard", [image(n, *size(n)) for n in range(first, min(first + 10, COUNT))]
        )
        content = (folder / "shard").read_bytes()
        storage.write_whole(storage.join(base, name), content)
        shards.append(Shard(name, "arrayrecord", count, len(content)))
    return finish(base, "arrayrecord", shards, captions=False)


def make_numbered(base, folder):
    """An index over records of an ArrayRecord shard that holds twice as many."""
    records = (image(n // 2, *size(n // 2)) if n % 2 else b"rejected" for n in range(2 * COUNT))
    data.write_arrayrecord(folder / "all", records, compress=False)
    content, path = (folder / "all").read_bytes(), storage.join(base, "all.arrayrecord")
    storage.write_whole(path, content)
    put(storage.join(base, "index", "offsets.npy"), np.arange(1, 2 * COUNT, 2, dtype=np.uint64))
    put(storage.join(base, "index", "lengths.npy"), np.zeros(COUNT, np.uint32))
    return finish(base, "index", [Shard(path, "arrayrecord", COUNT, len(content))], captions=False)


@pytest.fixture(params=["index", "remote index", "compacted", "remote compacted", "numbered", "remote numbered"])
def prepared(request, tmp_path, monkeypatch):
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path / "cache"))
    base = f"memory://{uuid.uuid4().hex}" if "remote" in request.param else str(tmp_path)
    kind = request.param.split()[-1]
    if kind == "index":
        return make_index(storage.join(base, "set"), storage.join(base, "originals"))
    return {"compacted": make_compacted, "numbered": make_numbered}[kind](storage.join(base, "set"), tmp_path)


def settings(path, **fields):
    return data_settings(source="prepared", path=path, **{"image_size": 8} | fields)


def test_batches_hold_every_record_on_any_number_of_hosts(prepared):
    for chosen in (settings(prepared, holdout=2), settings(prepared, order="block", block_records=4, block_window=2)):
        source = data.make_source(chosen)
        assert len(source) == COUNT
        assert len(pickle.loads(pickle.dumps(source))) == COUNT
        seen, expected = [], order.training_order(chosen, source, 6)
        for rows in (range(2), range(2, 6)):
            batches = data.make_train_iterator(chosen, source, batch_size=6, rows=rows, start_step=0)
            for step in range(5):
                batch = next(batches)
                assert list(batch["record"]) == [expected(step * 6 + row) for row in rows]
                assert np.abs(batch["image"].mean((1, 2, 3)) - 10 * batch["record"]).max() < 2
                assert batch["weight"].all()
                seen.extend(batch["record"])
            batches.close()
        assert len(set(seen)) == COUNT - chosen.holdout


def test_tombstones_have_no_weight_and_leave_the_order(prepared):
    chosen = settings(prepared)
    before = data.make_source(chosen)
    add_tombstones(prepared, [3, 17])
    source = data.make_source(chosen)
    assert source.fingerprint() == before.fingerprint()  # runs resume
    expected, positions = (order.training_order(chosen, one) for one in (before, source))
    assert [positions(i) for i in range(2 * COUNT)] == [expected(i) for i in range(2 * COUNT)]
    batch, meter = data.read_batch(chosen, source, range(COUNT)), data.CorruptMeter(0.0)
    assert list(np.flatnonzero(batch["weight"] == 0)) == [3, 17]
    assert not batch["image"][[3, 17]].any()
    for _ in range(20):
        assert meter.add(batch) == []
    assert meter.counts() == {"corrupt_records": 0, "tombstoned_records": 40}
    assert data.CorruptMeter(0.0, meter.state()).counts() == meter.counts()
    add_tombstones(prepared, [3, 17, 20])
    assert data.make_source(chosen).fingerprint() == before.fingerprint()
    assert list(np.flatnonzero(data.read_batch(chosen, data.make_source(chosen), range(COUNT))["weight"] == 0)) == [
        3,
        17,
        20,
    ]


def test_captions_and_buckets_come_from_the_index(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path / "cache"))
    for base in (str(tmp_path), f"memory://{uuid.uuid4().hex}"):
        made = make_index(storage.join(base, "set"), storage.join(base, "originals"))
        add_tombstones(made, [5])
        chosen = settings(made, sample_type="captioned", aspect_ratios=(0.5, 2.0), image_size=16)
        source = data.make_source(chosen)
        monkeypatch.setattr(type(source), "open_image", None)  # sizes are known
        batches, shapes = data.make_train_iterator(chosen, source, batch_size=4, rows=range(4), start_step=0), set()
        for _ in range(12):
            batch = next(batches)
            good = batch["weight"] > 0
            assert list(batch["record"][~good]) == [5] * (~good).sum()
            assert list(batch["caption"][good]) == [f"shade {n}" for n in batch["record"][good]]
            shapes.add(batch["image"].shape[1:3])
        batches.close()
        assert len(shapes) == 2
        assert aspect.assign(chosen, source, 1)[0] == 0


def test_a_part_of_a_mixture(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path / "cache"))
    here, there = str(tmp_path), f"memory://{uuid.uuid4().hex}"
    parts = [
        {
            "source": "prepared",
            "path": make_index(storage.join(base, "set"), storage.join(base, "in")),
            "weight": weight,
        }
        for base, weight in ((here, 1.0), (there, 3.0))
    ]
    mixture = data_settings(
        source="mixture", mixture=(*parts, {"source": "scenes", "num_scenes": 9, "weight": 4.0}), image_size=8
    )
    add_tombstones(parts[1]["path"], [0])
    for chosen in (mixture, config.replace(mixture, {"order": "block", "block_records": 4, "block_window": 2})):
        source = data.make_source(chosen)
        assert source.remote
        batches = data.make_train_iterator(chosen, source, batch_size=8, rows=range(8), start_step=0)
        for _ in range(6):
            batch = next(batches)
            files = batch["record"] < 2 * COUNT
            assert files.sum() == 4
            alive = files & (batch["record"] != COUNT)
            shades = batch["record"][alive] % COUNT
            assert np.abs(batch["image"][alive].mean((1, 2, 3)) - 10 * shades).max() < 2
            assert list(batch["weight"]) == [float(record != COUNT) for record in batch["record"]]
        batches.close()


def test_blocks_behind_urls_are_read_whole_and_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path / "cache"))
    made = make_index(f"memory://{uuid.uuid4().hex}/set", f"memory://{uuid.uuid4().hex}")
    read, requests = storage.read, []
    monkeypatch.setattr(storage, "read", lambda *where: requests.append(where) or read(*where))
    chosen = settings(made, order="block", block_records=4, block_window=3, sample_type="captioned")
    source, seen = data.make_source(chosen), []
    for rows in (range(3), range(3, 6)):  # two hosts, an epoch
        batches = data.make_train_iterator(chosen, source, batch_size=6, rows=rows, start_step=0)
        for _ in range(4):
            batch = next(batches)
            assert list(batch["caption"]) == [f"shade {n}" for n in batch["record"]]
            seen.extend(batch["record"])
        batches.close()
        # There are six blocks of images with captions, and those of the next epoch are the same.
        assert 2 <= len([where for where in requests if ".tar" in where[0]]) <= 6
        requests.clear()
    assert sorted(seen) == list(range(COUNT))


def test_missing_shards_are_corrupt_records_and_wrong_arrays_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path / "cache"))
    made = make_index(str(tmp_path / "set"), str(tmp_path / "originals"))
    (tmp_path / "originals" / "00001.tar").unlink()
    source = data.make_source(settings(made))  # no shard is opened
    batch = data.read_batch(settings(made), source, range(COUNT))
    assert list(batch["weight"]) == [1.0] * (COUNT // 2) + [0.0] * (COUNT // 2)
    assert "00001.tar#0: " in batch["problem"][COUNT // 2]
    put(str(tmp_path / "set" / "sizes.npy"), np.zeros((3, 2), np.uint16))
    with pytest.raises(ValueError, match=r"sizes\.npy has 3 entries, the manifest 24 records"):
        data.make_source(settings(made))
    (tmp_path / "set" / "sizes.npy").unlink()
    with pytest.raises(ValueError, match=r"sizes\.npy is missing or damaged"):
        data.make_source(settings(made))
    with pytest.raises(ValueError, match="has no captions"):
        data.make_source(settings(make_compacted(str(tmp_path / "other"), tmp_path), sample_type="captioned"))
    with pytest.raises(ValueError, match=r"config\.data\.mixture\[0\]: source prepared needs path"):
        data.make_source(data_settings(source="mixture", mixture=({"source": "prepared", "weight": 1.0},)))
