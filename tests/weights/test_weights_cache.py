"""Converted weights kept between starts: the same network, made anew when anything differs, and never a reason to stop."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lumos_jax import config, encoders
from lumos_jax.weights import files, torch_writer, weights_cache

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(weights_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(weights_cache, "_said", set())
    return tmp_path / "cache"


@pytest.fixture
def source(goldens, tmp_path):
    """A ViT as a .pth file, under Hugging Face's names."""
    path = tmp_path / "vit.pth"
    torch_writer.save(path, load_file(goldens / "hf_dinov2" / "model.safetensors"))
    return path


def make(path):
    return encoders.make_encoder(config.Encoder(weights=str(path), image_size=56, resize=56, heads=4))


def entries(cache):
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def same(a, b):
    return a[0] == b[0] and jax.tree.all(jax.tree.map(np.array_equal, a[1], b[1]))


def test_the_second_start_reads_what_the_first_converted(cache, source, monkeypatch):
    monkeypatch.setenv(weights_cache.VARIABLE, "")
    plain = make(source)
    assert not cache.exists()
    monkeypatch.setenv(weights_cache.VARIABLE, str(cache))
    assert same(make(source), plain)
    (entry,) = entries(cache)
    assert json.loads((entry / "network.json").read_text())["origin"] == str(source)
    assert [path.name for path in cache.iterdir()] == [entry.name]
    monkeypatch.setattr(files, "read", refuse_but(entry, files.read))
    assert same(make(source), plain)
    os.utime(source, ns=(1, 1))
    with pytest.raises(AssertionError, match=r"vit\.pth was read"):
        make(source)


def refuse_but(entry, read):
    def instead(path, *more):
        assert path.parent == entry, f"{path} was read"
        return read(path, *more)

    return instead


def test_our_own_and_safetensors_are_not_kept(cache, goldens):
    encoders.make_encoder(config.Encoder(weights=str(goldens / "hf_dinov2"), image_size=56, resize=56))
    encoders.make_encoder(config.Encoder(weights="scenes", image_size=32, resize=32))
    assert not cache.exists()


def cut(entry):
    path = entry / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(entry):
    path = entry / "weights.safetensors"
    held = bytearray(path.read_bytes())
    held[-100] ^= 1
    path.write_bytes(held)


def spoil(entry):
    (entry / "network.json").write_text("{")


def lose(entry):
    (entry / "network.json").unlink()


@pytest.mark.parametrize("damage", [cut, flip, spoil, lose])
def test_damaged_entries_are_noticed_and_made_again(cache, source, caplog, damage):
    plain = make(source)
    (entry,) = entries(cache)
    before = (entry / "weights.safetensors").read_bytes()
    damage(entry)
    assert same(make(source), plain)
    assert "is damaged" in caplog.text
    assert entries(cache) == [entry]
    assert (entry / "weights.safetensors").read_bytes() == before
    assert len(list(cache.iterdir())) == 1


def test_a_directory_that_cannot_be_written_is_told_once(cache, source, caplog):
    cache.write_text("a file in its place")
    assert same(make(source), make(source))
    assert caplog.text.count("cannot be kept in") == 1


def test_a_full_disk_in_the_middle_is_told_once(cache, source, caplog, monkeypatch):
    add = files.Writer.add

    def full(self, name, array):
        if name.startswith("blocks"):
            raise OSError(28, "No space left on device")
        add(self, name, array)

    monkeypatch.setattr(files.Writer, "add", full)
    assert same(make(source), make(source))
    assert caplog.text.count("No space left on device") == 1
    assert list(cache.iterdir()) == []


def test_weights_that_do_not_fit_leave_nothing(cache, tmp_path, goldens):
    state = load_file(goldens / "hf_dinov2" / "model.safetensors")
    state["surprise"] = np.zeros(3, np.float32)
    torch_writer.save(tmp_path / "a.pth", state)
    with pytest.raises(ValueError, match="surprise"):
        make(tmp_path / "a.pth")
    assert list(cache.iterdir()) == []


PROCESS = """
import sys
from lumos_jax.encoders.placement import Take
from lumos_jax.encoders.vit_files import load_vit
take = Take()
load_vit(sys.argv[1], 4, take)
print(take.total())
"""


def test_several_processes_at_once(cache, source):
    both = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(source)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    found = {process.communicate(timeout=120)[0] for process in both}
    assert len(found) == 1
    assert make(source)[0].identity == f"vit.pth@{found.pop().strip()}"
    assert len(list(cache.iterdir())) == 1
