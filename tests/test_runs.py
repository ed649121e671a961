"""Whole runs as users start them: real processes, real signals, real files (invariants 2, 3, 6 and 7)."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from lumos_jax import sample
from tests.running import ROOT, arrays, assert_same_bits, finish, metrics, pixels, rewound, start, wait_for


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, command):
    """The run that the others must equal: the test config to its end."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, finish(start(command(workdir)))


def logged(workdir, step):
    path = workdir / "metrics.jsonl"
    return path.exists() and any(f'"step": {n},' in path.read_text() for n in range(step, 13))


def test_a_run_leaves_what_design_names(undisturbed):
    workdir, output = undisturbed
    assert "held-out loss" in output
    assert str(workdir / "samples") in output
    assert (workdir / "config.json").exists()
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [4, 8, 12]
    for step in (6, 12):
        assert pixels(workdir / "samples" / f"step_{step}.png").shape[1] > 3 * 128
    lines = metrics(workdir)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    needed = {"loss", "grad_norm", "learning_rate", "corrupt_records", "loss_q1", "loss_q4"}
    assert needed <= set(lines[1]) | set(lines[2])
    held_out = [line for line in lines if "held_out_loss" in line]
    assert [line["step"] for line in held_out] == [0, 6, 12]
    assert held_out[-1]["held_out_loss"] < held_out[0]["held_out_loss"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_and_restarted_equals_undisturbed_bit_for_bit(undisturbed, command, tmp_path, number):
    """The kill falls at a random moment after the first logged step, so possibly during a save."""
    process = start(command(tmp_path))
    wait_for(lambda: logged(tmp_path, 4 if number == signal.SIGKILL else 2), process)
    time.sleep(random.random() * 0.3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    elif process.returncode:  # it may just have ended
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], output
        assert f"{signal.Signals(number).name}: saved step" in output
    finish(start(command(tmp_path)))
    step, state = arrays(tmp_path)
    assert step == 12
    assert_same_bits(state, arrays(undisturbed[0])[1])
    assert metrics(tmp_path) == metrics(undisturbed[0])


def test_half_written_checkpoints_are_ignored_and_other_meshes_go_on(undisturbed, command, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "12"
    # What a kill in the middle of a save leaves behind: a directory under Orbax's temporary name.
    newest.rename(newest.with_name("12.orbax-checkpoint-tmp"))
    output = finish(start(command(tmp_path, "mesh.data=2", "mesh.fsdp=2", devices=4)))
    assert "continues at step 8" in output
    a, b = (metrics(path)[-1] for path in (tmp_path, undisturbed[0]))
    np.testing.assert_allclose(a["held_out_loss"], b["held_out_loss"], rtol=1e-5)


@pytest.fixture
def small_disk(tmp_path):
    """Three megabytes of tmpfs, where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk, command):
    fields = ("eval.every=0", "checkpoint.every=2", "checkpoint.keep=5")
    output = finish(start(command(small_disk / "run", *fields)), code=1)
    told = output.splitlines()[-1]
    # Metrics, if it was they that found the disk full.
    assert re.match("error: writing (a checkpoint|metrics or images beside the checkpoints) into ", told), output
    assert "No space left on device" in told
    steps = sorted(int(p.name) for p in (small_disk / "run" / "checkpoints").iterdir() if p.name.isdecimal())
    assert steps
    assert f"the last good checkpoint is {steps[-1]}" in output
    for step in steps[:-1]:  # space is made, and the run goes on
        shutil.rmtree(small_disk / "run" / "checkpoints" / str(step))
    output = finish(start(command(small_disk / "run", "eval.every=0", "checkpoint.every=100", "checkpoint.keep=1")))
    assert f"continues at step {steps[-1]}" in output


def test_two_processes_agree_with_one(undisturbed, in_two, tmp_path):
    outputs = in_two(tmp_path, "mesh.data=4", "mesh.fsdp=2", devices=4)
    assert "2 process(es)" in outputs[0]
    assert "held-out" not in outputs[1]  # only the first process speaks
    ours, theirs = metrics(tmp_path), metrics(undisturbed[0])
    for a, b in zip(ours, theirs, strict=True):
        assert a["step"] == b["step"]
        for name in ("loss", "held_out_loss", "held_out_null_loss"):
            if name in a:
                np.testing.assert_allclose(a[name], b[name], rtol=1e-5)


def test_a_changed_setting_is_refused_by_name_and_may_be_allowed(undisturbed, command, tmp_path):
    rewound(undisturbed[0], tmp_path, 8)
    changed = ("eval.every=0", "train.seed=5")
    output = finish(start(command(tmp_path, *changed)), code=2)
    assert "train.seed: 0 then, 5 now" in output
    assert "Traceback" not in output
    output = finish(start(command(tmp_path, *changed, "checkpoint.allow_change=('train.seed',)")))
    assert "continues at step 8" in output


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("model.size=XXL",), "must be one of S, B, L, XL, or"),
        (("mesh.data=3",), "does not fit 1 device"),
        (("data.source=folder", "data.path=/nowhere"), "not a directory"),
        (("encoder.weights=/nowhere.safetensors",), "no such file"),
        (("init_from=/nowhere",), "no checkpoint"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_line(command, tmp_path, fields, message):
    output = finish(start(command(tmp_path / "run", *fields)), code=2)
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize("program", ["main", "prepare"])
def test_help_is_an_answer_and_no_error(process_environment, program):
    asked = [sys.executable, "-m", f"lumos_jax.{program}", "--help"]
    output = finish(start({"args": asked, "env": process_environment(1), "cwd": ROOT}))
    assert "--config=configs/i2i.py:desk" in output
    assert len(output.splitlines()) < 40


def test_unknown_fields_are_refused(command, tmp_path):
    output = finish(start(command(tmp_path, "train.stepz=4")), code=2)
    assert "stepz" in output


def test_init_from_starts_from_the_other_runs_ema(undisturbed, command, tmp_path):
    fields = (f"init_from={undisturbed[0]}", "optimizer.learning_rate=0.0", "train.steps=4", "optimizer.decay=constant")
    output = finish(start(command(tmp_path, *fields)))
    assert "hand-off from" in output
    account = json.loads((tmp_path / "handoff.json").read_text())
    assert account["dropped"] == account["reinitialised"] == []
    assert_same_bits(arrays(tmp_path)[1]["params"], arrays(undisturbed[0])[1]["ema"])
    output = finish(start(command(tmp_path, *fields, "model.size=64x2x2")), code=2)
    assert "model.size" in output
    other = tmp_path / "other"
    output = finish(start(command(other, *fields, "model.size=64x2x2")), code=2)
    assert "do not fit this model" in output
    assert not (other / "checkpoints" / "4").exists()


def test_adapters_train_resume_and_sample(undisturbed, command, tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "a.png")
    fields = (f"init_from={undisturbed[0]}", "finetune.lora_rank=2", "finetune.trainable=('final/*',)", "log.every=4",
              "optimizer.decay=constant", "optimizer.ema_dtype=bfloat16", "optimizer.moments_dtype=bfloat16",
              "optimizer.ema_memory=host")  # fmt: skip
    output = finish(start(command(tmp_path / "whole", *fields, "train.steps=8")))
    assert "model       4,592 trainable parameters, 59,392 frozen" in output
    account = json.loads((tmp_path / "whole" / "handoff.json").read_text())
    assert {name.split("/")[0] for name in account["reinitialised"]} == {"lora"}
    assert account["parameters"] == {"loaded": 61040, "reinitialised": 2944, "dropped": 0}
    rewound(tmp_path / "whole", tmp_path / "parts", 4)
    assert "continues at step 4" in finish(start(command(tmp_path / "parts", *fields, "train.steps=8")))
    state = arrays(tmp_path / "whole")[1]
    assert_same_bits(arrays(tmp_path / "parts")[1], state)
    assert_same_bits(state["params"]["patch"], arrays(undisturbed[0])[1]["ema"]["patch"])
    assert set(state["ema"]) == {"final", "lora"}
    kept = [leaf for leaf in jax.tree.leaves((state["ema"], state["opt_state"])) if leaf.ndim]
    assert {str(leaf.dtype) for leaf in kept} == {"bfloat16"}
    drawn = []
    for step in (4, 8):
        out = tmp_path / f"{step}.png"
        images = ["--images", str(tmp_path / "a.png")]
        arguments = [f"--workdir={tmp_path / 'whole'}", *images, "--num=2", f"--checkpoint={step}", f"--out={out}"]
        assert sample.main(arguments) == 0
        drawn.append(pixels(out))
    assert not np.array_equal(*drawn)
