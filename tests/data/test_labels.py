"""Labelled records: folders, scenes and mixtures, and what has no labels."""

import pickle

import numpy as np
import pytest
from PIL import Image

from lumos_jax import data
from lumos_jax.data.sources import cached
from lumos_jax.data.sources.scenes import ScenesSource
from lumos_jax.scenes import scene as scenes
from tests.fields import data_settings


@pytest.fixture
def folder(tmp_path):
    for name in ("wolf/1.png", "ant/b/2.png", "ant/1.png", "yak/9.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (10 * len(name), 0, 0)).save(tmp_path / name)
    return tmp_path


def settings(**more):
    return data_settings(**{"sample_type": "labeled", "image_size": 8, **more})


def test_folders_are_classes_in_sorted_order(folder):
    given = settings(source="folder", path=str(folder), num_classes=3)
    source = pickle.loads(pickle.dumps(data.make_source(given)))
    batch = data.read_batch(given, source, range(4))
    assert tuple(source.classes) == ("ant", "wolf", "yak")
    assert batch["label"].dtype == np.int32
    assert list(batch["label"]) == [0, 0, 1, 2]
    assert list(batch["image"][:, 0, 0, 0]) == [90, 110, 100, 90]


def test_scenes_are_labeled_by_their_largest_solid():
    given = settings(source="scenes", scenes__num_scenes=50, num_classes=40)
    source = data.make_source(given)
    truth = data.truth_of(source, range(50))
    labels = data.read_batch(given, source, range(50))["label"]
    np.testing.assert_array_equal(labels, truth["shape"] * len(scenes.COLORS) + truth["colour"])
    assert source.classes[labels[0]] in scenes.captions(scenes.make_scene(0))[0]


def test_scenes_of_records_are_those_that_the_source_renders(folder):
    source = ScenesSource(50, 16, seed=4)
    (scene,) = data.scenes_of(source, np.array([7]))
    assert scene == scenes.make_scene(7, seed=4)
    given = settings(source="folder", path=str(folder), num_classes=3)
    with pytest.raises(ValueError, match=r"records of a FolderSource are no scenes.*must be scenes"):
        data.scenes_of(data.make_source(given), [0])


def test_what_does_not_fit_is_refused(folder):
    wrong = settings(source="folder", path=str(folder), num_classes=4)
    with pytest.raises(ValueError, match=r"classes=4, but the source has 3 \(ant, wolf, yak"):
        data.make_loader(wrong, data.make_source(wrong), training=True)
    part = {"source": "folder", "path": str(folder), "weight": 1.0}
    mixed = settings(
        source="mixture", mixture=(part, {"source": "scenes", "num_scenes": 9, "weight": 1.0}), num_classes=3
    )
    with pytest.raises(ValueError, match="other classes"):
        data.make_loader(mixed, data.make_source(mixed), training=True)
    twice = settings(source="mixture", mixture=(part, part), num_classes=3)
    assert list(data.read_batch(twice, data.make_source(twice), [3, 4, 7])["label"]) == [2, 0, 2]
    data.write_arrayrecord(folder / "a.arrayrecord", [b"x"])
    bare = settings(source="arrayrecord", path=str(folder), num_classes=3)
    with pytest.raises(ValueError, match="have no labels"):
        data.make_loader(bare, data.make_source(bare), training=True)
    Image.new("RGB", (9, 9)).save(folder / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png is in no folder of a class"):
        data.make_loader(wrong, data.make_source(wrong), training=True)


def test_a_cached_label_is_the_one_that_was_read():
    arrays = {"image": np.zeros((2, 2, 3), np.uint8), "label": np.array(37, np.int32)}
    back = cached.decode_record(cached.encode_record(cached.Record(5, 1.0, "", arrays)))
    assert (back.number, back.arrays["label"].dtype, back.arrays["label"].shape) == (5, np.int32, ())
    assert back.arrays["label"] == 37
