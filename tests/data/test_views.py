"""Posed views: cameras by hand-computed geometry, pairs of scenes and of rendered objects, and what is wrong with folders."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from lumos_jax import data
from lumos_jax.data import CorruptRecord, cameras
from lumos_jax.data.sources import objaverse
from lumos_jax.data.sources.scenes import ScenesSource
from lumos_jax.scenes import render as scene_render
from lumos_jax.scenes import scene as scenes
from tests.fields import data_settings

SIZE = 12


def matrix(azimuth, polar, radius):
    return scene_render.camera_matrix(scenes.Camera(math.radians(azimuth), math.radians(polar), radius))


def write_object(folder, cameras_, index=0, size=24):
    """An object as Objaverse's renderer leaves it: RGBA, transparent above, and float32 matrices."""
    folder.mkdir(parents=True)
    scene = scenes.make_scene(index)
    for number, camera in enumerate(cameras_):
        rgb = scene_render.render(scene, size, camera=camera)
        alpha = np.full((size, size, 1), 255, np.uint8)
        alpha[: size // 2] = 0
        Image.fromarray(np.concatenate([rgb, alpha], axis=2)).save(folder / f"{number:03}.png")
        np.save(folder / f"{number:03}.npy", scene_render.camera_matrix(camera).astype(np.float32))


@pytest.fixture
def renders(tmp_path):
    """Three objects of 2, 3 and 5 views."""
    for index, count in enumerate((2, 3, 5)):
        around = [scenes.Camera(0.3 + i, 1.0 + 0.1 * i, 1.5 + 0.1 * i) for i in range(count)]
        write_object(tmp_path / f"object{index}", around, index)
    return tmp_path


def settings(source, **fields):
    return data_settings(source=source, sample_type="views", image_size=SIZE, **fields)


def read(path, records):
    chosen = settings("objaverse", path=str(path))
    return data.read_batch(chosen, data.make_source(chosen), records)


def test_relative_camera_by_hand():
    # From (1, 0, 0), level, to (0, 2, 0), level: a quarter turn counter-clockwise, and one further away.
    np.testing.assert_allclose(cameras.relative_camera(matrix(90, 90, 2), matrix(0, 90, 1)), [0, 1, 0, 1], atol=1e-6)
    # Thirty degrees up, over the seam of the azimuth, and nearer: polar falls.
    got = cameras.relative_camera(matrix(10, 60, 1.5), matrix(350, 90, 2))
    turn = math.radians(20)
    np.testing.assert_allclose(got, [-math.pi / 6, math.sin(turn), math.cos(turn), -0.5], atol=1e-6)
    # A camera written out: at (0, 0, 3), looking down, its right along +Y. The centre is -R^T t, not t.
    above = np.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 3]])
    np.testing.assert_allclose(cameras.spherical(cameras.check_matrix(above))[1:], [0, 3], atol=1e-12)
    assert cameras.relative_camera(above, above).dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[:, :3], r"float64 of shape \(3, 3\) is no 3x4"),
        (lambda m: np.vstack([m, [[0, 0, 0, 1]]]), r"shape \(4, 4\) is no 3x4"),
        (lambda m: m.astype("U9"), "is no 3x4"),
        (lambda m: m * np.nan, "not finite"),
        (lambda m: m * 1.01, "no rotation: R R.T differs from the identity by 0.02"),
        (lambda m: m * [[1], [-1], [1]], "it mirrors"),
        (lambda m: m * [1, 1, 1, 0], "at the origin"),
    ],
)
def test_what_is_no_camera_is_refused(change, message):
    good = matrix(30, 60, 2)
    np.testing.assert_array_equal(cameras.check_matrix(good.astype(np.float32)), good.astype(np.float32))
    with pytest.raises(ValueError, match=message):
        cameras.check_matrix(change(good))


