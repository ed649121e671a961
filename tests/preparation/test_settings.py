"""Settings of preparation, the config file, and the schema of a scan."""

import runpy

import pytest

from lumos_jax.preparation import criteria, scan_rows, settings

CONFIG = "configs/prepare/web.py"


@pytest.fixture
def get_config(request):
    return runpy.run_path(str(request.config.rootpath / CONFIG))["get_config"]


def test_settings_survive_a_round_trip(get_config):
    tree = get_config("lumos,gs://bucket").to_dict()
    made = settings.from_dict(tree)
    assert [source.path for source in made.sources if source.kind == "sa1b"] == ["gs://bucket/sa1b"]
    assert settings.from_dict(settings.to_dict(made)) == made
    assert settings.from_dict(get_config().to_dict()) == settings.Prepare()
    with pytest.raises(ValueError, match="lumos,DIRECTORY"):
        get_config("lumos")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": {"min_aesthetics": 5.0}}, r"config\.criteria\.min_aesthetics; did you mean min_aesthetic"),
        ({"sources": [{"kind": "tar"}]}, r"config\.sources\[0\]\.kind='tar' is not one of"),
        ({"sources": [{"kind": "folder"}]}, "folder needs a path"),
        ({"sources": [{"kind": "folder", "path": "x", "pth": "y"}]}, r"config\.sources\[0\]\.pth"),
        ({"sources": [{"kind": "tars", "path": "x"}] * 2}, "several are named 'tars'"),
        ({"sources": [{"kind": "scenes"}, {"kind": "scenes", "name": "more"}]}, "one source of kind=scenes at most"),
        ({"sample": 0.0}, "config.sample=0.0 must be above 0"),
        ({"duplicates": {"phash_distance": 5}}, "at most 4"),
    ],
)
def test_wrong_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        settings.from_dict(changes)


def test_scores_are_compared_before_decoding_and_may_only_be_tightened_afterwards():
    limits = settings.Criteria()
    assert criteria.score_reason(limits, {"aesthetic": 4.7, "watermark": 0.9}) == "aesthetic"
    assert criteria.score_reason(limits, {"aesthetic": 4.75, "unsafe": float("nan")}) == ""
    assert criteria.score_reason(limits, {"unsafe": 0.51}) == "unsafe"
    tighter = settings.Criteria(min_aesthetic=5.0, short_side=64)
    assert criteria.loosened(limits, tighter) == []
    assert criteria.loosened(tighter, limits) == ["min_aesthetic"]
    assert criteria.loosened(limits, settings.Criteria(max_unsafe=0.6)) == ["max_unsafe"]


def test_rows_have_the_defaults_of_what_is_unknown():
    table = scan_rows.table(
        [{"input": 3, "row": 0, "sha256": b"\1" * 32, "reason": "aesthetic"}, {"input": 3, "row": 1}]
    )
    first, second = table.to_pylist()
    assert table.schema == scan_rows.schema()
    assert (first["offset"], first["phash_valid"], first["caption_kind"]) == (-1, False, scan_rows.NO_CAPTION)
    assert first["aesthetic"] != first["aesthetic"]
    assert second["sha256"] == bytes(32)
