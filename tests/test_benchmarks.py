"""benchmarks.accelerator on an image that has jax, flax, optax, numpy and what these bring, and nothing else; and what
benchmarks.loop trains on."""

import importlib.metadata
import re
import subprocess

import numpy as np

from benchmarks import loop
from configs import i2i
from lumos_jax import data
from lumos_jax.config import io as config_io
from tests.running import ROOT

BROUGHT = {"jax", "flax", "optax", "numpy", "orbax-checkpoint", "absl-py", "scipy", "fsspec", "importlib-resources"}
CODE = """
import runpy, sys

class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = ["accelerator", "--only=step", "--child", "--small", "--steps=1"]
runpy.run_module("benchmarks.accelerator", run_name="__main__")
"""


def test_accelerator_needs_few_packages(program):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in lines if line[0] != "#"}
    ours = {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if {name.lower().replace("_", "-") for name in distributions} & (names - BROUGHT)
    }
    assert {"ml_collections", "PIL", "tqdm"} <= ours
    process = program("benchmarks.accelerator")
    process["args"] = [process["args"][0], "-c", CODE.format(absent=ours)]
    done = subprocess.run(**process, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| test \| 16 \| 16 \|.*\| \d\.\d{4} \|$", done.stdout, re.MULTILINE), done.stdout


def test_the_loops_records_in_memory_are_those_of_their_source():
    settings = config_io.resolve(i2i.test()).data
    source, records = data.make_source(settings), range(4)
    theirs = data.read_batch(settings, source, records)
    ours = data.read_batch(settings, loop.InMemory(source, 4), records)
    np.testing.assert_array_equal(ours["image"], theirs["image"])
