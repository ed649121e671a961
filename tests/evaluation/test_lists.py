"""Lists of evaluations: their order and digest, and the files that each set needs."""

import json

import pytest
from PIL import Image

from lumos_jax.evaluation import lists
from lumos_jax.evaluation.lists import Item, ItemList
from lumos_jax.scenes.scene import captions, make_scene


def test_the_digest_is_of_ids_conditions_and_order(tmp_path):
    items = (Item("a", {"caption": "x"}), Item("b", {"caption": "y"}, "r", "g", {"tag": 1}))
    made = ItemList("mine", items)
    made.save(tmp_path / "mine.jsonl")
    assert lists.read_list(tmp_path / "mine.jsonl") == made
    others = [items[::-1], items[:1], (items[0], Item("b", {"caption": "z"}, "r", "g", {"tag": 1}))]
    assert made.digest not in {ItemList("mine", other).digest for other in others}
    with pytest.raises(ValueError, match="1 ids more than once, 'a' among them"):
        ItemList("mine", (items[0], items[0]))


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 2"), ('{"caption": "x"}', "line 2: an item is an object with id")]
)
def test_a_damaged_list_is_refused_by_line(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "0"}\n' + line)
    with pytest.raises(ValueError, match=message):
        lists.make_list(str(tmp_path / "a.jsonl"))


def test_scenes_are_beyond_those_that_train():
    made = lists.make_list("scenes", num=3)
    assert [item.condition["scene"] for item in made.items] == [lists.FIRST_SCENE + i for i in range(3)]
    assert made.items[2].condition["caption"] == captions(make_scene(lists.FIRST_SCENE + 2))[0]
    assert lists.make_list("scenes", num=2).items == made.items[:2]


def test_scene_prompts_have_the_categories_of_geneval():
    items = lists.make_list("scenes-geneval").items
    assert len(items) == 4 * 553
    assert items[7].id == "00001/0003"
    tags = [item.extra["tag"] for item in items[::4]]
    assert {tag: tags.count(tag) for tag in lists.GENEVAL_TAGS} == lists.GENEVAL_TAGS
    for item in items:
        for found in item.extra["include"]:
            assert found["class"][:3] in item.condition["caption"]
            assert found.get("color", "") in item.condition["caption"]
    position = next(item.extra for item in items if item.extra["tag"] == "position")
    first, second = position["include"]
    assert position["prompt"].index(first["class"]) < position["prompt"].index(second["class"])
    assert second["position"] == ["right of", 0]


def test_imagenet_is_balanced_from_the_start():
    made = lists.make_list("imagenet50k", num=2000)
    labels = [item.condition["label"] for item in made.items]
    assert {labels.count(label) for label in range(1000)} == {2}
    assert len(lists.make_list("imagenet50k")) == 50_000
    with pytest.raises(ValueError, match="--num=50001: the set imagenet50k has 50000 items"):
        lists.make_list("imagenet50k", num=50_001)


@pytest.fixture
def data(tmp_path):
    """The files of the public sets, small."""
    (tmp_path / "val2014").mkdir()
    for image in (9, 346904):
        Image.new("RGB", (8, 6)).save(tmp_path / f"val2014/COCO_val2014_{image:012d}.jpg")
    (tmp_path / "uid_caption.csv").write_text('uid,caption\n346904_mscoco_0,A bus.\n9_mscoco_2,"Food, plates"\n')
    (tmp_path / "recap_coco.csv").write_text("image_id,caption,recaption\n9,Food,Much food on plates\n")
    prompt = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(prompt) + "\n")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/partiprompts3.txt").write_text("a dog\n")
    for elevation in (0, 30):
        folder = tmp_path / f"renderings/cup/elevation_{elevation}"
        folder.mkdir(parents=True)
        for view in range(16):
            Image.new("RGB", (8, 8), (view, 0, 0)).save(folder / f"{view:03d}.png")
    return str(tmp_path)


def test_public_sets_read_the_files_that_people_have(data):
    coco = lists.make_list("coco30k", data).items
    assert [(item.id, item.condition["caption"]) for item in coco] == [
        ("346904_mscoco_0", "A bus."), ("9_mscoco_2", "Food, plates"),
    ]  # fmt: skip
    assert coco[0].reference == "val2014/COCO_val2014_000000346904.jpg"
    assert lists.make_list("coco30k-long", data).items[0].condition == {"caption": "Much food on plates"}
    geneval = lists.make_list("geneval", data).items
    assert [item.id for item in geneval] == [f"00000/{k:04d}" for k in range(4)]
    assert list(geneval[0].extra) == ["tag", "include", "prompt"]
    dpg = lists.make_list("dpg", data).items
    assert [(item.group, item.condition["caption"]) for item in dpg] == [("partiprompts3", "a dog")] * 4
    gso = lists.make_list("gso", data).items
    assert len(gso) == 32
    assert gso[17].condition["azimuth"] == 22.5
    assert gso[17].condition["target"] == "renderings/cup/elevation_30/001.png"
    assert gso[17].extra == {"elevation": 30}


@pytest.mark.parametrize("name", [name for name, one in lists.SETS.items() if one.files])
def test_missing_files_are_named_with_their_origin(name, tmp_path):
    with pytest.raises(ValueError, match=f"--set={name} needs --data=FOLDER with .*"):
        lists.make_list(name)
    with pytest.raises(ValueError, match=f"--set={name}: there is no .*; --data must hold "):
        lists.make_list(name, str(tmp_path))


def test_folders_of_images_and_unknown_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.png", "b/1.jpg", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [item.id for item in lists.make_list(str(tmp_path)).items] == ["a", "b/1", "b/2"]
    with pytest.raises(ValueError, match=r"--set=coco is not one of scenes, .*nor a \.jsonl list"):
        lists.make_list("coco")
