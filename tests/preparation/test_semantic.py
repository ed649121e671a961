"""Near-duplicates by cached features: rows are found by sha256, and those alone whose features are close are dropped."""

import dataclasses
import pathlib

import numpy as np
import pytest

from lumos_jax import data
from lumos_jax.data.sources import cached
from lumos_jax.preparation import record_files, select, selection, write
from lumos_jax.preparation.settings import Duplicates, Write
from tests.fields import replace
from tests.preparation import scans


def write_cache(folder: pathlib.Path, features: np.ndarray, each: int = 50) -> None:
    """As `prepare cache` writes one of features (N, 1, C)."""
    folder.mkdir()
    count, shards = -(-len(features) // each), []
    for shard in range(count):
        numbers = range(shard * each, min((shard + 1) * each, len(features)))
        records = [cached.Record(i, 1.0, "", {"feature": features[i].astype(np.float16)}) for i in numbers]
        path = folder / cached.shard_name(shard, count)
        data.write_arrayrecord(path, map(cached.encode_record, records), compress=False)
        shards.append((path.name, len(records), path.stat().st_size))
    arrays = {"feature": ("float16", features.shape[1:])}
    cached.write_manifest(folder, cached.Manifest({}, arrays, len(features), 0, ((len(features), 1.0),), tuple(shards)))


@pytest.mark.parametrize("workers", [1])
def test_close_features_are_duplicates(tmp_path, workers):
    rng = np.random.default_rng(0)
    rows = [scans.random_row(rng) for _ in range(240)]
    wanted = scans.settings(tmp_path, "a", write=Write(layout="index"))
    out = scans.write(tmp_path, wanted, [("a", rows[:100]), ("a", rows[100:])])
    select.run(out, wanted, say=scans.silent)
    for number in write.tasks(out, wanted):
        write.run_task(out, number)
    made = write.finish(out, scans.silent)
    features = rng.normal(size=(made.records, 1, 16))
    features[200:] = features[:40] * rng.uniform(1, 9, (40, 1, 1)) + rng.normal(size=(40, 1, 16)) * 0.02
    write_cache(tmp_path / "cache", features)

    other = tmp_path / "again"  # the same images, in other files and another order, and some that were not cached
    order = rng.permutation(240)
    more = [scans.random_row(rng) for _ in range(30)]
    shuffled = [rows[i] for i in order]
    asked = Duplicates(embeddings=str(tmp_path / "cache"), embeddings_set=out, min_cosine=0.97, partitions=4)
    again = scans.settings(other, "a", duplicates=asked)
    there = scans.write(other, again, [("a", shuffled[:150] + more), ("a", shuffled[150:])])
    found = select.run(there, again, workers, scans.silent)
    assert found.sources["a"].reasons == {"semantic_duplicate": 40}
    kept = {rows_of["sha256"] for task, given in enumerate((shuffled[:150] + more, shuffled[150:]))
            for rows_of in (given[i] for i in selection.kept(there, found.digest, task))}  # fmt: skip
    for i in range(40):  # of each pair one, the larger image
        pair = sorted((rows[i], rows[200 + i]), key=lambda row: -row["height"] * row["width"])
        assert pair[0]["height"] * pair[0]["width"] == pair[1]["height"] * pair[1]["width"] or pair[0]["sha256"] in kept
        assert len({row["sha256"] for row in pair} & kept) == 1
    assert {row["sha256"] for row in rows[40:200] + more} <= kept

    write_cache(tmp_path / "short", features[:100])
    with pytest.raises(ValueError, match=r"short has 100 records, and embeddings_set=.* 240"):
        select.run(there, replace(again, duplicates__embeddings=str(tmp_path / "short")), say=scans.silent)
    write_cache(tmp_path / "patches", features.repeat(2, 1))
    with pytest.raises(ValueError, match=r"holds features of shape \(2, 16\): cache one token an image"):
        select.run(there, replace(again, duplicates__embeddings=str(tmp_path / "patches")), say=scans.silent)
    assert dataclasses.replace(asked, embeddings_set="").check()
    assert record_files.count_tasks(record_files.directory(out, made.build)) == 2
