"""Captions: cleaning, which of them is chosen, exchanged ones, and the sources that have them."""

import json
import pickle
import time

import numpy as np
import pytest
from PIL import Image

from lumos_jax import config, data
from lumos_jax.data import captions
from lumos_jax.scenes.scene import captions as scene_captions
from lumos_jax.scenes.scene import make_scene
from tests.fields import data_settings


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Dog &amp; a CAT", "a dog a cat"),
        ("See https://example.com/a?b=1 for more", "see for more"),
        ("photo from www.site.net/pic", "photo from"),
        ("<b>bold</b> <person> smiles", "bold person smiles"),
        ("中文 a tea house 茶", "a tea house"),
        ("“Quoted” — ‘words’", "quoted\" - 'words"),
        ("schÃ¶n day", "schön day"),
        ("red%20car+park", "red car park"),
        ("@someone IMG_1234.JPG a beach #12345", "a beach"),
        ("stock-photo-of-a-red-barn", "stock photo of a red barn"),
        ("a {very} [odd] | caption / with \\ signs ®", "a very odd caption with signs"),
        ("   ", ""),
        ("漢字", ""),
    ],
)
def test_cleaning(caption, cleaned):
    assert captions.clean(caption) == cleaned
    assert captions.clean(cleaned) == cleaned


