"""What a run reports: metrics.jsonl, and TensorBoard events that TensorBoard itself reads back."""

import io
import json
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from lumos_jax.train import metrics
from tests import running


@pytest.fixture
def read_events(monkeypatch):
    """(directory) -> TensorBoard's reader of it, kept from importing TensorFlow where that is installed."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing import event_accumulator

    return lambda directory: event_accumulator.EventAccumulator(str(directory)).Reload()


def report(workdir, steps, start=0, loss=lambda step: step / 8):
    reporter = metrics.Reporter(workdir, total=8, start=start, active=True)
    for step in steps:
        reporter.write(step, {"loss": loss(step), "skipped_steps": 0, "learning_rate": np.float32(0.5)})
    return reporter


def test_scalars_and_images_come_back_from_tensorboards_reader(tmp_path, read_events):
    reporter = report(tmp_path, (1, 2, 3))
    sheet = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    reporter.image(3, sheet)
    reporter.close()
    events = read_events(tmp_path / "tensorboard")
    assert events.Tags()["scalars"] == ["loss", "skipped_steps", "learning_rate"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.125), (2, 0.25), (3, 0.375)]
    assert events.Scalars("learning_rate")[2].value == 0.5
    [image] = events.Images("samples")
    assert (image.step, image.width, image.height) == (3, 9, 6)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), sheet)


def test_points_are_visible_before_the_run_ends(tmp_path, read_events):
    reporter = report(tmp_path, (1,))
    assert len(read_events(tmp_path / "tensorboard").Scalars("loss")) == 1
    reporter.close()


def test_a_restart_replaces_what_follows_its_step(tmp_path, read_events):
    report(tmp_path, (1, 2, 3, 4)).close()
    report(tmp_path, (3, 4), start=2, loss=lambda step: -step).close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [(1, 0.125), (2, 0.25), (3, -3), (4, -4)]
    assert [(line["step"], line["loss"]) for line in written] == expected
    assert [(e.step, e.value) for e in read_events(tmp_path / "tensorboard").Scalars("loss")] == expected


def test_reporting_imports_no_tensorflow():
    program = "import sys, lumos_jax.train.metrics; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=running.ROOT, timeout=120, check=False).returncode == 0
