"""What goes wrong on clusters: processes killed at any moment, storage that damages or fails (invariants 2, 3 and 7)."""

import json
import random
import shutil
import time

import numpy as np
import pytest

from tests import forks
from tests.ports import free_port

LONG = 900  # seconds, on a busy machine
FIELDS = (
    "train.steps=24", "optimizer.decay=constant", "checkpoint.every=2", "log.every=1", "eval.every=0", "log.tensorboard=False",
    "train.compilation_cache=",
)  # fmt: skip


@pytest.fixture(scope="module")
def start(process_environment, tmp_path_factory):
    """(workdir, count, *fields) -> the processes of one run."""
    environment = process_environment(1)
    environment["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # what is compiled runs a few times only
    server = forks.Forks(environment, tmp_path_factory.mktemp("printed"))

    def begin(workdir, count, *fields):
        coordinator, processes = f"--coordinator=localhost:{free_port()}", []
        for i in range(count):
            arguments = ["--config=configs/i2i.py:test", f"--workdir={workdir}"]
            arguments += [f"--config.{field}" for field in (*FIELDS, *fields)]
            if count > 1:
                arguments += [coordinator, f"--processes={count}", f"--process={i}"]
            processes.append(server.start(arguments))
        return processes

    yield begin
    server.close()


def ends(processes, code=0):
    for process in processes:
        assert process.wait(LONG) == code, process.output()
    return [process.output() for process in processes]


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(workdir):
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines(workdir)}


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """A run of two processes that nobody kills."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    outputs = ends(start(workdir, 2))
    assert "2 process(es)" in outputs[0]
    assert "goodput" in outputs[0]
    assert "loss" not in outputs[1]  # only the first process speaks
    assert "run  " not in outputs[1]
    return workdir


def test_killed_five_times_and_nothing_is_lost(undisturbed, start, tmp_path):
    """Either process, at seeded moments: as steps or saves are under way. The other one ends within a minute."""
    chance = random.Random(5)
    for kill in range(5):
        processes = start(tmp_path, 2)
        beyond, until = 3 * kill + 2, time.monotonic() + LONG
        while not any(line["step"] >= beyond for line in lines_so_far(tmp_path)):
            assert all(process.poll() is None for process in processes), [p.output() for p in processes]
            assert time.monotonic() < until, "nothing happens"
            time.sleep(0.005)
        time.sleep(chance.random() * 0.05)
        victim = kill % 2
        processes[victim].kill()
        code = processes[1 - victim].wait(60)
        output = processes[1 - victim].output()
        assert code not in (0, 2), output  # launchers start it again
    output = ends(start(tmp_path, 2))[0]
    assert "continues at step" in output
    assert losses(tmp_path) == losses(undisturbed)
    assert sorted(losses(tmp_path)) == list(range(1, 25))
    last = lines(tmp_path)[-1]
    assert last["goodput_lost_redone"] > 0
    assert last["goodput_lost_restore"] > 0
    assert last["goodput_lost_startup"] > lines(tmp_path)[0]["goodput_lost_startup"]  # that of all starts


def lines_so_far(workdir):
    try:
        return lines(workdir)
    except json.JSONDecodeError:  # read as a line was being written
        return []


def damage(checkpoint):
    """Changes one byte in the largest file, as a bad disk does."""
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x10
    largest.write_bytes(bytes(content))


def test_a_damaged_checkpoint_is_set_aside_and_one_process_goes_on_from_two(undisturbed, start, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(int(path.name) for path in checkpoints.iterdir()) == [20, 22, 24]
    damage(checkpoints / "24")
    (checkpoints / "22" / "meta" / "metadata").write_text('{"settings": ')
    (output,) = ends(start(tmp_path / "run", 1, "train.steps=26"))
    assert "continues at step 20, as 24, 22 cannot be restored" in output
    assert sorted(path.name for path in (tmp_path / "run" / "damaged").iterdir()) == ["22", "24"]
    whole = losses(undisturbed)
    for step, values in losses(tmp_path / "run").items():
        if step in whole:
            np.testing.assert_allclose(values, whole[step], rtol=1e-5)
    assert 26 in losses(tmp_path / "run")


def test_where_no_checkpoint_is_good_nothing_starts_from_scratch(undisturbed, start, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for path in checkpoints.iterdir():
        (path / "meta" / "metadata").unlink()
    (output,) = ends(start(tmp_path / "run", 1), code=1)
    assert "none of the 3 checkpoint(s)" in output.splitlines()[-1]
    assert sorted(int(path.name) for path in checkpoints.iterdir()) == [20, 22, 24]
