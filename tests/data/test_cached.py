"""The cache on disk: a record's bytes, the manifest, and reading it in the order of the source that it was made from."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from lumos_jax import config, data, fileio
from lumos_jax.config import io as config_io
from lumos_jax.data.sources import cached

LATENT, FEATURE = (4, 4, 8), (5, 6)


def record_of(number, dtype="float16"):
    """What a test's cache holds: numbers that name their record; every seventh is undecodable."""
    arrays = {
        "feature": np.full(FEATURE, number, cached.DTYPES[dtype]),
        "latent": np.arange(np.prod(LATENT)).reshape(LATENT).astype(cached.DTYPES[dtype])
        + cached.DTYPES[dtype].type(number),
    }
    bad = number % 7 == 3
    return cached.Record(number, 0.0 if bad else 1.0, f"{number}.jpg: empty" if bad else "", arrays)


def make_cache(directory, count=30, each=12, dtype="float16", parts=None):
    directory.mkdir(exist_ok=True)
    shards = []
    for shard, first in enumerate(range(0, count, each)):
        path = directory / cached.shard_name(shard, -(-count // each))
        records = [cached.encode_record(record_of(i, dtype)) for i in range(first, min(first + each, count))]
        shards.append((path.name, data.write_arrayrecord(path, records, compress=False), path.stat().st_size))
    arrays = {"feature": (dtype, FEATURE), "latent": (dtype, LATENT)}
    made = cached.Manifest({"encoder.identity": "x"}, arrays, count, 4, parts or ((count, 1.0),), tuple(shards))
    cached.write_manifest(directory, made)
    assert cached.read_manifest(str(directory)) == made
    return config.Data(source="cached", path=str(directory), image_size=32, holdout=3)


def steps(settings, count, *, rows=range(6), batch=6, start=0):
    source = data.make_source(settings)
    iterator = data.make_train_iterator(settings, source, batch_size=batch, rows=rows, start_step=start)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


@pytest.mark.parametrize("dtype", cached.DTYPES)
def test_a_record_comes_back_bit_for_bit(dtype):
    rng = np.random.default_rng(0)
    arrays = {
        "latent": rng.normal(size=(3, 2, 8)).astype(cached.DTYPES[dtype]),
        "image": rng.integers(0, 256, (5, 5, 3), np.uint8),
        "scalar": np.array(1.5, np.float32),
    }
    data_ = cached.encode_record(cached.Record(2**40 + 1, 0.0, "bild\u00e4.jpg: empty", arrays))
    again = cached.decode_record(data_)
    assert (again.number, again.weight, again.problem) == (2**40 + 1, 0.0, "bild\u00e4.jpg: empty")
    assert list(again.arrays) == list(arrays)
    for name, array in arrays.items():
        assert again.arrays[name].dtype == array.dtype
        assert np.array_equal(again.arrays[name], array)
    assert len(data_) < sum(a.nbytes for a in arrays.values()) + 120


def test_damaged_records_are_refused_wherever_they_end():
    whole = cached.encode_record(record_of(3))
    for end in range(len(whole)):
        with pytest.raises(ValueError, match="no record of a cache"):
            cached.decode_record(whole[:end])
    with pytest.raises(ValueError, match="1 bytes too many"):
        cached.decode_record(whole + b"x")
    with pytest.raises(ValueError, match="no record of a cache"):
        cached.decode_record(b"\xff\xd8\xff" + whole)


@pytest.mark.parametrize(("workers", "dtype"), [(0, "float16"), (1, "bfloat16")])
def test_batches_hold_what_was_cached_in_the_order_of_the_source(tmp_path, workers, dtype):
    settings = dataclasses.replace(make_cache(tmp_path / "cache", dtype=dtype), workers=workers)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(30):
        Image.new("L", (4, 4), i).save(pictures / f"{i:02}.png")
    online = dataclasses.replace(settings, source="folder", path=str(pictures), image_size=4, workers=0)
    held = data.holdout_records(settings, data.make_source(settings))
    assert held == data.holdout_records(online, data.make_source(online))
    for ours, theirs in zip(steps(settings, 10, start=2), steps(online, 10, start=2), strict=True):
        assert np.array_equal(ours["record"], theirs["record"])
        assert set(ours) == {"latent", "feature", "weight", "record", "problem"}
        assert ours["latent"].shape == (6, *LATENT)
        for row, number in enumerate(ours["record"]):
            expected = record_of(number, dtype)
            assert ours["weight"][row] == expected.weight
            assert ours["problem"][row] == expected.problem
            for name, array in expected.arrays.items():
                assert ours[name].dtype == array.dtype
                assert np.array_equal(ours[name][row], array)


def test_a_cached_mixture_is_mixed_as_its_sources_are(tmp_path):
    entries = []
    for name, count, weight in (("a", 8, 3.0), ("b", 22, 1.0)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (4, 4), i).save(tmp_path / name / f"{i:02}.png")
        entries.append({"source": "folder", "path": str(tmp_path / name), "weight": weight})
    online = config.Data(source="mixture", mixture=tuple(entries), image_size=4, holdout=4)
    settings = make_cache(tmp_path / "cache", parts=((8, 3.0), (22, 1.0)))
    settings = dataclasses.replace(settings, holdout=4)
    source = data.make_source(settings)
    assert data.holdout_records(settings, source) == data.holdout_records(online, data.make_source(online))
    for ours, theirs in zip(steps(settings, 8), steps(online, 8), strict=True):
        assert np.array_equal(ours["record"], theirs["record"])
        good = ours["weight"] > 0
        assert good.any()
        assert np.array_equal(ours["feature"][good, 0, 0], ours["record"][good])


def test_sources_are_picklable_and_name_their_records(tmp_path):
    source = data.make_source(make_cache(tmp_path))
    again = pickle.loads(pickle.dumps(source))
    assert cached.decode_record(again.read(13)).number == 13
    assert again.describe(13) == f"{tmp_path}/shard-00001-of-00003.arrayrecord#1"
    assert again.fingerprint() == source.fingerprint()
    other = data.make_source(make_cache(tmp_path / "other", dtype="float32"))
    assert other.fingerprint() != source.fingerprint()


def test_a_record_that_was_damaged_later_has_weight_0(tmp_path):
    settings = make_cache(tmp_path)
    path = tmp_path / cached.shard_name(1, 3)
    content = bytearray(path.read_bytes())
    where = bytes(content).index(b"LMC1" + (14).to_bytes(8, "little"))
    content[where + 120] ^= 1
    path.write_bytes(content)
    batch = data.read_batch(settings, data.make_source(settings), [13, 14, 15])
    assert list(batch["weight"]) == [1, 0, 1]
    assert f"{path}#2: shard damaged" in batch["problem"][1]


def test_caches_that_are_not_whole_are_refused_by_name(tmp_path):
    settings = make_cache(tmp_path / "cache")
    first, second = (tmp_path / "cache" / cached.shard_name(i, 3) for i in range(2))
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"shard-00000-of-00003.* has \d+ bytes, not \d+. .*run the command that makes it"
    ):
        data.make_source(settings)
    first.write_bytes(whole[:-64] + bytes(64))  # as long, and not itself
    source_or_error = second.read_bytes()
    second.write_bytes(bytes(len(source_or_error)))
    with pytest.raises(ValueError, match=r"00001-of-00003.* does not hold 12 records"):
        data.make_source(settings)
    second.unlink()
    with pytest.raises(ValueError, match=r"shard-00001-of-00003\.arrayrecord is missing"):
        data.make_source(settings)
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json: no cache is there"):
        data.make_source(settings)
    fileio.save_json({"format": 1}, tmp_path / "cache" / "plan.json")
    with pytest.raises(
        ValueError, match=r"no manifest\.json: this cache is not finished; run the command that makes it"
    ):
        data.make_source(settings)
    (tmp_path / "cache" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        data.make_source(settings)
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(ValueError, match="has format 9, and this version reads 1"):
        data.make_source(settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs config.data.path"),
        ({"path": "x", "crop": "random"}, "crop=random, flip=False do not go with"),
        ({"path": "x", "flip": True}, "holds one center crop"),
    ],
)
def test_settings_that_a_cache_cannot_serve_are_refused(fields, message):
    tree = config_io.to_dict(config.Settings())
    tree["data"] |= {"source": "cached", **fields}
    with pytest.raises(ValueError, match=message):
        config_io.from_dict(tree)


def test_a_cache_is_no_part_of_a_mixture(tmp_path):
    settings = config.Data(source="mixture", mixture=({"source": "cached", "path": str(tmp_path), "weight": 1.0},))
    with pytest.raises(ValueError, match="cache the mixture as a whole"):
        data.make_source(settings)
