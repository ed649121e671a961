"""Pictures of scenes read back: against the scenes that were rendered, which nothing was fitted to."""

import dataclasses

import numpy as np
import pytest

from lumos_jax import evaluation
from lumos_jax.scenes import reader as scene_check
from lumos_jax.scenes.render import render
from lumos_jax.scenes.scene import COLORS, KINDS, make_scene

SEED = 3  # 1 is what was fitted to, 2 what docs/evaluation.md tells of
COUNT = 200


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(index, seed=SEED) for index in range(COUNT)]


@pytest.fixture(scope="module")
def pictures(scenes):
    return np.stack([render(scene, 32) for scene in scenes])


def means(pictures, scenes):
    values = evaluation.caption_agreement(pictures, scenes)
    assert all(value.shape == (len(scenes),) and value.min() >= 0 and value.max() <= 1 for value in values.values())
    return {name: value.mean() for name, value in values.items()}


def test_true_pictures_agree_with_their_captions(pictures, scenes):
    found = means(pictures, scenes)
    least = {"count": 0.83, "colour": 0.9, "shape": 0.83, "all": 0.65}
    assert all(found[name] > bound for name, bound in least.items()), found
    sharp = means(np.stack([render(scene, 64) for scene in scenes[:60]]), scenes[:60])
    assert all(sharp[name] > bound for name, bound in least.items()), sharp


def test_pictures_do_not_agree_with_the_captions_of_others(pictures, scenes):
    found = means(pictures, [*scenes[1:], scenes[0]])
    most = {"count": 0.4, "colour": 0.3, "shape": 0.4, "all": 0.03}
    assert all(found[name] < bound for name, bound in most.items()), found


def test_noisy_pictures_agree_nearly_as_well(pictures, scenes):
    noise = np.random.default_rng(0).normal(0, 8, pictures.shape)
    found = means(np.clip(pictures + noise, 0, 255).astype(np.uint8), scenes)
    assert min(found["count"] / 0.78, found["colour"] / 0.85) > 1, found


def test_a_solid_of_every_color_and_kind():
    """Each alone, plain, in the middle of a picture that is no square."""
    scene = next(s for s in (make_scene(i, seed=SEED) for i in range(99)) if len(s.solids) == 1)
    told = [(color, kind) for color in COLORS for kind in KINDS]
    solids = [dataclasses.replace(scene.solids[0], color=c, kind=k, material="plain") for c, k in told]
    shown = np.stack([render(dataclasses.replace(scene, solids=(solid,)), (32, 40)) for solid in solids])
    found = scene_check.read_scenes(shown)
    assert [len(solids) for solids in found] == [1] * len(told)
    assert [solids[0][0] for solids in found] == [color for color, _ in told]
    assert np.mean([solids[0] == pair for solids, pair in zip(found, told, strict=True)]) > 0.9


def test_surplus_and_missing_solids_cost_their_share(pictures, scenes):
    exact = evaluation.caption_agreement(pictures, scenes)["all"]
    at = next(i for i, scene in enumerate(scenes) if len({s.color for s in scene.solids}) == 3 and exact[i])
    three = scenes[at]
    fewer = dataclasses.replace(three, solids=three.solids[:1])
    more = dataclasses.replace(three, solids=three.solids + three.solids[:1])
    values = evaluation.caption_agreement(pictures[[at] * 3], [three, fewer, more])
    np.testing.assert_allclose(values["count"], [1, 0, 0])
    np.testing.assert_allclose(values["colour"], [1, 1 / 3, 3 / 4])
    np.testing.assert_allclose(values["shape"], [1, 1 / 3, 3 / 4])
    np.testing.assert_allclose(values["all"], [1, 0, 0])


def test_pictures_of_nothing_show_nothing(scenes):
    levels = np.array([[0, 0, 0], [128, 128, 128], [255, 255, 255], [220, 30, 30], [30, 60, 210]], np.uint8)
    blank = np.broadcast_to(levels[:, None, None], (5, 32, 32, 3))
    assert scene_check.read_scenes(blank) == [[]] * 5
    assert all(not value.any() for value in evaluation.caption_agreement(blank, scenes[:5]).values())
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    assert means(noise, scenes[:40])["count"] < 0.1


def test_what_cannot_be_read_is_refused(pictures, scenes):
    with pytest.raises(ValueError, match=r"float64 \(2, 32, 32, 3\): give uint8 \(B, H, W, 3\)"):
        evaluation.caption_agreement(pictures[:2] / 255, scenes[:2])
    with pytest.raises(ValueError, match="3 pictures of 2 scenes"):
        evaluation.caption_agreement(pictures[:3], scenes[:2])


def test_the_shipped_file_knows_the_names_and_is_small():
    assert scene_check.FILE.stat().st_size < 300_000
    reader = scene_check._reader()
    assert reader["colours"] == list(COLORS)
    assert [content[0] for content in reader["contents"] if len(content) == 1] == list(KINDS)
