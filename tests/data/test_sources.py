"""Folders and mixtures: what is a record, in which order, and what is said of what is not."""

import os
import pickle
import uuid

import numpy as np
import pytest
from absl import logging
from PIL import Image

from lumos_jax import config, data
from lumos_jax.data import storage
from lumos_jax.data.sources.folder import FolderSource
from tests.fields import data_settings, replace


@pytest.fixture
def folder(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.webp", "sub/deeper/d.Jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (40, 40, 40)).save(tmp_path / name)
    return tmp_path


def names(path):
    return list(FolderSource(str(path)).names)


def test_folder_lists_images_by_relative_name_whatever_their_case(folder):
    source = FolderSource(str(folder))
    assert list(source.names) == ["a.png", "b.JPG", "sub/c.webp", "sub/deeper/d.Jpeg"]
    assert len(source) == 4
    assert source.describe(2) == str(folder / "sub/c.webp")
    assert source.read(1) == (folder / "b.JPG").read_bytes()
    again = pickle.loads(pickle.dumps(source))
    assert again.read(3) == source.read(3)
    with pytest.raises(IndexError):
        source.read(4)


def test_content_counts_where_the_ending_says_nothing(folder, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    (folder / "a.png").rename(folder / "9f86d081")  # a name that is a hash
    (folder / "b.JPG").rename(folder / "b.data")
    (folder / "captions.txt").write_text("a gray square")
    (folder / ".DS_Store").write_text("x")
    (folder / "broken.jpg").write_text("not an image")
    (folder / "gone").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    assert names(folder) == ["9f86d081", "b.data", "broken.jpg", "sub/c.webp", "sub/deeper/d.Jpeg"]
    assert said == [
        f"{folder}: 1 pipes, sockets or devices are left out, as {folder}/pipe",
        f"{folder}: 2 files are no images and are left out, as captions.txt",
    ]
    batch = data.read_batch(config.Data(image_size=8), FolderSource(str(folder)), range(5))
    assert list(batch["weight"]) == [1, 1, 0, 1, 1]


def test_linked_folders_are_followed_once(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (9, 9)).save(elsewhere / "e.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "sub" / "up").symlink_to(folder)
    assert names(folder) == ["a.png", "b.JPG", "linked/e.png", "sub/c.webp", "sub/deeper/d.Jpeg"]


def test_folder_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=.*absent.* is not a directory"):
        FolderSource(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="holds no images: it is empty"):
        FolderSource(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds no images: its 1 files are of other kinds, as notes\.txt"):
        FolderSource(str(tmp_path))


def test_names_that_are_no_utf8_can_be_printed(folder):
    os.rename(folder / "a.png", os.fsencode(folder) + b"/\xff.png")
    source = FolderSource(str(folder))
    number = next(i for i in range(4) if "\\xff" in source.describe(i))
    source.describe(number).encode()
    assert source.read(number)[:4] == b"\x89PNG"
    os.truncate(os.fsencode(folder) + b"/\xff.png", 5)
    problem = data.read_batch(config.Data(image_size=8), source, [number])["problem"][0]
    assert str(problem).encode().startswith(os.fsencode(folder) + b"/\\xff.png: ")
    assert source.fingerprint() == FolderSource(str(folder)).fingerprint()


def test_fingerprint_follows_names_and_sizes(folder):
    first = FolderSource(str(folder)).fingerprint()
    assert FolderSource(str(folder)).fingerprint() == first
    (folder / "a.png").rename(folder / "z.png")
    renamed = FolderSource(str(folder)).fingerprint()
    with open(folder / "z.png", "ab") as file:
        file.write(b"x")
    grown = FolderSource(str(folder)).fingerprint()
    source = FolderSource(str(folder))
    (folder / "z.png").unlink()
    assert len({first, renamed, grown, source.fingerprint(), FolderSource(str(folder)).fingerprint()}) == 5


def entry(path, weight):
    return {"source": "folder", "path": str(path), "weight": weight}


def test_mixture_numbers_source_after_source(folder):
    mixture = (entry(folder, 1), {"source": "scenes", "num_scenes": 5, "weight": 3})
    settings = config.Data(source="mixture", mixture=mixture, image_size=16)
    source = data.make_source(settings)
    assert len(source) == 9
    assert [source.locate(i) for i in (0, 3, 4, 8)] == [(0, 0), (0, 3), (1, 0), (1, 4)]
    assert source.describe(4) == "scene 0"
    batch = data.read_batch(settings, source, [0, 6])
    assert batch["weight"].all()
    scene = data.read_batch(replace(settings, source="scenes", mixture=(), scenes__num_scenes=5), data.make_source(
        data_settings(source="scenes", scenes__num_scenes=5, image_size=16)), [2])  # fmt: skip
    assert np.array_equal(batch["image"][1], scene["image"][0])


def test_mixture_fingerprint_follows_weights_and_parts(folder):
    def fingerprint(*mixture):
        return data.make_source(config.Data(source="mixture", mixture=mixture)).fingerprint()

    scenes = {"source": "scenes", "num_scenes": 5, "weight": 1}
    assert fingerprint(entry(folder, 1), scenes) == fingerprint(entry(folder, 1), scenes)
    others = [
        fingerprint(entry(folder, 1), scenes), fingerprint(entry(folder, 2), scenes), fingerprint(scenes, entry(folder, 1)),
        fingerprint(entry(folder, 1), scenes | {"num_scenes": 6}), fingerprint(entry(folder / "sub", 1), scenes),
    ]  # fmt: skip
    assert len(set(others)) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wieght": 1}, "wieght"),
        ({"weight": 0}, "needs weight, a number above 0, not 0"),
        ({"weight": True}, "not True"),
        ({"source": "mixture"}, "needs source"),
        ({"path": ""}, "needs path"),
        ({"path": "/nowhere/at/all"}, r"mixture\[1\]: config.data.path='/nowhere/at/all' is not a directory"),
        ({"source": "tfds"}, "needs name"),
    ],
)
def test_mixture_says_what_is_wrong(folder, change, message):
    mixture = (entry(folder, 1), entry(folder, 1) | change)
    with pytest.raises(ValueError, match=message):
        data.make_source(config.Data(source="mixture", mixture=mixture, path=str(folder)))


def test_scenes_are_a_source():
    settings = data_settings(source="scenes", scenes__num_scenes=12, image_size=16)
    source = data.make_source(settings)
    assert len(source) == 12
    batch = data.read_batch(settings, source, [11, 0])
    assert batch["image"].shape == (2, 16, 16, 3)
    assert not np.array_equal(batch["image"][0], batch["image"][1])
    assert (
        source.fingerprint()
        != data.make_source(data_settings(source="scenes", scenes__num_scenes=13, image_size=16)).fingerprint()
    )


def test_load_image_names_the_file(folder):
    assert data.load_image(folder / "a.png", 8).shape == (8, 8, 3)
    assert np.array_equal(
        data.load_image(folder / "a.png", 8),
        data.read_batch(config.Data(image_size=8), FolderSource(str(folder)), [0])["image"][0],
    )
    with pytest.raises(ValueError, match=r"none\.png cannot be read"):
        data.load_image(folder / "none.png", 8)
    (folder / "c.png").write_text("no")
    with pytest.raises(ValueError, match=r"c\.png is not a readable image"):
        data.load_image(folder / "c.png", 8)


def test_a_folder_behind_a_url(folder, tmp_path):
    base = f"memory://{uuid.uuid4().hex}"
    for file in folder.rglob("*"):
        if file.is_file():
            storage.write_whole(f"{base}/{file.relative_to(folder)}", file.read_bytes())
    storage.write_whole(f"{base}/sub/c.txt", b"told")
    source, local = FolderSource(base, captioned=True), FolderSource(str(folder))
    assert list(source.names) == list(local.names)
    assert [source.read(i) for i in range(4)] == [local.read(i) for i in range(4)]
    assert FolderSource(base).fingerprint() == local.fingerprint()
    found = pickle.loads(pickle.dumps(source)).fetch([3, 0], [2, 0])
    assert found.images == {3: local.read(3), 0: local.read(0)}
    assert found.captions[2] == ("told", "")
    assert isinstance(found.captions[0], data.CorruptRecord)
    settings = config.Data(source="folder", path=base, image_size=8, holdout=0)
    batches = data.make_train_iterator(settings, data.make_source(settings), batch_size=4, rows=range(4), start_step=0)
    assert next(batches)["weight"].all()
    batches.close()
    with pytest.raises(ValueError, match=r"no_such.*cannot be listed: .*No such file"):
        FolderSource(f"{base}/no_such")


def test_the_fingerprint_of_a_folder_sees_changed_content_of_the_same_size(folder):
    before = FolderSource(str(folder)).fingerprint()
    file = folder / "a.png"
    file.write_bytes(file.read_bytes()[::-1])
    after = FolderSource(str(folder)).fingerprint()
    assert not data.same_fingerprint(before, after)
    assert data.same_fingerprint(before.partition("-")[0], after)