def test_scenes_give_pairs_whose_camera_tells_them_apart():
    chosen = settings("scenes", scenes__num_scenes=50)
    source = data.make_source(chosen)
    batch = data.read_batch(chosen, source, [3, 4])
    assert batch["image"].shape == batch["input"].shape == (2, SIZE, SIZE, 3)
    assert batch["camera"].dtype == np.float32
    assert not np.array_equal(batch["camera"][0], batch["camera"][1])  # held-out records have cameras of their own
    np.testing.assert_allclose(np.hypot(batch["camera"][:, 1], batch["camera"][:, 2]), 1, atol=1e-6)
    again = data.read_batch(dataclasses.replace(chosen, seed=9), source, [4])
    assert np.array_equal(again["image"][0], batch["image"][1])
    # The picture is the scene from the camera that the matrix tells.
    (picture, seen), _ = source.posed_views(3, np.random.Generator(np.random.Philox(5)), 2)
    azimuth, polar, radius = cameras.spherical(seen)
    assert scenes.VIEW_POLAR[0] < polar < scenes.VIEW_POLAR[1]
    drawn = scene_render.render(scenes.make_scene(3), SIZE, camera=scenes.Camera(azimuth, polar, radius))
    assert np.abs(drawn.astype(int) - picture).max() <= 1


def test_training_pairs_follow_seed_and_position_alone():
    def batches(rows, start, **fields):
        chosen = settings("scenes", scenes__num_scenes=6, holdout=2, **fields)
        source = data.make_source(chosen)
        iterator = data.make_train_iterator(chosen, source, batch_size=4, rows=rows, start_step=start)
        first = [next(iterator) for _ in range(2)]
        iterator.close()
        return first, set(data.holdout_records(chosen, source))

    (one, two), held = batches(range(4), 0)
    (later, _), _ = batches([1, 3], 1)
    for name in ("image", "input", "camera"):
        assert np.array_equal(later[name], two[name][[1, 3]])
    # An epoch has four records: the second shows them from elsewhere.
    assert set(one["record"]) == set(two["record"])
    assert held.isdisjoint(one["record"])
    a, b = ({r: batch["camera"][i] for i, r in enumerate(batch["record"])} for batch in (one, two))
    assert not any(np.array_equal(a[r], b[r]) for r in a)
    assert not np.array_equal(batches(range(4), 0, seed=1)[0][0]["camera"], one["camera"])