@pytest.mark.parametrize("part", ["a", "a.", "word "])
def test_captions_of_ten_thousand_characters_take_no_time(part):
    begun = time.process_time()
    cleaned = captions.clean(part * (10_000 // len(part)))
    assert time.process_time() - begun < 1
    assert len(cleaned) <= 2000


def test_choice_between_raw_and_detailed():
    assert [captions.choose(("raw", "long"), draw, 0.3) for draw in (0.0, 0.29, 0.3, 0.9)] == [1, 1, 0, 0]
    assert captions.choose(("raw", "long"), 0.0, 0.0) == 0
    assert captions.choose(("raw", ""), 0.0, 1.0) == 0
    assert captions.choose(("", "long"), 0.9, 0.0) == 1
    assert captions.choose(("", ""), 0.1, 0.5) == 0


def test_noise_exchanges_a_share_of_the_captions_and_loses_none():
    count = 1501
    for fraction in (0.1, 0.9):
        partners = [captions.partner(i, count, fraction, seed=3) for i in range(count)]
        assert sorted(partners) == list(range(count))
        assert abs(np.mean(np.arange(count) != partners) - fraction) < 0.03
    assert partners != [captions.partner(i, count, 0.9, seed=4) for i in range(count)]
    assert [captions.partner(i, 10, 0.0, seed=0) for i in range(10)] == list(range(10))
    everyone = [captions.partner(i, count, 1.0, seed=0) for i in range(count)]
    assert np.sum(np.arange(count) == everyone) <= 2


def scenes(**fields):
    return data_settings(sample_type="captioned", image_size=8, scenes__num_scenes=64, **fields)


def train_batch(settings, step=0, rows=range(16)):
    source = data.make_source(settings)
    batches = data.make_train_iterator(settings, source, batch_size=16, rows=rows, start_step=step)
    batch = next(batches)
    batches.close()
    return batch


def test_a_caption_follows_its_record_and_position_only():
    batch = train_batch(scenes(), step=5)
    told = [scene_captions(make_scene(int(record))) for record in batch["record"]]
    detailed = [caption == long for caption, (_, long) in zip(batch["caption"], told, strict=True)]
    assert all(caption in pair for caption, pair in zip(batch["caption"], told, strict=True))
    assert 0 < sum(detailed) < 16
    half = train_batch(scenes(), step=5, rows=range(3, 16, 4))
    assert list(half["caption"]) == list(batch["caption"][3::4])
    later = train_batch(scenes(), step=9)  # the same records in the next epoch
    again = {int(r): c for r, c in zip(later["record"], later["caption"], strict=True)}
    both = [r for r in map(int, batch["record"]) if r in again]
    assert any(again[r] != c for r, c in zip(batch["record"], batch["caption"], strict=True) if int(r) in both)
    assert list(train_batch(scenes(captions__detailed_caption_prob=0.0), step=5)["caption"]) == [
        short for short, _ in told
    ]
    assert np.array_equal(train_batch(scenes(captions__detailed_caption_prob=0.0), step=5)["image"], batch["image"])


def test_noise_is_for_training_only():
    noisy = scenes(captions__noise=1.0, captions__detailed_caption_prob=0.0)
    batch = train_batch(noisy)
    own = [scene_captions(make_scene(int(record)))[0] for record in batch["record"]]
    assert np.mean([a == b for a, b in zip(batch["caption"], own, strict=True)]) < 0.3
    source = data.make_source(noisy)
    held = data.read_batch(noisy, source, [3, 4])
    assert list(held["caption"]) == [scene_captions(make_scene(i))[0] for i in (3, 4)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "sub" / f"{i}.png")
        (tmp_path / "sub" / f"{i}.txt").write_text(f"Raw\n {i} ")
    (tmp_path / "sub" / "1.detailed.txt").write_text("detailed 1")
    (tmp_path / "sub" / "2.txt").write_text("")
    (tmp_path / "sub" / "3.txt").unlink()
    return tmp_path


def folder_data(path, **fields):
    return data_settings(source="folder", path=str(path), sample_type="captioned", image_size=8, **fields)


def test_text_files_beside_the_images(folder):
    settings = folder_data(folder, captions__detailed_caption_prob=1.0)
    source = data.make_source(settings)
    batch = data.read_batch(settings, source, range(4))
    assert list(batch["caption"]) == ["Raw 0", "detailed 1", "", ""]
    assert list(batch["weight"]) == [1, 1, 1, 0]  # an empty caption is one; an absent one makes no record
    assert "3.png: there is no 3.txt beside it" in batch["problem"][3]
    before = source.fingerprint()
    (folder / "sub" / "0.txt").write_text("another caption")
    assert data.make_source(settings).fingerprint() != before
    cleaned = folder_data(folder, captions__detailed_caption_prob=0.0, captions__clean=True)
    assert data.read_batch(cleaned, source, [0])["caption"][0] == "another caption"
    assert pickle.loads(pickle.dumps(source)).captions(1) == ("Raw 1", "detailed 1")


def test_captions_in_one_file(folder):
    lines = [{"file": "sub/0.png", "caption": "zero"}, {"file": "sub/1.png", "caption": "one", "detailed": "all of 1"}]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    settings = folder_data(folder, captions__detailed_caption_prob=1.0)
    source = data.make_source(settings)
    batch = data.read_batch(settings, source, [0, 1, 2])
    assert list(batch["caption"]) == ["zero", "all of 1", ""]
    assert list(batch["weight"]) == [1, 1, 0]
    assert "captions.jsonl has no line for it" in batch["problem"][2]
    (folder / "captions.jsonl").write_text('{"file": "sub/0.png", "caption": "zero"}\n{"file": "sub/1.png"}\n')
    with pytest.raises(ValueError, match=r"captions\.jsonl, line 2: not an object"):
        data.make_source(settings)


def field(number, value):
    """A length-delimited field of a protocol buffer message."""
    return bytes([number << 3 | 2, *([len(value) & 0x7F | 0x80, len(value) >> 7]), *value])


def example(**features):
    """A serialized tf.train.Example of byte features."""
    entries = [
        field(1, field(1, name.encode()) + field(2, field(1, field(1, value)))) for name, value in features.items()
    ]
    return field(1, b"".join(entries))


def test_examples_in_shards(folder, tmp_path):
    image = (folder / "sub" / "0.png").read_bytes()
    records = [
        example(image=image, text="ein B\u00e4r".encode(), detailed=b"a brown bear"),
        example(image=image),
        image,
    ]
    data.write_arrayrecord(tmp_path / "a.arrayrecord", records)
    settings = data_settings(
        source="arrayrecord",
        path=str(tmp_path),
        sample_type="captioned",
        image_size=8,
        captions__detailed_caption_prob=0.0,
    )
    source = data.make_source(settings)
    batch = data.read_batch(settings, source, [0, 1, 2])
    assert list(batch["caption"]) == ["ein B\u00e4r", "", ""]
    assert list(batch["weight"]) == [1, 0, 0]
    assert "no caption" in batch["problem"][1]
    assert source.captions(0) == ("ein B\u00e4r", "a brown bear")


def test_mixtures_have_the_captions_of_their_parts(folder):
    parts = ({"source": "scenes", "num_scenes": 5, "weight": 1}, {"source": "folder", "path": str(folder), "weight": 1})
    settings = data_settings(
        source="mixture", mixture=parts, sample_type="captioned", image_size=8, captions__detailed_caption_prob=0.0
    )
    source = data.make_source(settings)
    batch = data.read_batch(settings, source, [4, 6])
    assert list(batch["caption"]) == [scene_captions(make_scene(4))[0], "Raw 1"]


def test_sources_without_captions_are_refused(folder, tmp_path):
    settings = config.Data(sample_type="captioned", image_size=8)

    (folder / "object").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "object" / "000.png")
    np.save(folder / "object" / "000.npy", np.eye(3, 4))
    source = data.make_source(config.Data(source="objaverse", path=str(folder)))
    with pytest.raises(
        ValueError, match=r"object \.\.\. have no captions. Sources that do are arrayrecord, folder, prepared, scenes,"
    ):
        data.read_batch(settings, source, [0])
