"""The manifest of a prepared data set: written and read back, and what is refused."""

import dataclasses
import json

import pytest

from lumos_jax.data import manifest as manifests
from lumos_jax.data.manifest import EvaluationSet, Input, Manifest, Shard, SourceCounts, Tombstones


def example(**fields):
    return Manifest(**{
        "plan": "abc", "layout": "index", "records": 5, "captions": True,
        "inputs": (Input("/in/00000.tar", 100, "1", "web", "aa"), Input("s3://bucket/00001.tar", 90, '"e"', "web")),
        "shards": (Shard("/in/00000.tar", "tar", 3, 100, "aa", (0,)),
                   Shard("s3://bucket/00001.tar", "tar", 2, 90, None, (1,))),
        "settings": {"criteria": {"short_side": 256}}, "sources": {"web": SourceCounts(9, 5, {"blur": 4})},
        "evaluation_sets": (EvaluationSet("/eval", "bb", 7),),
        "failed_inputs": ({"path": "/in/2.tar", "problem": "truncated"},),
    } | fields)  # fmt: skip


def test_what_is_written_is_read_back(tmp_path):
    manifests.write_manifest(str(tmp_path), example())
    assert manifests.read_manifest(str(tmp_path)) == example()
    assert manifests.read_manifest(str(tmp_path)).digest() == example().digest()


def test_the_digest_is_of_all_but_the_tombstones():
    digest = example().digest()
    assert example(tombstones=Tombstones(3, 2)).digest() == digest
    first, second = example().shards
    for other in (
        example(shards=(dataclasses.replace(first, sha256="ab"), second)),
        example(shards=(second, first)),
        example(version=2),
        example(settings={"criteria": {"short_side": 128}}),
    ):
        assert other.digest() != digest


def test_what_is_no_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no manifest\.json.*has not finished"):
        manifests.read_manifest(str(tmp_path))
    path = tmp_path / "manifest.json"
    manifests.write_manifest(str(tmp_path), example())
    tree = json.loads(path.read_text())
    for changed, message in (
        ({"format": 99}, "format 99, and this version reads 1"),
        ({"records": 6}, "counts 6 records, its shards hold 5"),
        ({"shards": [{"path": "x"}]}, "lacks a field"),
        ({"unheard": 1}, "unknown one"),
    ):
        path.write_text(json.dumps(tree | changed))
        with pytest.raises(ValueError, match=message):
            manifests.read_manifest(str(tmp_path))
    path.write_text('{"format"')
    with pytest.raises(ValueError, match="not valid JSON"):
        manifests.read_manifest(str(tmp_path))
