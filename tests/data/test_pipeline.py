"""Order (invariant 1), held-out records, worker processes, corrupt records."""

import collections
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from lumos_jax import config, data
from lumos_jax.data import order
from lumos_jax.data import workers as workers_


@pytest.fixture
def folder(tmp_path):
    """23 JPEGs whose gray level is their number times ten."""
    for i in range(23):
        Image.new("RGB", (20, 20), (i * 10,) * 3).save(tmp_path / f"{i:02}.jpg", quality=95)
    return config.Data(source="folder", path=str(tmp_path), image_size=8, holdout=3)


def steps(settings, rows, count, *, batch=6, start=0):
    source = data.make_source(settings)
    iterator = data.make_train_iterator(settings, source, batch_size=batch, rows=rows, start_step=start)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        for name in ("record", "image", "weight", "problem"):
            assert np.array_equal(a[name], b[name]), name


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_rows_do_not_depend_on_the_number_of_hosts(folder, hosts):
    folder = dataclasses.replace(folder, crop="random", flip=True)
    whole = steps(folder, range(12), 4, batch=12)
    # Neighboring rows per host, and rows dealt out in turn, as a mesh may place them.
    near = [steps(folder, range(h * 12 // hosts, (h + 1) * 12 // hosts), 4, batch=12) for h in range(hosts)]
    dealt = [steps(folder, range(h, 12, hosts), 4, batch=12) for h in range(hosts)]
    for step in range(4):
        for name in ("record", "image", "weight"):
            assert np.array_equal(np.concatenate([part[step][name] for part in near]), whole[step][name])
            for h in range(hosts):
                assert np.array_equal(dealt[h][step][name], whole[step][name][h::hosts])


@pytest.mark.parametrize("start", [1, 5, 11])
def test_the_position_is_a_number(folder, start):
    folder = dataclasses.replace(folder, crop="random", flip=True)
    whole = steps(folder, range(6), 13)
    assert_same(whole[start:], steps(folder, range(6), 13 - start, start=start))


def test_batches_hold_the_records_they_name(folder):
    for batch in steps(folder, range(6), 3):
        assert np.abs(batch["image"].mean((1, 2, 3)) - 10 * batch["record"]).max() < 2
        assert (batch["problem"] == "").all()
        assert {name: (a.dtype.kind, a.shape) for name, a in batch.items()} == {
            "image": ("u", (6, 8, 8, 3)), "weight": ("f", (6,)), "record": ("i", (6,)), "problem": ("U", (6,)),
        }  # fmt: skip


def test_each_epoch_is_another_permutation_of_the_training_records(folder):
    source = data.make_source(folder)
    held = data.holdout_records(folder, source)
    positions = order.training_order(folder, source)
    epochs = [[int(positions(e * 20 + i)) for i in range(20)] for e in range(3)]
    for epoch in epochs:
        assert sorted([*epoch, *held]) == list(range(23))
    assert len({*map(tuple, epochs)}) == 3
    other = dataclasses.replace(folder, seed=1)
    assert data.holdout_records(other, source) == held
    assert [int(order.training_order(other, source)(i)) for i in range(20)] not in epochs


class Numbered(data.Source):
    """Records that are their numbers."""

    def __init__(self, count):
        self.count = count

    @classmethod
    def open(cls, settings):
        return cls(settings.records)

    def __len__(self):
        return self.count

    def read(self, index):
        return np.full((4, 4, 3), index, np.uint8)

    def describe(self, index):
        return f"number {index}"

    def fingerprint(self):
        return str(self.count)


@pytest.mark.parametrize("count", [10, 4000, 9000])  # below and above where Grain's shuffle takes over
def test_large_and_small_sets_are_permuted_alike(count):
    settings = config.Data(holdout=7)
    source = Numbered(count)
    held = data.holdout_records(settings, source)
    positions = order.training_order(settings, source)
    kept = count - 7
    first, second = ([int(positions(e * kept + i)) for i in range(kept)] for e in range(2))
    assert sorted(held + first) == sorted(held + second) == list(range(count))
    if count > 1000:
        # What a random permutation does: hardly a record stays, and neighbors are count / 3 apart.
        assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
        assert np.isclose(np.abs(np.diff(first)).mean(), count / 3, rtol=0.05)
        assert np.isclose(np.mean(first[: kept // 4]), count / 2, rtol=0.1)


def test_order_stays_as_it_was():
    # These numbers are the contract with runs that resume: they change with data.seed and the records only.
    settings = config.Data(holdout=2, seed=3)
    small, large = order.training_order(settings, Numbered(50)), order.training_order(settings, Numbered(2_000_000))
    assert [int(small(i)) for i in (0, 1, 47, 48, 1000)] == [48, 30, 22, 26, 24]
    assert [int(large(i)) for i in (0, 1, 1_999_997, 1_999_998, 10**12)] == [1404590, 1720525, 1659172, 239500, 1328555]


def test_holding_out_everything_is_refused(folder):
    source = data.make_source(folder)
    for holdout in (23, 24):
        with pytest.raises(ValueError, match=f"holdout={holdout} leaves nothing to train on.* has 23 records"):
            data.holdout_records(dataclasses.replace(folder, holdout=holdout), source)
    assert len(data.holdout_records(dataclasses.replace(folder, holdout=22), source)) == 22
    with pytest.raises(ValueError, match="4294967296 records are more than"):
        order.training_order(config.Data(), Numbered(2**32))


@pytest.fixture
def mixture(tmp_path):
    for name, count, gray in (("a", 8, 50), ("b", 30, 200)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (9, 9), gray).save(tmp_path / name / f"{i}.png")
    entries = tuple(
        {"source": "folder", "path": str(tmp_path / name), "weight": weight}
        for name, weight in (("a", 0.75), ("b", 0.25))
    )
    return config.Data(source="mixture", mixture=entries, image_size=8, holdout=4)


def test_mixture_follows_its_weights_and_holds_out_from_all(mixture):
    source = data.make_source(mixture)
    assert len(source) == 38
    held = data.holdout_records(mixture, source)
    assert sorted(source.locate(r)[0] for r in held) == [0, 0, 0, 1]
    batches = steps(mixture, range(8), 20, batch=8)
    for batch in batches:
        assert abs((batch["record"] < 8).sum() - 6) <= 1  # in every batch, not only on average
    records = np.concatenate([b["record"] for b in batches])
    assert np.isclose(np.mean(records < 8), 0.75, atol=0.01)
    assert not set(records) & set(held)
    # Each source goes through its own epochs: 120 draws of 5 records are 24 of each.
    assert set(collections.Counter(records[records < 8]).values()) == {24}
    light = np.concatenate([b["image"].mean((1, 2, 3)) for b in batches])
    assert np.array_equal(light > 100, records >= 8)
    assert_same(batches[7:9], steps(mixture, range(8), 2, batch=8, start=7))
    parts = [steps(mixture, rows, 3, batch=8) for rows in (range(5), range(5, 8))]
    assert np.array_equal(np.concatenate([part[2]["record"] for part in parts]), batches[2]["record"])


@pytest.mark.parametrize("weights", [(1 / 3, 2 / 3), (0.1, 0.3), (7.0, 1.0), (0.12, 1.0)])
def test_mixture_weights_are_kept_to_half_a_percent(mixture, weights):
    entries = [entry | {"weight": weight} for entry, weight in zip(mixture.mixture, weights, strict=True)]
    mixture = dataclasses.replace(mixture, mixture=tuple(entries), holdout=0)
    positions = order.training_order(mixture, data.make_source(mixture))
    drawn = sum(positions(i) < 8 for i in range(40_000))
    assert np.isclose(drawn / (40_000 - drawn), weights[0] / weights[1], rtol=0.005)


def test_random_crops_and_flips_belong_to_the_position(tmp_path):
    ramp = np.repeat(np.arange(60, dtype=np.uint8)[None, :, None] * 4, 20, axis=0).repeat(3, axis=2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    settings = config.Data(source="folder", path=str(tmp_path), image_size=20, crop="random", flip=True, seed=-1)
    batches = steps(settings, range(50), 4, batch=50)
    images = np.concatenate([b["image"] for b in batches])[:, 10, :, 0].astype(int)
    flipped = images[:, 0] > images[:, -1]
    assert 60 < flipped.sum() < 140
    left = np.where(flipped, images[:, -1], images[:, 0]) / 4  # 0 .. 40
    assert left.min() < 3
    assert left.max() > 37
    assert np.isclose(left.mean(), 20, atol=4)
    other = steps(dataclasses.replace(settings, seed=5), range(50), 1, batch=50)[0]["image"]
    assert not np.array_equal(other, batches[0]["image"])
    # Evaluation does not depend on any of it.
    source = data.make_source(settings)
    middle = data.read_batch(settings, source, [0, 0])["image"][:, 10, :, 0]
    assert np.array_equal(middle, np.stack([ramp[10, 20:40, 0]] * 2))


def test_worker_processes_give_the_same_batches(folder, tmp_path):
    (tmp_path / "05.jpg").write_bytes(b"not an image")
    # Large enough that pictures come through shared memory.
    folder = dataclasses.replace(folder, crop="random", flip=True, image_size=96)
    worked = steps(dataclasses.replace(folder, workers=2), range(6), 7, start=2)
    assert_same(steps(folder, range(6), 7, start=2), worked)
    assert worked[0]["image"].nbytes >= workers_.SHARED_FROM


def test_shared_memory_that_is_too_small_is_refused(folder, monkeypatch):
    usage = collections.namedtuple("usage", "free")(1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    folder = dataclasses.replace(folder, workers=2, image_size=256)
    with pytest.raises(ValueError, match=r"workers=2 needs about \d+ MiB in /dev/shm, which has 1 MiB free"):
        data.make_train_iterator(folder, data.make_source(folder), batch_size=8, rows=range(8), start_step=0)


PROGRAM = """
import multiprocessing, signal, sys, time
from absl import app
from lumos_jax import config, data
from tests.fields import data_settings

def main(argv):
    settings = data_settings(source="scenes", scenes__num_scenes=1000, image_size=96, workers=2)
    batches = data.make_train_iterator(settings, data.make_source(settings), batch_size=4, rows=range(4), start_step=0)
    print("starting", flush=True)
    try:
        for step in range(100000):
            next(batches)
            if step == 1:
                print("workers", *[child.pid for child in multiprocessing.active_children()], flush=True)
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        batches.close()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    app.run(main)
"""


@pytest.fixture
def program(tmp_path):
    """A training program with workers, in a process group of its own."""
    (tmp_path / "program.py").write_text(PROGRAM)
    root = pathlib.Path(data.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_die_with_a_killed_trainer(program):
    assert program.stdout.readline() == "starting\n"
    workers = [int(word) for word in program.stdout.readline().split()[1:]]
    assert len(workers) == 2
    assert all(map(alive, workers))
    program.kill()
    program.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


@pytest.mark.parametrize("when", ["starting", "workers"])
def test_ctrl_c_leaves_no_tracebacks_of_workers(program, when):
    while not program.stdout.readline().startswith(when):
        pass
    time.sleep(0.3)  # while the workers import their modules, or while they decode
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does it: to the workers too
    said, _ = program.communicate(timeout=60)
    assert "Traceback" not in said
    # Nor a word from Python's resource tracker about shared memory that nobody freed.
    assert said.splitlines()[-1] == "interrupted"
    assert program.returncode == 0


def test_a_dead_worker_is_an_error_and_no_hang(folder):
    source = data.make_source(folder)
    folder = dataclasses.replace(folder, workers=1)
    batches = data.make_train_iterator(folder, source, batch_size=6, rows=range(6), start_step=0)
    assert_same([next(batches)], steps(dataclasses.replace(folder, workers=0), range(6), 1))
    for child in multiprocessing.active_children():
        if "grain" in child.name:
            os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker process died .*exit code -9"):
        collections.deque(itertools.islice(batches, 100), maxlen=0)
    batches.close()


def test_corrupt_records_are_named_weighted_zero_and_counted(folder, tmp_path):
    (tmp_path / "03.jpg").write_bytes(b"not an image")
    whole = (tmp_path / "04.jpg").read_bytes()
    (tmp_path / "05.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "06.jpg").write_bytes(b"")
    batch = steps(dataclasses.replace(folder, holdout=0), range(23), 1, batch=23)[0]
    bad = {p.split("/")[-1].split(":")[0]: p for p in batch["problem"] if p}
    assert set(bad) == {"03.jpg", "05.jpg", "06.jpg"}
    assert bad["03.jpg"] == f"{tmp_path}/03.jpg: cannot identify image file"
    assert "truncated" in bad["05.jpg"].lower()
    assert bad["06.jpg"].endswith(": empty")
    zero = batch["weight"] == 0
    assert zero.sum() == 3
    assert np.array_equal(zero, np.isin(batch["record"], [3, 5, 6]))
    assert (batch["image"][zero] == 0).all()

    meter = data.CorruptMeter(0.2)
    lines = meter.add(batch)
    assert [line.split(": ")[0] for line in lines] == ["corrupt record 1", "corrupt record 2", "corrupt record 3"]
    assert meter.counts() == {"corrupt_records": 3}
    resumed = data.CorruptMeter(0.1, meter.state())
    for _ in range(7):  # below 200 records a rate says little
        resumed.add(batch)
    with pytest.raises(
        data.TooManyCorruptRecords, match=r"27 of 207 records \(13.0%\).*max_corrupt_rate=10.*0[356].jpg"
    ):
        resumed.add(batch)


def test_a_clean_stretch_stays_below_the_rate():
    meter = data.CorruptMeter(0.01)
    clean = {"weight": np.ones(100), "problem": np.zeros(100, "<U9")}
    spoiled = {"weight": np.ones(100), "problem": np.array(["a: bad", *[""] * 99])}
    for _ in range(50):
        assert len(meter.add(spoiled)) <= 2
        assert meter.add(clean) == []
    assert meter.counts() == {"corrupt_records": 50}
    named = data.CorruptMeter(1.0)
    half = {"weight": np.zeros(50), "problem": np.full(50, "a: bad")}
    said = [line for _ in range(50) for line in named.add(half)]
    assert len(said) == 20 + 1 + 2  # twenty names, a word on it, and the 1000th and 2000th


def test_a_file_that_vanishes_is_a_corrupt_record(folder, tmp_path):
    source = data.make_source(folder)
    (tmp_path / "00.jpg").unlink()
    batch = data.read_batch(folder, source, [0, 1])
    assert list(batch["weight"]) == [0.0, 1.0]
    assert "00.jpg" in batch["problem"][0]
