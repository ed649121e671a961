"""Scores joined by url or key: found in whichever file they are, before an image is decoded."""

import math

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lumos_jax.preparation import joins
from lumos_jax.preparation.readers import Candidate
from lumos_jax.preparation.settings import Source

COUNT = 700


@pytest.fixture
def source(tmp_path):
    """LAION's columns in one file and COYO's in another; the first row of a url counts."""
    urls = [f"https://a.example/{i}?x=1.5" for i in range(COUNT)]
    half = COUNT // 2
    aesthetic = [None if i % 7 == 0 else i / 100 for i in range(half)]
    laion = {
        "URL": urls[:half],
        "aesthetic": aesthetic,
        "pwatermark": [0.25] * half,
        "KEY": [f"k{i}" for i in range(half)],
    }
    coyo = {"url": [urls[0], *urls[half:]], "aesthetic_score_laion_v2": [9.0, *np.arange(half, COUNT) / 100]}
    folder = tmp_path / "metadata"
    folder.mkdir()
    parquet.write_table(pa.table(laion), folder / "0.parquet")
    parquet.write_table(pa.table(coyo), folder / "1.parquet")
    return Source(kind="img2dataset", path=str(tmp_path), metadata=str(folder))


def found(out, source, **known):
    return joins.lookup(str(out), source)(Candidate(0, **{"key": "", "data": b""} | known))


def test_every_url_has_the_scores_of_its_row(source, tmp_path):
    lines = []
    joins.build(str(tmp_path / "out"), source, lines.append)
    assert lines == [f"metadata of img2dataset: {COUNT} by url"]
    for i in range(0, COUNT, 11):
        scores = found(tmp_path / "out", source, url=f"https://a.example/{i}?x=1.5")
        if i < COUNT // 2 and i % 7 == 0:
            assert math.isnan(scores["aesthetic"])
        else:
            assert scores["aesthetic"] == pytest.approx(i / 100)
        assert math.isnan(scores["watermark"]) == (i >= COUNT // 2)
    assert found(tmp_path / "out", source, url="https://b.example") == {}
    assert found(tmp_path / "out", source) == {}


def test_what_was_built_is_kept_and_changed_metadata_is_refused(source, tmp_path):
    joins.build(str(tmp_path / "out"), source, print)
    lines = []
    joins.build(str(tmp_path / "out"), source, lines.append)
    assert not lines
    parquet.write_table(pa.table({"url": ["x"]}), f"{source.metadata}/2.parquet")
    with pytest.raises(ValueError, match="metadata changed"):
        joins.build(str(tmp_path / "out"), source, print)


def test_a_missing_column_is_named(source, tmp_path):
    by_key = Source(kind="img2dataset", path=source.path, metadata=f"{source.metadata}/1.parquet", join="key")
    with pytest.raises(ValueError, match="no column key"):
        joins.build(str(tmp_path / "out"), by_key, print)
    by_key = Source(kind="img2dataset", path=source.path, metadata=f"{source.metadata}/0.parquet", join="key")
    joins.build(str(tmp_path / "out"), by_key, print)
    assert found(tmp_path / "out", by_key, key="k123")["aesthetic"] == pytest.approx(1.23)
