"""Shards of samples: what a restart skips, what a reader refuses, and the job that fills them."""

import json

import numpy as np
import pytest

from lumos_jax.evaluation.job import make_samples
from lumos_jax.evaluation.lists import Item, ItemList
from lumos_jax.evaluation.shards import Samples, open_job

ITEMS = ItemList("toy", tuple(Item(f"{i:03d}", {"label": i}) for i in range(10)))
PROTOCOL = {"seed": 0, "guidance": 1.5, "interval": (0.0, 1.0), "shard_size": 4}


def pixels_of(numbers):
    return np.broadcast_to(np.asarray(numbers, np.uint8)[:, None, None, None], (len(numbers), 2, 3, 3)).copy()


def fill(directory, batch=3, shards=None, protocol=PROTOCOL):
    writer = open_job(directory, ITEMS, protocol)
    seen = []

    def read(numbers):
        return numbers, 255 - pixels_of(numbers)

    def generate(inputs, numbers):
        np.testing.assert_array_equal(inputs, numbers)
        seen.append(numbers.tolist())
        return pixels_of(numbers)

    make_samples(writer, writer.missing() if shards is None else shards, read, generate, batch)
    return seen


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batches_run_on_across_shards_and_padding_is_dropped(batch, tmp_path):
    seen = fill(tmp_path, batch)
    assert {len(numbers) for numbers in seen} == {batch}
    assert len(seen) == -(-10 // batch)
    samples = Samples(tmp_path)
    assert len(samples) == 10
    assert [(shard, len(ids)) for shard, ids, _ in samples] == [(0, 4), (1, 4), (2, 2)]
    np.testing.assert_array_equal(np.concatenate([pixels for *_, pixels in samples]), pixels_of(range(10)))
    np.testing.assert_array_equal(samples.references(2), 255 - pixels_of([8, 9]))
    samples.verify()


def test_a_restart_makes_what_is_missing_to_the_same_digests(tmp_path):
    fill(tmp_path / "once")
    fill(tmp_path / "twice", shards=[1])
    (tmp_path / "twice" / "shard_00000.npz.partial").write_bytes(b"half")
    with pytest.raises(ValueError, match="lacks 2 of 3 shards, the first with id '000'"):
        Samples(tmp_path / "twice")
    assert [number for batch in fill(tmp_path / "twice", batch=2) for number in batch] == [0, 1, 2, 3, 8, 9]
    assert Samples(tmp_path / "once").digests() == Samples(tmp_path / "twice").digests()


def test_another_protocol_or_list_is_refused_by_field(tmp_path):
    fill(tmp_path / "a")
    with pytest.raises(ValueError, match=r"another protocol \(seed 0 there and 1 here\)"):
        open_job(tmp_path / "a", ITEMS, PROTOCOL | {"seed": 1})
    for other in (ITEMS.items[::-1], ITEMS.items[:-1]):
        with pytest.raises(ValueError, match=r"another protocol \(list_digest"):
            open_job(tmp_path / "a", ItemList("toy", other), PROTOCOL)
    fill(tmp_path / "b", protocol=PROTOCOL | {"guidance": 2.0})
    (tmp_path / "b" / "shard_00001.npz").replace(tmp_path / "a" / "shard_00001.npz")
    for read in (Samples, lambda path: open_job(path, ITEMS, PROTOCOL).missing()):
        with pytest.raises(ValueError, match=r"shard_00001.npz .*\(guidance 2.0 there and 1.5 here\)"):
            read(tmp_path / "a")


def rewrite(path, **changes):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(path, **arrays | changes)


def test_a_reader_refuses_what_is_not_the_list(tmp_path):
    fill(tmp_path)
    shard, listed = tmp_path / "shard_00001.npz", tmp_path / "list.jsonl"
    original, lines = shard.read_bytes(), listed.read_text().splitlines()
    for ids, message in (
        (["004", "004", "006", "007"], "id '004' occurs twice"),
        (["004", "005", "006", "xyz"], "id 'xyz' is not in the list"),
        (["004", "005", "006"], "id '007' is missing"),
        (["005", "004", "006", "007"], "not in the list's order"),
    ):
        rewrite(shard, ids=np.array(ids))
        with pytest.raises(ValueError, match=message):
            Samples(tmp_path)
    shard.write_bytes(original)
    rewrite(shard, pixels=pixels_of([1, 2, 3, 4]))
    with pytest.raises(ValueError, match=r"shard_00001.npz is damaged: its content has another digest"):
        Samples(tmp_path).verify()
    shard.write_bytes(original[:-100])
    with pytest.raises(ValueError, match=r"shard_00001.npz is damaged"):
        Samples(tmp_path)
    shard.write_bytes(original)
    (tmp_path / "shard_00003.npz").write_bytes(original)
    with pytest.raises(ValueError, match=r"shard_00003.npz holds ids that are not in the list"):
        Samples(tmp_path)
    (tmp_path / "shard_00003.npz").unlink()
    listed.write_text("\n".join(lines[::-1]))
    with pytest.raises(ValueError, match="is not the list that these samples were made of"):
        Samples(tmp_path)
    listed.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(ValueError, match="ids more than once"):
        Samples(tmp_path)
    listed.write_text("\n".join(lines))
    declared = json.loads((tmp_path / "protocol.json").read_text())
    (tmp_path / "protocol.json").write_text(json.dumps(declared | {"num": 9}))
    with pytest.raises(ValueError, match="declares 9 samples of a list of 10"):
        Samples(tmp_path)


def test_a_failing_reader_fails_the_job(tmp_path):
    writer = open_job(tmp_path, ITEMS, PROTOCOL)

    def read(numbers):
        if 5 in numbers:
            raise ValueError("item 005 cannot be read")
        return numbers, None

    with pytest.raises(ValueError, match="item 005 cannot be read"):
        make_samples(writer, writer.missing(), read, lambda _, numbers: pixels_of(numbers), 4)
    assert writer.missing() == [1, 2]