def test_renders_are_laid_on_white_and_paired_with_their_matrices(renders):
    (renders / "object1" / "metadata.json").write_text("{}")
    (renders / "notes").mkdir()
    source = objaverse.ObjaverseSource(str(renders))
    assert len(source) == 3
    assert source.describe(2) == str(renders / "object2")
    pairs = source.posed_views(2, np.random.Generator(np.random.Philox(1)), 5)
    radii = {round(cameras.spherical(seen)[2], 4): picture for picture, seen in pairs}
    assert sorted(radii) == [1.5, 1.6, 1.7, 1.8, 1.9]  # five different views
    for number in range(5):
        assert radii[round(1.5 + 0.1 * number, 4)] == (renders / "object2" / f"{number:03}.png").read_bytes()
    batch = read(renders, [0, 2])
    assert list(batch["weight"]) == [1, 1]
    for name in ("image", "input"):
        assert (batch[name][:, : SIZE // 2 - 1] == 255).all()
        assert (batch[name][:, SIZE // 2 + 1 :] < 255).any()
    # Of two views one is the target and one is the input: a turn of one radian either way.
    np.testing.assert_allclose(np.abs(batch["camera"][0]), [0.1, math.sin(1), math.cos(1), 0.1], atol=1e-5)
    before = source.fingerprint()
    (renders / "object0" / "001.npy").rename(renders / "object0" / "002.npy")
    assert objaverse.ObjaverseSource(str(renders)).fingerprint() != before


def test_damaged_objects_are_corrupt_records(renders):
    whole = (renders / "object1" / "000.png").read_bytes()
    write_object(renders / "alone", [scenes.Camera(0, 1, 1.5)])
    write_object(renders / "gap", [scenes.Camera(i, 1, 1.5) for i in range(3)])
    (renders / "gap" / "001.npy").unlink()
    np.save(renders / "object0" / "000.npy", np.eye(4))
    np.save(renders / "object0" / "001.npy", np.eye(4))
    for number in range(3):
        (renders / "object1" / f"{number:03}.npy").write_bytes(b"\x93NUMPY")
        (renders / "object2" / f"{number:03}.png").write_bytes(whole[:100])
    for number in (3, 4):
        (renders / "object2" / f"{number:03}.png").unlink()
        (renders / "object2" / f"{number:03}.npy").unlink()
    batch = read(renders, range(5))
    assert not batch["weight"].any()
    told = [str(problem).rsplit("/", 1)[-1] for problem in batch["problem"]]
    assert told[0] == "alone: 1 view(s), and 2 are needed"
    assert told[1] == "gap: 001.png has no 001.npy"
    assert "npy: float64 of shape (4, 4) is no 3x4 world-to-camera matrix" in told[2]
    assert "npy: no NumPy file" in told[3]
    assert told[4].startswith("object2: ")
    with pytest.raises(CorruptRecord, match="has no"):
        objaverse.ObjaverseSource(str(renders)).read(1)


def test_pickled_objects_are_never_run(renders):
    np.save(renders / "object0" / "000.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(renders / "object0" / "001.npy", np.zeros((3000, 4)))
    with pytest.raises(CorruptRecord, match=r"000\.npy: no NumPy file: Object arrays cannot be loaded|001\.npy is too"):
        objaverse.ObjaverseSource(str(renders)).posed_views(0, np.random.default_rng(0), 2)


def test_other_layouts_are_refused(renders, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="is not a directory"):
        objaverse.ObjaverseSource(str(empty / "absent"))
    with pytest.raises(ValueError, match=r"another layout than <object>/000.png .*: there are no folders"):
        objaverse.ObjaverseSource(str(empty))
    (empty / "scene").mkdir()
    (empty / "scene" / "transforms.json").write_text("{}")
    with pytest.raises(ValueError, match=r"folder scene holds transforms\.json, and none of 1 has numbered views"):
        objaverse.ObjaverseSource(str(empty))
    (empty / "scene" / "000.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="folder scene has 1 numbered images, 0 matrices, and no pair"):
        objaverse.ObjaverseSource(str(empty))
    folder = settings("folder", path=str(renders))
    with pytest.raises(ValueError, match=r"data\.sample_type=views: .* have no views"):
        data.read_batch(folder, data.make_source(folder), [0])


def test_mixtures_of_scenes_and_renders_give_pairs(renders):
    entries = (
        {"source": "objaverse", "path": str(renders), "weight": 1},
        {"source": "scenes", "num_scenes": 4, "weight": 1},
    )
    mixed = settings("mixture", mixture=entries)
    source = data.make_source(mixed)
    batch = data.read_batch(mixed, source, [0, 5])
    assert batch["weight"].all()
    alone = settings("scenes", scenes__num_scenes=4)
    (expected, _), _ = data.make_source(alone).posed_views(2, np.random.default_rng(1), 2)
    assert np.array_equal(source.posed_views(5, np.random.default_rng(1), 2)[0][0], expected)


def test_views_of_scenes_are_turned_no_further_than_asked():
    def turns(degrees):
        source = ScenesSource(40, 8, turn=np.radians(degrees))
        pairs = [source.posed_views(i, np.random.default_rng(i), 2) for i in range(40)]
        numbers = np.array([cameras.relative_camera(target, given) for (_, given), (_, target) in pairs])
        return np.degrees(np.arctan2(numbers[:, 1], numbers[:, 2]))

    near, round_about = turns(60), turns(180)
    assert 45 < np.abs(near).max() <= 60 + 1e-6
    assert near.min() < -30 < 30 < near.max()
    assert np.abs(round_about).max() > 150
    np.testing.assert_allclose(round_about, 3 * near, atol=1e-4)
