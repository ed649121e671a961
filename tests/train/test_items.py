"""Items of evaluation lists as host batches of each task."""

import numpy as np
import pytest
from PIL import Image

from configs import i2i, i2v, nvs, t2i
from configs.ablations import class_conditional, unconditional
from lumos_jax import data
from lumos_jax.config import io as config_io
from lumos_jax.data.sources.scenes import ScenesSource
from lumos_jax.evaluation import lists
from lumos_jax.evaluation.lists import Item, ItemList
from lumos_jax.tasks import media
from lumos_jax.train.experiment import Experiment
from lumos_jax.train.items import ItemReader


def experiment_of(configs, **changes):
    made = configs.get_config("test")
    for name, value in changes.items():
        made.data.clips[name] = value
    # No frozen network is needed to read records, but T2I's tokenizer is made with it.
    return Experiment.build(config_io.resolve(made), abstract=configs is not t2i, training=False)


def reader_of(experiment, *items):
    return ItemReader(experiment, experiment.task.sampling, ItemList("list", items))


@pytest.mark.parametrize(
    ("configs", "arrays", "paired"),
    [
        (i2i, {"image"}, True),
        (t2i, {"image", "tokens", "token_mask"}, False),
        (nvs, {"image", "input", "camera"}, True),
        (i2v, {"frames", "fps", "motion"}, True),
        (class_conditional, {"image", "label"}, False),
        (unconditional, {"image"}, False),
    ],
)
def test_every_task_reads_scenes_row_by_row(configs, arrays, paired):
    experiment = experiment_of(configs)
    read = reader_of(experiment, *lists.make_list("scenes", num=3).items)
    host, reference = read(np.array([2, 0, 2]))
    assert arrays <= set(host)
    assert read.paired == paired
    assert reference.shape[-3:] == (16, 16, 3)
    alone, reference_alone = read(np.array([0]))
    for name in arrays:
        np.testing.assert_array_equal(host[name][1], alone[name][0])
        np.testing.assert_array_equal(host[name][0], host[name][2])
    np.testing.assert_array_equal(reference[1], reference_alone[0])
    assert (reference[0] != reference[1]).any()
    if configs is i2i:
        np.testing.assert_array_equal(reference[0], ScenesSource(2**40, 16).read(lists.FIRST_SCENE + 2))


def test_conditions_without_records(tmp_path):
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    Image.new("RGB", (16, 16), (30, 30, 200)).save(tmp_path / "blue.png")
    red, blue = str(tmp_path / "red.png"), str(tmp_path / "blue.png")
    turned = {"image": red, "azimuth": 90.0, "elevation": 10.0, "target": blue}
    read = reader_of(experiment_of(nvs), Item("0", turned), Item("1", turned | {"azimuth": 0.0}))
    host, reference = read(np.array([0, 1]))
    np.testing.assert_allclose(host["camera"], [[-np.radians(10), 1, 0, 0], [-np.radians(10), 0, 1, 0]], atol=1e-7)
    assert reference[1, 8, 8].tolist() == [30, 30, 200]
    assert host["input"][1, 8, 8].tolist() == [200, 30, 30]
    host, _ = reader_of(experiment_of(class_conditional), Item("a", {"label": 3}))(np.array([0]))
    assert host["label"].tolist() == [3]
    host, _ = reader_of(experiment_of(t2i), Item("a", {"caption": "a red box"}))(np.array([0, 0]))
    assert host["token_mask"].sum(axis=1).tolist() == [4, 4]
    host, reference = reader_of(experiment_of(unconditional), Item("a"), Item("b"))(np.array([0, 1, 1]))
    assert len(host["row"]) == 3
    assert reference is None
    with pytest.raises(
        ValueError, match="item 'b' of list has label, and this run's task, nvs, needs azimuth and image"
    ):
        reader_of(experiment_of(nvs), Item("a", turned), Item("b", {"label": 1}))
    with pytest.raises(ValueError, match=r"gone\.png cannot be read"):
        reader_of(experiment_of(i2i), Item("a", {"image": str(tmp_path / "gone.png")}))


def test_clips_begin_at_the_frames_of_the_list(tmp_path):
    (tmp_path / "videos").mkdir()
    shades = np.arange(60, dtype=np.uint8) * 4
    for name, count in (("a", 60), ("b", 50), ("short", 45)):
        frames = np.broadcast_to(shades[:count, None, None, None], (count, 16, 16, 3))
        media.save_mp4(frames, tmp_path / "videos" / f"{name}.mp4", fps=24)
    made = lists.make_list("ucf101", str(tmp_path))
    items = made.items
    assert sorted(item.id for item in items) == ["a", "b"]
    experiment = experiment_of(i2v, frames=16, frame_stride=(3, 3))
    host, reference = ItemReader(experiment, experiment.task.sampling, made)(np.array([0, 1]))
    for row, item in enumerate(items):
        assert 0 <= item.extra["start"] <= {"a": 14, "b": 4}[item.id]
        wanted = shades[item.extra["start"] :][:46:3].astype(int)
        assert np.abs(reference[row, :, 8, 8, 0].astype(int) - wanted).max() <= 3
    np.testing.assert_array_equal(reference, host["frames"])
    np.testing.assert_allclose(host["fps"], 8)
    other = experiment_of(i2v)
    with pytest.raises(ValueError, match="this set is of 16 frames a clip, and this run's are of 4"):
        ItemReader(other, other.task.sampling, made)


def test_corrupt_records_are_named(tmp_path):
    for name in "abc":
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    made = i2i.get_config("test")
    made.data.source, made.data.path, made.data.holdout, made.eval.every = "folder", str(tmp_path), 0, 0
    experiment = Experiment.build(config_io.resolve(made), abstract=True, training=False)
    read = reader_of(experiment, *(Item(str(i), {"record": i}) for i in range(3)))
    (tmp_path / "c.png").write_bytes(b"no image")
    assert read(np.array([0, 1]))[1].shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match=r"c\.png"):
        read(np.array([1, 2]))
    assert isinstance(read.source, data.Source)
