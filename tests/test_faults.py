"""What goes wrong on clusters: processes killed at any moment, storage that damages or fails (invariants 2, 3 and 7)."""

import json
import random
import resource
import shutil
import socket
import struct
import threading
import time

import numpy as np
import pytest

from tests import running

LONG = 900  # seconds, on a busy machine
FIELDS = ("train.steps=16", "optimizer.decay=constant", "checkpoint.every=2", "log.every=1", "eval.every=0")


@pytest.fixture(scope="module")
def begin(command):
    """(workdir, count, *fields) -> the processes of one run, which meet at `port`."""

    def run(workdir, count, *fields, port=None):
        flags, coordinator = [()], f"--coordinator=localhost:{port or running.free_port()}"
        if count > 1:
            flags = [(coordinator, f"--processes={count}", f"--process={i}") for i in range(count)]
        return [running.start(command(workdir, *FIELDS, *fields, flags=own)) for own in flags]

    return run


def ends(processes, code=0):
    for process in processes:
        assert process.wait(LONG) == code, process.output()
    return [process.output() for process in processes]


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(workdir):
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines(workdir)}


def disturb(port, over):
    """Connects to a port as scanners do, with and without bytes, closing or resetting; returns how often."""
    noise, count = random.Random(1), 0
    while not over.is_set():
        for data in (
            b"",
            b"GET / HTTP/1.0\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + noise.randbytes(99),
            noise.randbytes(9999),
        ):
            try:
                with socket.create_connection(("localhost", port), timeout=2) as link:
                    link.sendall(data)
                    if noise.random() < 0.5:
                        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    count += 1
            except OSError:
                pass
        over.wait(0.05)
    return count


@pytest.fixture(scope="module")
def undisturbed(begin, tmp_path_factory):
    """A run of two processes that nobody kills. Strangers connect to the coordinator's port as it starts and as it trains."""
    workdir, port, over, counts = tmp_path_factory.mktemp("undisturbed"), running.free_port(), threading.Event(), []
    strangers = threading.Thread(target=lambda: counts.append(disturb(port, over)))
    strangers.start()
    try:
        outputs = ends(begin(workdir, 2, port=port))
    finally:
        over.set()
        strangers.join()
    assert counts[0] > 20
    assert "2 process(es)" in outputs[0]
    assert "goodput" in outputs[0]
    assert "loss" not in outputs[1]  # only the first process speaks
    assert "run  " not in outputs[1]
    return workdir


def test_killed_again_and_again_nothing_is_lost(undisturbed, begin, tmp_path):
    """Either process, at seeded moments: as steps or saves are under way; the other one ends within a minute. Last a write
    fails on its way, which ends the run as well."""
    chance = random.Random(5)
    for kill, victim in enumerate((0, 1, 1)):
        processes = begin(tmp_path, 2)
        beyond, until = 4 * kill + 2, time.monotonic() + LONG
        while not any(line["step"] >= beyond for line in lines_so_far(tmp_path)):
            assert all(process.poll() is None for process in processes), [p.output() for p in processes]
            assert time.monotonic() < until, "nothing happens"
            time.sleep(0.005)
        time.sleep(chance.random() * 0.05)
        if kill < 2:
            processes[victim].kill()
        else:
            resource.prlimit(processes[victim].pid, resource.RLIMIT_FSIZE, (100_000, 100_000))  # arrays are larger
            assert processes[victim].wait(LONG) == 1
            assert "error: writing a checkpoint into" in processes[victim].output()
        other = processes[1 - victim]
        assert other.wait(60) not in (0, 2), other.output()  # launchers start it again
        assert "Traceback" not in other.output()
    output = ends(begin(tmp_path, 2))[0]
    assert "continues at step" in output
    assert losses(tmp_path) == losses(undisturbed)
    assert sorted(losses(tmp_path)) == list(range(1, 17))
    last = lines(tmp_path)[-1]
    # Steps that a kill takes count as down time where the account was not written since; test_saving has those that are redone.
    assert last["goodput_lost_down"] > 0
    assert last["goodput_lost_restore"] > 0
    assert last["goodput_lost_startup"] > lines(tmp_path)[0]["goodput_lost_startup"]  # that of all starts


def lines_so_far(workdir):
    try:
        return lines(workdir)
    except json.JSONDecodeError:  # read as a line was being written
        return []


def test_a_mistake_ends_all_processes_with_code_2(begin, tmp_path):
    for output in ends(begin(tmp_path / "run", 2, "data.source=folder", "data.path=/nowhere"), code=2):
        assert "error: config.data.path='/nowhere' is not a directory" in output


def damage(checkpoint):
    """Changes one byte in the largest file, as a bad disk does."""
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x10
    largest.write_bytes(bytes(content))


def test_a_damaged_checkpoint_is_set_aside_and_one_process_goes_on_from_two(undisturbed, begin, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(int(path.name) for path in checkpoints.iterdir()) == [12, 14, 16]
    damage(checkpoints / "16")
    (checkpoints / "14" / "meta" / "metadata").write_text('{"settings": ')
    (output,) = ends(begin(tmp_path / "run", 1, "train.steps=18"))
    assert "continues at step 12, as 16, 14 cannot be restored" in output
    assert sorted(path.name for path in (tmp_path / "run" / "damaged").iterdir()) == ["14", "16"]
    whole = losses(undisturbed)
    for step, values in losses(tmp_path / "run").items():
        if step in whole:
            np.testing.assert_allclose(values, whole[step], rtol=1e-5)
    assert 18 in losses(tmp_path / "run")


def test_where_no_checkpoint_is_good_nothing_starts_from_scratch(undisturbed, begin, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for path in checkpoints.iterdir():
        (path / "meta" / "metadata").unlink()
    (output,) = ends(begin(tmp_path / "run", 1), code=1)
    assert "none of the 3 checkpoint(s)" in output.splitlines()[-1]
    assert sorted(int(path.name) for path in checkpoints.iterdir()) == [12, 14, 16]
