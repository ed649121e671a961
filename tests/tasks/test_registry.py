"""Tasks by name: a new one is one module and one config file."""

import json
import sys

import numpy as np
import pytest

from lumos_jax import sample, tasks
from tests.running import finish, metrics, pixels, start

TOY = '''
"""Images of a mean color: a prior whose condition is that color."""
import dataclasses
from typing import ClassVar
import jax.numpy as jnp
import numpy as np
from lumos_jax.models import Condition
from lumos_jax.tasks import denoising
from lumos_jax.tasks.sampling import Sampling


class ColorSampling(Sampling):
    @classmethod
    def add_flags(cls, parser):
        parser.add_argument("--color", nargs=3, type=float, required=True)

    def sample_inputs(self, args, load):
        return {"color": np.array([args.color], np.float32)}


@dataclasses.dataclass(frozen=True)
class MeanColor(denoising.Denoising):
    name: ClassVar[str] = "lab.mean_color"
    sampling_class: ClassVar = ColorSampling

    @classmethod
    def build(cls, settings, place):
        return denoising.make(cls, settings, place, network={"vector_dim": 3})

    def describe(self):
        return super().describe() | {"condition": "a color"}

    def condition(self, frozen, batch):
        color = batch["color"] if "color" in batch else batch["image"].astype(jnp.float32).mean((1, 2))
        return Condition(vector=color / 255)


TASK = MeanColor
'''
CONFIG = """
from configs import i2i

def get_config(size=""):
    config = i2i.get_config(size)
    config.task.name = "lab.mean_color"
    config.train.steps, config.optimizer.decay = 2, "constant"
    return config
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with the module lab.mean_color and its config."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "mean_color.py").write_text(TOY)
    (tmp_path / "lab" / "config.py").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("lab", "lab.mean_color"):
        sys.modules.pop(name, None)


def test_a_new_task_is_one_file_and_one_config(lab, command, tmp_path, capsys):
    workdir = tmp_path / "run"
    start_with = command(workdir, config=f"{lab}/lab/config.py:test")
    start_with["env"]["PYTHONPATH"] += f":{lab}"
    output = finish(start(start_with))
    assert "condition   a color" in output
    losses = [line["loss"] for line in metrics(workdir) if "loss" in line]
    assert len(losses) == 1
    assert np.isfinite(losses).all()
    assert json.loads((workdir / "config.json").read_text())["task"]["name"] == "lab.mean_color"
    held_out = [line for line in metrics(workdir) if "held_out_shuffled_margin" in line]
    assert [line["step"] for line in held_out] == [0, 2]

    out = tmp_path / "x.png"
    arguments = [f"--workdir={workdir}", "--color", "200", "0", "0", "--num=2", "--steps=2"]
    assert sample.main([*arguments, f"--out={out}"]) == 0
    assert pixels(out).shape == (128 + 32, 2 * (128 + 16) + 16, 3)  # two samples side by side
    assert sample.main([*arguments, "--images", "a.png"]) == 2
    assert "whose task is lab.mean_color: it takes --color;" in capsys.readouterr().err


def test_tasks_are_the_modules_that_define_one():
    names = tasks.task_names()
    assert names == [
        "class_conditional", "contrastive", "dino", "i2i", "i2v", "moco", "nvs", "rcg", "t2i", "unconditional"
    ]  # fmt: skip
    assert all(tasks.task_class(name).name == name for name in names)


@pytest.mark.parametrize("name", ["i2j", "sampling", "lab.nothing", "json.decoder"])
def test_other_names_are_refused(name):
    with pytest.raises(
        ValueError, match=f"config.task.name='{name}' is neither one of class_conditional, contrastive, dino,"
    ):
        tasks.task_class(name)
