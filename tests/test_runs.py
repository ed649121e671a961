"""Whole runs as users start them: real processes, real signals, real files (invariants 2, 3, 6 and 7)."""

import json
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from PIL import Image

from configs import i2i
from lumos_jax import sample
from lumos_jax.config import io as config_io
from lumos_jax.train import run as run_module
from tests.running import arrays, assert_same_bits, finish, metrics, pixels, rewound, start, wait_for


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, command):
    """The run that the others must equal: the test config to its end."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, finish(start(command(workdir)))


def logged(workdir):
    """The last step whose loss is in metrics.jsonl, which may be being written."""
    path = workdir / "metrics.jsonl"
    found = re.findall(r'"step": (\d+), .*"loss"', path.read_text()) if path.exists() else []
    return int(found[-1]) if found else 0


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


def test_stopped_killed_and_restarted_equals_undisturbed_bit_for_bit(undisturbed, command, tmp_path):
    """Signals fall at random moments after a logged step, so possibly during a save."""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process, before = start(command(tmp_path)), logged(tmp_path)
        wait_for(lambda before=before, process=process: logged(tmp_path) > before or process.poll() == 0, process)
        time.sleep(random.random() * 0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        assert process.returncode in (code, 0), output  # it may just have ended
        if process.returncode > 0:
            assert f"{signal.Signals(number).name}: saved step" in output
    finish(start(command(tmp_path)))
    step, state = arrays(tmp_path)
    assert step == 12
    assert_same_bits(state, arrays(undisturbed[0])[1])
    assert metrics(tmp_path) == metrics(undisturbed[0])


def test_a_second_run_in_the_same_directory_is_refused(command, tmp_path):
    first = start(command(tmp_path, "train.steps=100000", "eval.every=0", "optimizer.decay=constant"))
    wait_for((tmp_path / "metrics.jsonl").exists, first)
    output = finish(start(command(tmp_path, "train.seed=1")), code=2)
    assert output.startswith("error: ")
    assert f"in use by another run (process {first.pid} on " in output
    first.kill()
    first.wait(60)


def test_half_written_checkpoints_are_ignored_and_other_meshes_go_on(undisturbed, command, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "12"
    # What a kill in the middle of a save leaves behind: a directory under Orbax's temporary name.
    newest.rename(newest.with_name("12.orbax-checkpoint-tmp"))
    output = finish(start(command(tmp_path, "mesh.fsdp=2", devices=4)))
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
    outputs = in_two(tmp_path, "mesh.fsdp=4", devices=2)
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


def prepared(workdir, fields):
    """What `main` does before the first step, in this process: it ends with code 2 at a ValueError."""
    changed = i2i.get_config("test")
    changed.update_from_flattened_dict(fields)
    return run_module.prepare(config_io.resolve(changed), str(workdir))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.size": "XXL"}, "must be one of S, B, L, XL, or"),
        ({"mesh.fsdp": 3}, "does not fit 8 device"),
        ({"data.source": "folder", "data.path": "/nowhere"}, "not a directory"),
        ({"encoder.weights": "/nowhere.safetensors"}, "no such file"),
        ({"init_from": "/nowhere"}, "no checkpoint"),
    ],
)  # fmt: skip
def test_mistakes_are_errors_of_the_user(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path / "run", fields)


def test_a_mistake_is_one_line_and_code_2(command, tmp_path):
    output = finish(start(command(tmp_path / "run", "data.source=folder", "data.path=/nowhere")), code=2)
    assert output == "error: config.data.path='/nowhere' is not a directory\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["main", "prepare"])
def test_help_is_an_answer_and_no_error(program, module):
    output = finish(start(program(f"lumos_jax.{module}", "--help")))
    assert "--config=configs/i2i.py:desk" in output
    assert len(output.splitlines()) < 40


def test_init_from_starts_from_the_other_runs_ema(undisturbed, command, tmp_path):
    fields = (f"init_from={undisturbed[0]}", "optimizer.learning_rate=0.0", "train.steps=4", "optimizer.decay=constant")
    output = finish(start(command(tmp_path, *fields)))
    assert "hand-off from" in output
    account = json.loads((tmp_path / "handoff.json").read_text())
    assert account["dropped"] == account["reinitialised"] == []
    assert_same_bits(arrays(tmp_path)[1]["params"], arrays(undisturbed[0])[1]["ema"])
    narrow = {"init_from": str(undisturbed[0]), "model.size": "64x2x2"}
    with pytest.raises(ValueError, match=r"model\.size"):
        prepared(tmp_path, narrow)
    with pytest.raises(ValueError, match="do not fit this model"):
        prepared(tmp_path / "other", narrow)


def test_adapters_train_resume_and_sample(undisturbed, command, tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "a.png")
    fields = (f"init_from={undisturbed[0]}", "finetune.lora_rank=2", "finetune.trainable=('final/*',)", "log.every=4",
              "optimizer.decay=constant", "optimizer.state_dtype=bfloat16",
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
