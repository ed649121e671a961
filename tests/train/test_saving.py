"""Checkpoints on storage that fails or damages, the account of lost time, and the watchdog."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lumos_jax import config
from lumos_jax.checkpoints import CheckpointError, Checkpoints
from lumos_jax.checkpoints.checksums import checksums
from lumos_jax.train import goodput, metrics, sharding
from lumos_jax.train.saving import Saver
from lumos_jax.train.stop import watchdog

META = {"settings": {}, "fingerprints": {}, "memory": {}}


def state(seed=0):
    rng = np.random.default_rng(seed)
    return {"params": {"a": rng.normal(size=(8, 6)).astype(np.float32), "b": np.arange(4, dtype=np.int32)}}


def test_digests_know_every_bit_and_no_mesh():
    tree = state()
    whole = checksums(tree)
    assert list(whole) == ["['params']['a']", "['params']['b']"]
    for axes in ({"fsdp": 1}, {"fsdp": 4}, {"fsdp": -1}):
        mesh = sharding.make_mesh(config.Mesh(**axes))
        layout = NamedSharding(mesh, P(("data", "fsdp")))
        spread = {"params": {"a": jax.device_put(tree["params"]["a"], layout), "b": tree["params"]["b"]}}
        assert checksums(spread) == whole
    for bit in (0, 13, 31):
        other = state()
        other["params"]["a"].view(np.uint32)[5, 3] ^= np.uint32(1 << bit)
        changed = checksums(other)
        assert changed["['params']['b']"] == whole["['params']['b']"]
        assert changed["['params']['a']"] != whole["['params']['a']"]
    assert checksums({"x": jnp.asarray([1.0, 2.0], jnp.bfloat16)}) != checksums(
        {"x": jnp.asarray([2.0, 1.0], jnp.bfloat16)}
    )


def test_a_write_that_fails_is_tried_again_with_the_state_of_then(tmp_path, monkeypatch):
    """The directory is away for a while, as a file system is that was unmounted."""
    monkeypatch.setattr("lumos_jax.fileio.delays", lambda: [0.01] * 4)
    checkpoints, said = Checkpoints(tmp_path, config.Checkpoint()), []
    away = tmp_path / "away"
    now = {"step": 1}

    def say(text):
        said.append(text)
        if len(said) == 2:  # it comes back
            (tmp_path / "checkpoints").unlink()
            away.rename(tmp_path / "checkpoints")
            now["step"] = 2

    saver = Saver(checkpoints, lambda: (now["step"], jax.device_put(state(now["step"])), META), say)
    (tmp_path / "checkpoints").rename(away)
    (tmp_path / "checkpoints").touch()
    saver.save()
    saver.wait()
    assert len(said) == 2
    assert "Trying again" in said[0]
    assert saver.saved == 2
    assert checkpoints.steps() == [2]
    found = checkpoints.restore(2, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state()))
    np.testing.assert_array_equal(found["params"]["a"], state(2)["params"]["a"])
    checkpoints.verify(2, found, checkpoints.meta(2))
    with pytest.raises(CheckpointError, match="1 of 2 arrays are not what was written"):
        checkpoints.verify(
            2, found | {"params": found["params"] | {"a": found["params"]["a"] + 1}}, checkpoints.meta(2)
        )
    checkpoints.close()


def test_retries_end(tmp_path, monkeypatch):
    monkeypatch.setattr("lumos_jax.fileio.delays", lambda: [0.01] * 4)
    checkpoints, said = Checkpoints(tmp_path, config.Checkpoint()), []
    saver = Saver(checkpoints, lambda: (1, jax.device_put(state()), META), said.append)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").touch()

    def write():
        saver.save()
        saver.wait()

    with pytest.raises(CheckpointError):
        write()
    assert len(said) == 4


@pytest.mark.parametrize("damage", ["meta", "name"])
def test_a_checkpoint_that_cannot_be_read_back_is_not_saved(tmp_path, monkeypatch, damage):
    monkeypatch.setattr("lumos_jax.fileio.delays", lambda: [0.01])
    workdir = tmp_path / ("run" if damage == "meta" else "[run]")  # which TensorStore takes for a pattern
    workdir.mkdir()
    checkpoints, said = Checkpoints(workdir, config.Checkpoint()), []
    if damage == "meta":
        meta = checkpoints.meta
        monkeypatch.setattr(checkpoints, "meta", lambda step: meta(step) | {"digest": {}})
    saver = Saver(checkpoints, lambda: (1, jax.device_put(state()), META), said.append)
    saver.save()
    with pytest.raises(CheckpointError, match="step 1 cannot be read back"):
        saver.wait()
    assert len(said) == 1
    assert checkpoints.steps() == []
    assert sorted(path.name for path in (workdir / "damaged").iterdir()) == ["1", "1.1"]
    checkpoints.close()


def test_lost_time_is_booked_over_restarts(tmp_path):
    now = [100.0]
    first = goodput.Ledger(tmp_path, 0, active=True, began=90.0, clock=lambda: now[0])
    first.lose("startup", 10.0)
    now[0] = 110.0  # ten seconds of steps
    first.saved(4)
    now[0] = 116.0
    first.lose("data", 2.0)
    first.write()  # killed now, four useful seconds after the checkpoint, and started again at 120
    second = goodput.Ledger(tmp_path, 4, active=True, began=120.0, clock=lambda: now[0])
    now[0] = 130.0
    second.lose("restore", 5.0)
    assert second.lost == {
        "startup": 10.0, "restore": 5.0, "compile": 0.0, "data": 2.0, "save": 0.0, "evaluation": 0.0, "redone": 4.0,
        "down": 4.0,
    }  # fmt: skip
    assert second.metrics()["goodput"] == pytest.approx(15 / 40)
    assert "37.5% of 40 s in steps; lost to startup 10.0 s, restore 5.0 s" in second.summary()


def test_the_speed_counts_waiting_but_neither_evaluation_nor_saving(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    ledger = goodput.Ledger(tmp_path, 0, active=False)
    for _ in range(2):  # the second window as the first
        for part, seconds in (("data", 1.0), ("device", 2.0), ("evaluation", 50.0), ("save", 10.0)):
            with ledger.part(part):
                now[0] += seconds
        now[0] += 1.0
        assert ledger.speed(steps=2, batch_size=8) == {
            "images_per_second": 4.0, "step_seconds": 2.0, "data_wait_fraction": 0.25, "device_wait_fraction": 0.5,
            "host_fraction": 0.25,
        }  # fmt: skip
    assert (ledger.lost["data"], ledger.lost["evaluation"]) == (2.0, 100.0)


ACCOUNT = {"began": 1, "until": 2, "lost": {}, "useful_at": {}}
DAMAGED = (b"", b"{", b"\xff\xfe", b"[]", b"3", b'{"began": 1}')
WRONG = ({"until": "x"}, {"until": float("nan")}, {"lost": []}, {"lost": {"what": 1}}, {"useful_at": {"x": 1}})


@pytest.mark.parametrize("content", [*DAMAGED, *(json.dumps(ACCOUNT | change).encode() for change in WRONG)])
def test_a_damaged_account_of_time_is_begun_anew(tmp_path, capsys, content):
    (tmp_path / "goodput.json").write_bytes(content)
    ledger = goodput.Ledger(tmp_path, 4, active=True, began=90.0, clock=lambda: 100.0)
    assert ledger.began == 90.0
    assert "goodput.json is damaged" in capsys.readouterr().err
    ledger.write()
    assert goodput.Ledger(tmp_path, 4, active=True, began=95.0, clock=lambda: 100.0).began == 90.0


def test_damaged_lines_of_metrics_are_dropped_with_a_warning(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 0.5}).encode() for step in (2, 4, 6)]
    path.write_bytes(b"\n".join([good[0], b"\xff\xfe", b"[]", b"3", b"{}", good[1], good[2], b'{"step": 8, "lo']))
    metrics.Reporter(tmp_path, total=8, start=4, active=True).close()
    assert path.read_bytes() == good[0] + b"\n" + good[1] + b"\n"
    assert "4 damaged line(s) dropped" in capsys.readouterr().err
    metrics.Reporter(tmp_path, total=8, start=4, active=True).close()
    assert capsys.readouterr().err == ""  # half of a last line is what a kill leaves


def test_the_watchdog_prints_stacks_when_no_step_ends(capfd, monkeypatch):
    monkeypatch.setattr("sys.__stderr__", sys.stderr)  # pytest has another
    with watchdog(minutes=0.2 / 60) as alive:
        alive()
        time.sleep(0.5)
    printed = capfd.readouterr().err
    assert printed.count("Timeout") == 2
    assert "test_the_watchdog_prints_stacks" in printed  # where the main thread stands
    with watchdog(minutes=0.2 / 60) as alive:
        for _ in range(4):
            time.sleep(0.1)
            alive()
    assert capfd.readouterr().err == ""
