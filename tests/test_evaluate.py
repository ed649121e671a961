"""`lumos_jax.evaluate`: samples that depend on their item alone, jobs that are killed, and the layouts of official scorers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import i2i
from lumos_jax import evaluate
from lumos_jax.config import io as config_io
from lumos_jax.evaluation import lists, shards
from lumos_jax.evaluation.job import make_samples
from lumos_jax.train import items, loop, sampler
from tests import running
from tests.fields import put


def make_run(workdir, made, **changes):
    """A run with a checkpoint of random weights, none of which is zero as at the start of training."""
    made.eval.every, made.eval.steps = 0, 2
    put(made, changes)
    run = loop.prepare(config_io.resolve(made), str(workdir))
    noisy = jax.jit(
        lambda params: jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(0), p.shape), params)
    )
    state = dataclasses.replace(run.start.state, params=noisy(run.start.state.params))
    run.checkpoints.save(1, vars(state), run.meta({}))
    run.checkpoints.wait()
    run.checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    small = {"model__size": "16x1x2", "encoder__size": "16x1x2"}
    return make_run(tmp_path_factory.mktemp("runs") / "i2i", i2i.test(), **small)


def evaluated(*arguments):
    assert evaluate.main(list(map(str, arguments))) == 0


def sampled(run, out, *arguments):
    evaluated("sample", f"--workdir={run}", "--weights=params", "--batch=8", f"--out={out}", *arguments)
    samples = shards.Samples(out)
    samples.verify()
    return samples


def test_samples_depend_on_their_item_alone(run, tmp_path):
    """Of a stochastic sampler, on 1 to 8 devices and in batches of 8 and 64, and of a list that goes on."""
    settings = sampler.load_settings(str(run))[0]
    settings = dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, sampler="ddpm"))
    found = {}
    for devices, batch in ((1, 8), (2, 64), (4, 8), (8, 64)):
        loaded = sampler.load(str(run), settings, weights="params", devices=jax.devices()[:devices], seed=3)
        chosen = lists.make_list("scenes", num=20)
        read = items.ItemReader(loaded.experiment, loaded.sampling, chosen)
        writer = shards.open_job(tmp_path / f"{devices}", chosen, loaded.protocol() | {"shard_size": 8})
        make_samples(writer, writer.missing(), read, loaded.generate_items, batch)
        found[devices] = shards.Samples(tmp_path / f"{devices}")
    assert {tuple(samples.digests()) for samples in found.values()} == {tuple(found[1].digests())}
    (*_, first), *_ = found[1]
    assert first.std(axis=0).mean() > 5  # not one image again and again
    longer = sampled(run, tmp_path / "more", "--set=scenes", "--num=30", "--seed=3", "--sampler=ddpm", "--shard-size=8")
    assert longer.digests()[:2] == found[1].digests()[:2]
    np.testing.assert_array_equal(longer.references(0), found[1].references(0))


def test_a_killed_job_of_two_processes_ends_as_an_uninterrupted_one(run, tmp_path, program, capsys):
    arguments = [f"--workdir={run}", "--weights=params", "--set=scenes", "--num=400", "--shard-size=4"]
    whole = sampled(run, tmp_path / "whole", *arguments[2:])
    joined, out = (f"--coordinator=localhost:{running.free_port()}", "--processes=2"), tmp_path / "killed"
    both = [
        running.start(
            program("lumos_jax.evaluate", "sample", *arguments, f"--out={out}", "--batch=8", *joined, f"--process={i}")
        )
        for i in range(2)
    ]
    running.wait_for(lambda: len(list(out.glob("shard_*.npz"))) > 5, both[0])
    for process in both:
        process.kill()
    for process in both:
        running.finish(process, code=-9)
    with pytest.raises(ValueError, match="lacks"):
        shards.Samples(out)
    capsys.readouterr()
    assert sampled(run, out, *arguments[2:]).digests() == whole.digests()
    assert "of 100 shards are there" in capsys.readouterr().err


def test_folders_held_out_records_and_mistakes(run, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, color in (("a", (200, 30, 30)), ("b", (30, 30, 200))):
        Image.new("RGB", (40, 30), color).save(folder / f"{name}.png")
    samples = sampled(run, tmp_path / "folder", f"--set={folder}")
    assert samples.references(0)[1, 8, 8].tolist() == [30, 30, 200]
    assert sampled(run, tmp_path / "held", "--set=held-out", "--num=4").protocol["paired"]
    capsys.readouterr()
    for arguments, message in (
        ([f"--set={folder}", "--seed=1", f"--out={tmp_path / 'folder'}"], "another protocol (seed 0 there and 1 here)"),
        (
            ["--set=imagenet50k", f"--out={tmp_path / 'x'}"],
            "item '0000_00' of imagenet50k has label, and this run's task",
        ),
        (["--set=held-out", "--num=33", f"--out={tmp_path / 'x'}"], "33 held-out records are wanted"),
        (["--set=scenes", "--batch=0", f"--out={tmp_path / 'x'}"], "--batch=0 must be at least 1"),
        (["--set=scenes", "--sampler=heun", f"--out={tmp_path / 'x'}"], "does not solve"),
        (["--set=scenes"], "required: --out"),
    ):
        assert evaluate.main(["sample", f"--workdir={run}", "--weights=params", *arguments]) == 2, message
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert message in errors[0]


def toy_samples(directory, num):
    """Of GenEval's twin, with random pixels."""
    chosen = lists.make_list("scenes-geneval", num=num)
    images = np.random.default_rng(0).integers(0, 256, (num, 6, 6, 3), np.uint8)
    writer = shards.open_job(directory, chosen, {"shard_size": 5})
    make_samples(writer, writer.missing(), lambda numbers: (None, None), lambda _, numbers: images[numbers], 4)
    return images


def test_layouts_of_official_scorers(tmp_path, capsys):
    images = toy_samples(tmp_path / "prompts", 8)

    def exported(form, name):
        evaluated("export", f"--samples={tmp_path / 'prompts'}", f"--format={form}", f"--out={tmp_path / name}")
        return tmp_path / name

    with np.load(exported("adm-npz", "adm.npz")) as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], images)
    folder = exported("png", "png")
    assert running.pixels(folder / "00001/0002.png").tolist() == images[6].tolist()
    folder = exported("geneval", "geneval")
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*")) == [
        f"{prompt:05d}/{name}"
        for prompt in range(2)
        for name in ("metadata.jsonl", *(f"samples/{k:04d}.png" for k in range(4)))
    ]
    extra = lists.make_list("scenes-geneval").items[4].extra
    assert (folder / "00001/metadata.jsonl").read_text() == json.dumps(extra)
    assert running.pixels(folder / "00001/samples/0003.png").tolist() == images[7].tolist()
    grid = running.pixels(exported("dpg", "dpg") / "00001.png")
    size = images.shape[1]
    for k in range(4):
        left, top = k % 2 * size, k // 2 * size
        assert grid[top : top + size, left : left + size].tolist() == images[4 + k].tolist()
    assert grid.shape == (2 * size, 2 * size, 3)
    toy_samples(tmp_path / "six", 6)
    assert evaluate.main(["export", f"--samples={tmp_path / 'six'}", "--format=dpg", f"--out={tmp_path / 'y'}"]) == 2
    assert "4 images a prompt, and prompt 00001 has 2: sample them all" in capsys.readouterr().err
    assert evaluate.main(["export", f"--samples={tmp_path / 'png'}", "--format=png", f"--out={tmp_path / 'y'}"]) == 2
    assert "holds no samples of lumos_jax.evaluate" in capsys.readouterr().err
