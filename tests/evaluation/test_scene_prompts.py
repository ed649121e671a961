"""GenEval's rules on scenes whose solids are known."""

import dataclasses

import numpy as np
import pytest

from lumos_jax.evaluation import scene_prompts
from lumos_jax.evaluation.lists import make_list
from lumos_jax.scenes.reader import Found, find_solids
from lumos_jax.scenes.render import render
from lumos_jax.scenes.scene import COLORS, Camera, make_scene

LEFT, RIGHT = (0.0, -0.8), (0.0, 0.8)  # as a camera on the x axis sees them


def picture(*solids):
    """(color, kind, place) of each solid -> an image of 64 px."""
    scene = make_scene(5)
    camera = Camera(0.0, 1.0, scene.camera.radius)
    made = [
        dataclasses.replace(scene.solids[0], kind=kind, color=color, material="plain", size=0.45, x=x, y=y)
        for color, kind, (x, y) in solids
    ]
    return render(dataclasses.replace(scene, solids=tuple(made), camera=camera, ground="plain"), 64)


@pytest.fixture(scope="module")
def pictures():
    return {
        "pair": picture(("red", "sphere", LEFT), ("blue", "box", RIGHT)),
        "swapped": picture(("red", "sphere", RIGHT), ("blue", "box", LEFT)),
        "two": picture(("red", "sphere", LEFT), ("red", "sphere", RIGHT)),
        "one": picture(("red", "sphere", (0.0, 0.0))),
    }


def test_solids_have_boxes(pictures):
    (pair,) = find_solids(pictures["pair"][None])
    assert [(solid.color, solid.kind) for solid in pair] == [("red", "sphere"), ("blue", "box")]
    left, right = (solid.box for solid in pair)
    assert 0 <= left[0] < left[2] <= right[0] < right[2] <= 64
    assert all(0 <= box[1] < box[3] <= 64 for box in (left, right))


def wants(kind, count=1, **more):
    return {"class": kind, "count": count, **more}


@pytest.mark.parametrize(
    ("include", "right", "wrong"),
    [
        ([wants("sphere")], {"pair", "swapped", "two", "one"}, set()),
        ([wants("sphere"), wants("box")], {"pair", "swapped"}, {"two", "one"}),
        ([wants("sphere", 2)], {"two"}, {"pair", "swapped", "one"}),
        ([wants("sphere", color="red")], {"pair", "one"}, set()),
        ([wants("sphere", color="blue")], set(), {"pair", "swapped", "two", "one"}),
        ([wants("sphere"), wants("box", position=["right of", 0])], {"pair"}, {"swapped", "two"}),
        ([wants("sphere", color="red"), wants("box", color="blue")], {"pair", "swapped"}, {"two"}),
    ],
)  # fmt: skip
def test_what_counts_as_correct(pictures, include, right, wrong):
    found = scene_prompts.correct(np.stack(list(pictures.values())), [{"include": include}] * len(pictures))
    judged = dict(zip(pictures, found, strict=True))
    assert all(judged[name] == 1 for name in right)
    assert all(judged[name] == 0 for name in wrong)


def test_more_than_asked_for_is_wrong_where_excluded(pictures):
    prompt = {"include": [wants("sphere")], "exclude": [wants("sphere", 2)]}
    assert scene_prompts.correct(np.stack([pictures["one"], pictures["two"]]), [prompt] * 2).tolist() == [1, 0]


def test_relations_need_a_clear_distance():
    a = Found("red", "sphere", (0, 0, 10, 10))
    assert scene_prompts.relations(a, Found("red", "box", (20, 0, 30, 10))) == {"left of"}
    assert scene_prompts.relations(a, Found("red", "box", (0, 20, 10, 30))) == {"above"}
    assert scene_prompts.relations(a, Found("red", "box", (1, 1, 11, 11))) == set()
    assert scene_prompts.relations(Found("red", "box", (20, 21, 30, 31)), a) == {"right of", "below"}


def fitting(prompt, seed):
    """An image that shows what a prompt asks for."""
    rng, solids = np.random.default_rng(seed), []
    for wanted in prompt["include"]:
        color = wanted.get("color") or rng.choice(list(COLORS))
        solids += [(color, wanted["class"])] * wanted["count"]
    places = {1: [(0.0, 0.0)], 2: [LEFT, RIGHT], 3: [(-0.5, -0.9), (0.5, 0.0), (-0.5, 0.9)],
              4: [(-0.6, -0.7), (-0.6, 0.7), (0.6, -0.7), (0.6, 0.7)]}  # fmt: skip
    return picture(*((*solid, place) for solid, place in zip(solids, places[len(solids)], strict=True)))


def test_images_that_fit_their_prompts_are_correct():
    items = make_list("scenes-geneval").items[::24]
    images = np.stack([fitting(item.extra, number) for number, item in enumerate(items)])
    prompts = [item.extra for item in items]
    assert len({prompt["tag"] for prompt in prompts}) == 6
    assert scene_prompts.correct(images, prompts).mean() > 0.85
    assert scene_prompts.correct(images, prompts[50:] + prompts[:50]).mean() < 0.3


def test_prompts_without_metadata(pictures):
    with pytest.raises(ValueError, match="GenEval's metadata"):
        scene_prompts.correct(pictures["one"][None], [{}])
