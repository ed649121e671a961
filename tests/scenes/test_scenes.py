"""The embedded scenes: access by number, ground truth that the pixels bear out, cameras, clips, captions."""

import dataclasses
import hashlib
import math
import pickle

import numpy as np
import pytest

from lumos_jax.data.sources.scenes import ScenesSource
from lumos_jax.scenes import render as scene_render
from lumos_jax.scenes import scene as scenes


def one_solid(kind="sphere", color="red", **more):
    """A scene with one plain solid in the middle of a plain ground."""
    scene = scenes.make_scene(0)
    solid = dataclasses.replace(scene.solids[0], kind=kind, color=color, material="plain", size=0.7, x=0.0, y=0.0)
    return dataclasses.replace(scene, solids=(solid,), ground="plain", **more)


def covered(scene, size=64):
    """Pixels that the solids change, against the same scene without them (shadows darken, so only hue counts)."""
    empty = scene_render.render(dataclasses.replace(scene, solids=()), size).astype(float)
    full = scene_render.render(scene, size).astype(float)

    def hue(x):
        return x / x.sum(-1, keepdims=True).clip(1)

    return np.abs(hue(full) - hue(empty)).max(-1) > 0.08


def test_any_index_works_at_once_and_always_gives_the_same_scene():
    for index in (0, 12345, 2**40 - 1):
        assert scenes.make_scene(index) == scenes.make_scene(index)
        picture = scene_render.render(scenes.make_scene(index), 16)
        assert picture.shape == (16, 16, 3)
        assert picture.std() > 5
    assert scenes.make_scene(5) != scenes.make_scene(6)
    assert scenes.make_scene(5, seed=1).solids != scenes.make_scene(5).solids
    with pytest.raises(ValueError, match="2\\^40"):
        scenes.make_scene(2**40)


def test_the_renderer_has_not_changed_without_a_new_version():
    """If this fails on purpose, raise scenes.VERSION: the fingerprint keeps runs from resuming onto other pictures."""
    pictures = [scene_render.render(scenes.make_scene(i), 16) // 16 for i in range(20)]
    assert (scenes.VERSION, hashlib.sha256(np.stack(pictures).tobytes()).hexdigest()[:16]) == (1, "7258bc38300cc6b5")


def test_thousand_scenes_are_valid_and_varied():
    made = [scenes.make_scene(i) for i in range(1000)]
    counts = np.bincount([len(s.solids) for s in made], minlength=5)
    assert counts[0] == 0
    assert counts[1:].min() > 100
    assert {x.kind for s in made for x in s.solids} == set(scenes.KINDS)
    assert {x.color for s in made for x in s.solids} == set(scenes.COLORS)
    for scene in made:
        for i, a in enumerate(scene.solids):
            for b in scene.solids[i + 1 :]:
                assert math.hypot(a.x - b.x, a.y - b.y) > a.size + b.size


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_each_kind_is_drawn_in_its_color_and_shape(kind):
    polar = 0.4 if kind == "torus" else 1.0
    scene = one_solid(kind, "green", camera=scenes.Camera(0.3, polar, 4.0))
    mask = covered(scene)
    picture = scene_render.render(scene, 64)[mask].mean(0)
    assert picture.argmax() == 1
    rows = mask.sum(1)
    assert 200 < mask.sum() < 2500
    top, bottom = rows[rows > 0][:4].mean(), rows[rows > 0][-12:].mean()
    if kind == "cone":
        assert top < 0.4 * bottom
    if kind == "cylinder":
        assert top > 0.4 * bottom
    if kind == "torus":  # its hole shows the ground
        middle = np.nonzero(mask.any(1))[0]
        centre = mask[(middle[0] + middle[-1]) // 2 - 2 : (middle[0] + middle[-1]) // 2 + 3, 28:36]
        assert not centre.all()


def test_the_matrix_projects_a_solid_where_it_is_drawn():
    scene = one_solid(camera=scenes.Camera(1.1, 0.9, 4.0))
    solid = dataclasses.replace(scene.solids[0], x=0.4, y=-0.5, size=0.3)
    scene = dataclasses.replace(scene, solids=(solid,))
    matrix = scene_render.camera_matrix(scene.camera)
    x, y, z = matrix @ np.array([0.4, -0.5, 0.3, 1.0])
    scale = 64 / (2 * math.tan(scenes.FOV / 2))
    rows, columns = np.nonzero(covered(scene))
    np.testing.assert_allclose([columns.mean(), rows.mean()], [x / z * scale + 31.5, y / z * scale + 31.5], atol=1.5)


def test_cameras_look_at_the_origin_from_where_they_say():
    camera = scenes.Camera(azimuth=0.7, polar=1.0, radius=3.5)
    matrix = scene_render.camera_matrix(camera)
    rotation, translation = matrix[:, :3], matrix[:, 3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.isclose(np.linalg.det(rotation), 1)
    centre = -rotation.T @ translation
    expected = 3.5 * np.array([math.sin(1) * math.cos(0.7), math.sin(1) * math.sin(0.7), math.cos(1)])
    np.testing.assert_allclose(centre, expected, atol=1e-12)
    np.testing.assert_allclose(translation, [0, 0, 3.5], atol=1e-12)


def test_views_and_clips_move():
    scene = scenes.make_scene(3)
    cameras = [dataclasses.replace(scene.camera, azimuth=a) for a in (0.0, 1.5)]
    views = [scene_render.render(scene, 24, camera=camera) for camera in cameras]
    assert np.abs(views[0].astype(int) - views[1]).mean() > 5
    for motion in ("camera", "solids"):
        moving = dataclasses.replace(scene, motion=motion)
        frames = np.stack([scene_render.render(moving, 24, time=i / 4) for i in range(5)]).astype(int)
        assert np.array_equal(frames[0], scene_render.render(scene, 24))
        steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
        assert steps.min() > 0.5
        assert steps.max() < np.abs(frames[-1] - frames[0]).mean() * 1.5  # smooth, not a jump


def test_captions_tell_the_truth():
    scene = one_solid("box", "orange")
    twice = dataclasses.replace(scene, solids=(scene.solids[0], dataclasses.replace(scene.solids[0], x=1.0)))
    assert scenes.captions(scene)[0] == "an orange box"
    assert scenes.captions(twice)[0] == "two orange boxes"
    for index in range(50):
        scene = scenes.make_scene(index)
        short, long = scenes.captions(scene)
        assert all(s.color in short and s.color in long for s in scene.solids)
        assert len(short) < len(long) < 500


def test_source_is_a_picklable_random_access_source():
    source = ScenesSource(10, 16)
    again = pickle.loads(pickle.dumps(source))
    assert len(source) == 10
    assert np.array_equal(source.read(7), again.read(7))
    assert source.fingerprint() == again.fingerprint() != ScenesSource(10, 32).fingerprint()
    assert source.describe(7) == "scene 7"


def test_turntable_clips_are_those_of_a_camera_that_turns_counterclockwise():
    source, table = ScenesSource(30, 16), ScenesSource(30, 16, turntable=True)
    assert source.fingerprint() != table.fingerprint()
    same = []
    for index in range(30):
        scene = source.scene(index)
        same.append(scene.motion == "camera" and scene.turn > 0)
        clips = [each.clip(index, frames=3, stride=6, share=0.0, size=16) for each in (source, table)]
        assert np.array_equal(clips[0].frames[0], clips[1].frames[0])
        assert np.array_equal(clips[0].frames, clips[1].frames) == same[-1]
    assert 0 < sum(same) < 30
