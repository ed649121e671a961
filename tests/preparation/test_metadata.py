"""Scores of metadata files, joined by url or key."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from lumos_jax.preparation import engines, metadata, plan, scan, settings
from tests.preparation import collections_of as made

PHOTOS = [made.photo(number, (24, 32)) for number in range(4)]


def gathered(out, source):
    planned = plan.make(str(out), settings.Prepare(sources=(source,)), lambda _: None)
    for task, numbers in ((metadata.split_task, metadata.split_tasks), (metadata.merge_task, metadata.merge_tasks)):
        engines.run(task, str(out), numbers(planned), engines.How(), lambda: 0, "metadata")
    assert metadata.complete(str(out), planned)
    return planned


@pytest.mark.parametrize("join", ["url", "key"])
def test_scores_of_several_files_reach_their_images_before_these_are_decoded(tmp_path, join):
    files = []
    for number, data in enumerate(PHOTOS):
        files += [(f"{number}.jpg", data), (f"{number}.json", json.dumps({"url": f"https://{number}"}).encode())]
    (tmp_path / "a.tar").write_bytes(made.tar(files))
    (tmp_path / "meta").mkdir()
    column = "URL" if join == "url" else "key"
    names = [f"https://{number}" if join == "url" else str(number) for number in range(4)]
    others = [f"other {number}" for number in range(500)]
    first = {column: [*others, names[0], names[1], None], "AESTHETIC": [1.0] * 500 + [6.0, 3.0, 1.0]}
    second = {column: [names[1], names[2]], "aesthetic_score_laion_v2": [6.0, None], "pwatermark": [0.0, 0.75]}
    parquet.write_table(pa.table(first), tmp_path / "meta" / "0.parquet")
    parquet.write_table(pa.table(second), tmp_path / "meta" / "1.parquet")
    source = settings.Source(kind="tars", path=str(tmp_path / "a.tar"), metadata=str(tmp_path / "meta"), join=join)
    out = tmp_path / "out"
    gathered(out, source)
    scan.run_task(str(out), 0)
    rows = parquet.read_table(scan.path(str(out), 0)).to_pylist()
    assert [row["reason"] for row in rows] == ["", "aesthetic", "watermark", ""]
    assert [row["aesthetic"] for row in rows[:2]] == [6.0, 3.0]  # of 1, the first file counts
    assert rows[2]["aesthetic"] != rows[2]["aesthetic"]
    assert [row["height"] > 0 for row in rows] == [True, False, False, True]


def test_what_is_wrong_with_metadata_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(made.tar([("0.jpg", PHOTOS[0])]))
    source = settings.Source(kind="tars", path=str(tmp_path / "a.tar"), metadata=str(tmp_path / "meta.parquet"))
    with pytest.raises(ValueError, match="source tars: no parquet files at metadata="):
        gathered(tmp_path / "out", source)
    parquet.write_table(pa.table({"link": ["a"]}), tmp_path / "meta.parquet")
    with pytest.raises(ValueError, match=r"meta\.parquet has no column for join=url: \['link'\]"):
        gathered(tmp_path / "out", source)
    (tmp_path / "meta.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"meta\.parquet changed since it was planned"):
        metadata.split_task(str(tmp_path / "out"), 0)
    with pytest.raises(ValueError, match="not gathered"):
        scan.run_task(str(tmp_path / "out"), 0)
