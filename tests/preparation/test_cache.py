"""Caching frozen features and training on them: the same run as online, and a command that can be killed at any moment."""

import dataclasses
import json
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import dino, i2i, t2i
from lumos_jax import config, data, tasks
from lumos_jax.config import io as config_io
from lumos_jax.data.sources import cached
from lumos_jax.encoders import frozen
from lumos_jax.preparation import cache
from lumos_jax.scenes.scene import captions as scene_captions
from lumos_jax.scenes.scene import make_scene
from lumos_jax.train import loop
from tests.fields import put
from tests.running import finish, start

# Largest relative difference of a logged loss between the online run and the cached one. float16 rounds each value by 2^-11 at
# most, which all but averages out over a batch: 2e-5 was measured.
BOUNDS = {"float32": 1e-5, "float16": 5e-4}


KL = str(pathlib.Path(__file__).parents[1] / "goldens" / "diffusers_autoencoder_kl")


def settings_of(kind, **fields):
    """configs/i2i.py:test with the identity or a tiny KL autoencoder, and "group__field" replaced."""
    tree = i2i.get_config("test").to_dict()
    tree["train"]["steps"] = tree["eval"]["every"] = 6
    # Steps so large that the condition counts, and everything else small, to be compiled in seconds.
    tree["optimizer"] |= {"learning_rate": 0.02, "warmup_steps": 0, "decay": "constant", "ema_decay": 0.0}
    tree["model"] |= {"size": "32x1x2"}
    tree["eval"] |= {"steps": 2, "guidance": 1.0, "sheet": (1, 1)}
    if kind == "kl":
        tree["autoencoder"]["weights"] = KL
        tree["model"]["patch_size"] = 2
    put(tree, fields)
    return config_io.from_dict(tree)


def write(settings, out, *, dtype="float32", shard_records=100, batch_size=16):
    lines = []
    made = cache.write(settings, str(out), cache.Options(shard_records, batch_size, dtype), lines.append)
    return made, lines


def losses(settings, workdir):
    """Trains, and returns the values of each logged line that are no timings."""
    assert loop.train(loop.prepare(settings, str(workdir))) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    wanted = ("step", "loss", "grad_norm", "held_out_loss", "held_out_null_loss", "corrupt_records")
    return [{name: line[name] for name in wanted if name in line} for line in lines]


def on_cache(settings, path):
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, source="cached", path=str(path)))


def without_evaluation(settings):
    return dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, every=0))


def largest_difference(ours, theirs):
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert set(a) == set(b)
        for name in set(a) & {"loss", "grad_norm", "held_out_loss", "held_out_null_loss"}:
            worst = max(worst, abs(a[name] / b[name] - 1))
    return worst


@pytest.mark.parametrize("kind", ["identity", "kl"])
def test_cached_and_online_runs_log_the_same_losses(one_device, tmp_path, kind):
    settings = settings_of(kind, data__scenes__num_scenes=140)
    if kind == "identity":
        settings = without_evaluation(settings)
    online = losses(settings, tmp_path / "online")
    made, lines = write(settings, tmp_path / "exact", shard_records=60)
    assert (made.records, made.undecodable, [n for _, n, _ in made.shards]) == (140, 0, [60, 60, 20])
    assert {name: dtype for name, (dtype, _) in made.arrays.items()} == (
        {"latent": "float32", "feature": "float32"} if kind == "kl" else {"image": "uint8", "feature": "float32"}
    )
    assert "3 to write here" in lines[0]
    exact = losses(on_cache(settings, tmp_path / "exact"), tmp_path / "run")
    assert largest_difference(exact, online) < BOUNDS["float32"]
    if kind == "kl":
        check_sheet(settings, tmp_path / "online", tmp_path / "run")
        return
    write(settings, tmp_path / "half", dtype="float16")
    half = losses(on_cache(settings, tmp_path / "half"), tmp_path / "half_run")
    assert 0 < largest_difference(half, online) < BOUNDS["float16"]  # not 0: the features count, and the cache was read


def check_sheet(settings, online, on_a_cache):
    """Rows of (source | sample), enlarged eightfold; without pixels the source is what the autoencoder makes of its latents."""
    sheets = [np.asarray(Image.open(path / "samples" / "step_6.png")).astype(int) for path in (online, on_a_cache)]
    gap = 16
    assert [sheet.shape for sheet in sheets] == [(128 + 2 * gap, 256 + 3 * gap, 3)] * 2
    assert np.abs(sheets[0] - sheets[1])[:, 128 + 2 * gap :].max() <= 1
    task, frozen = tasks.make_task(settings)
    source = data.make_source(settings.data)
    image = data.read_batch(settings.data, source, data.holdout_records(settings.data, source)[:1])["image"]

    @jax.jit
    def encoded_and_decoded(frozen, image):
        latent = task.autoencoder.moments(frozen["autoencoder"], image)
        return task.sampling.source_images(frozen, {"latent": latent})

    decoded = encoded_and_decoded(frozen, image)
    shown = sheets[1][gap : gap + 128 : 8, gap : gap + 128 : 8]
    assert shown.std() > 1
    assert np.abs(shown - np.asarray(decoded)[0].astype(int)).max() <= 1


def test_networks_other_than_the_caches_are_refused_by_name(one_device, tmp_path):
    settings = settings_of("kl", data__scenes__num_scenes=40, data__holdout=32)
    write(settings, tmp_path / "cache")
    made = frozen.read("autoencoder", KL)
    (tmp_path / "other").mkdir()
    frozen.save(tmp_path / "other", made._replace(params={n: 2 * p for n, p in made.params.items()}), "this test")
    for fields, named in (
        ({"encoder__weights": "random:1"}, r"config\.encoder\.identity: 'random:0@.*' in the cache, 'random:1@"),
        ({"encoder__normalize": "unit"}, r"config\.encoder\.normalize: 'none' in the cache, 'unit' now"),
        ({"encoder__output": "cls"}, r"config\.encoder\.output: 'all' in the cache, 'cls' now"),
        (
            {"autoencoder__weights": str(tmp_path / "other")},
            r"config\.autoencoder\.identity: .* in the cache, .*other@",
        ),
        ({"autoencoder__weights": "identity"}, r"config\.autoencoder\.identity: .* in the cache, 'identity' now"),
        ({"data__image_size": 32}, r"config\.data\.image_size: 16 in the cache, 32 now"),
    ):
        other = settings_of("kl", data__scenes__num_scenes=40, data__holdout=32, **fields)
        with pytest.raises(ValueError, match=named):
            loop.prepare(on_cache(other, tmp_path / "cache"), str(tmp_path / "run"))
    with pytest.raises(ValueError, match=named):
        write(other, tmp_path / "cache")
    same = settings_of("kl", data__scenes__num_scenes=40, data__holdout=32, autoencoder__scaling_factor=0.5)
    loop.prepare(on_cache(same, tmp_path / "cache"), str(tmp_path / "run")).checkpoints.close()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_undecodable_records_are_kept_with_weight_0(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(40):
        Image.new("RGB", (20, 24), (5 * i, 100, 30)).save(pictures / f"{i:02}.png")
    (pictures / "05.png").write_bytes(b"")
    settings = settings_of("identity", data__source="folder", data__path=str(pictures), data__max_corrupt_rate=1.0)
    made, lines = write(settings, tmp_path / "cache", shard_records=16)
    assert (made.records, made.undecodable) == (40, 1)
    assert any("05.png: empty" in line for line in lines)
    there = on_cache(settings, tmp_path / "cache").data
    ids = [0, 5, 39]
    ours = data.read_batch(there, data.make_source(there), ids)
    theirs = data.read_batch(settings.data, data.make_source(settings.data), ids)
    for name in ("image", "weight", "problem", "record"):
        assert np.array_equal(ours[name], theirs[name]), name
    assert list(ours["weight"]) == [1, 0, 1]


def test_a_value_that_the_dtype_cannot_hold_is_an_error(tmp_path, monkeypatch):
    settings = settings_of("identity", data__scenes__num_scenes=40, data__holdout=32)
    encoder = type(tasks.make_task(settings)[0].encoder)
    monkeypatch.setattr(encoder, "apply", lambda self, params, image: jnp.full((16, 5, 32), 1e5))
    with pytest.raises(ValueError, match=r"record 0 \(.*\) is not finite in float16: use --dtype=bfloat16"):
        write(settings, tmp_path / "cache", dtype="float16")
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["plan.json"]


def test_a_damaged_shard_is_written_again_and_alone(tmp_path):
    settings = settings_of("identity", data__scenes__num_scenes=40, data__holdout=32)
    write(settings, tmp_path / "cache", shard_records=16)
    files = {p.name: p for p in (tmp_path / "cache").iterdir()}
    before = {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in files.items()}
    assert "3 shards, 0 to write" in write(settings, tmp_path / "cache", shard_records=16)[1][0]
    second = cached.shard_name(1, 3)
    files[second].write_bytes(before[second][0][:-1000])
    assert "3 shards, 1 to write" in write(settings, tmp_path / "cache", shard_records=16)[1][0]
    for name, path in files.items():
        assert path.read_bytes() == before[name][0], name
        if name != second and name.startswith("shard"):
            assert path.stat().st_mtime_ns == before[name][1]


@pytest.fixture(scope="module")
def prepare(program):
    """Starts the command, with arguments."""
    return lambda *arguments: start(program("lumos_jax.prepare", *arguments))


def test_killed_after_the_first_shard_it_goes_on_to_the_same_bytes(prepare, tmp_path):
    arguments = (
        "cache",
        "--config=configs/i2i.py:test",
        "--shard_records=32",
        "--config.data.scenes.num_scenes=320",
    )
    output = finish(prepare(*arguments, f"--out={tmp_path / 'whole'}"))
    assert "320 records, 0 of them undecodable" in output
    process = prepare(*arguments, f"--out={tmp_path / 'killed'}")
    while not (tmp_path / "killed" / cached.shard_name(0, 10)).exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    left = len(list((tmp_path / "killed").glob("*.arrayrecord")))
    assert 1 <= left < 10
    with pytest.raises(ValueError, match="this cache is not finished; run the command that makes it again"):
        data.make_source(config.Data(source="cached", path=str(tmp_path / "killed")))
    output = finish(prepare(*arguments, f"--out={tmp_path / 'killed'}"))
    assert f"10 shards, {10 - left} to write here" in output
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "killed").iterdir()} == whole
    assert len(whole) == 12


def test_mistakes_are_one_clear_line(prepare, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    settings = settings_of("identity")
    with pytest.raises(ValueError, match=r"holds other files, as notes\.txt: give an empty or a new directory"):
        write(settings, tmp_path)
    assert "error: missing --out" in finish(prepare("cache", "--config=configs/i2i.py:test"), code=2)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (
            {"data__crop": "random"},
            {},
            r"crop=random, flip=False: a cache holds one image .* set --config\.data\.crop=center",
        ),
        ({"data__flip": True}, {}, "crop=center, flip=True: a cache holds one"),
        ({"data__source": "cached", "data__path": "x"}, {}, "is a cache already"),
        ({"data__sample_type": "clip", "data__clips__frames": 4}, {}, r"data\.sample_type=clip is drawn anew"),
        ({"data__sample_type": "views"}, {}, r"data\.sample_type=views is drawn anew"),
        (
            {"data__sample_type": "captioned", "data__aspect_ratios": (0.25, 4.0)},
            {},
            r"a cache holds squares.*set --config\.data\.aspect_ratios=\(1,1\)",
        ),
        ({}, {"batch_size": 12}, "--batch_size=12 does not split over 8 devices"),
        ({}, {"shard_records": 0}, "--shard_records=0 must be at least 1"),
        ({}, {"dtype": "int8"}, "--dtype=int8 is not one of float16, bfloat16, float32"),
    ],
)
def test_impossible_requests_are_refused(tmp_path, fields, options, message):
    with pytest.raises(ValueError, match=message):
        write(settings_of("identity", **fields), tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_what_has_no_frozen_features_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.task\.name=dino trains on no frozen features"):
        write(config_io.resolve(dino.get_config("test")), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_another_storage_into_the_same_directory_is_refused(tmp_path):
    settings = settings_of("identity", data__scenes__num_scenes=40, data__holdout=32)
    write(settings, tmp_path)
    with pytest.raises(ValueError, match="--dtype: 'float32' in the cache, 'float16' now"):
        write(settings, tmp_path, dtype="float16")
    more = settings_of("identity", data__scenes__num_scenes=41, data__holdout=32)
    with pytest.raises(ValueError, match=r"config\.data\.scenes\.num_scenes: 40 in the cache, 41 now"):
        write(more, tmp_path)


def text_settings(**fields):
    """configs/t2i.py:test, as short as `settings_of` makes it."""
    tree = t2i.get_config("test").to_dict()
    changed = config_io.to_dict(settings_of("identity", data__scenes__num_scenes=72, train__steps=4, eval__every=4))
    tree |= {group: changed[group] for group in ("optimizer", "model", "train", "log")}
    tree["data"]["scenes"]["num_scenes"] = 72
    tree["eval"] = changed["eval"] | {"num_examples": 16, "guidance": 2.0}
    put(tree, fields)
    return config_io.from_dict(tree)


def test_a_cache_of_captions_trains_as_online(one_device, tmp_path):
    """Both captions of a record are kept, unpadded; the choice, exchanged captions among them, is that of the online run."""
    settings = text_settings(data__captions__noise=0.5)
    online = losses(settings, tmp_path / "online")
    made, _ = write(settings, tmp_path / "cache", shard_records=40)
    assert made.arrays["feature"] == made.arrays["feature_detailed"] == ("float32", (-1, 32))
    first = next(cached.read_shard(tmp_path / "cache" / made.shards[0][0])).arrays
    assert cached.to_text(first["caption"]) == scene_captions(make_scene(0))[0]
    assert len(first["feature"]) == len(cached.to_text(first["caption"]).replace(",", " ,").split()) + 1
    assert len(first["feature_detailed"]) == 19  # of 24 at most
    again = on_cache(settings, tmp_path / "cache")
    assert largest_difference(losses(again, tmp_path / "run"), online) < BOUNDS["float32"]
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / n / "samples" / "step_4.png")) for n in ("run", "online")))
    with pytest.raises(ValueError, match=r"config\.encoder\.identity: 'random:0@\w+' in the cache, 'random:1@"):
        loop.prepare(
            dataclasses.replace(again, encoder=dataclasses.replace(again.encoder, weights="random:1")), "unused"
        )
    pictures_only = dataclasses.replace(again.data, sample_type="image")
    with pytest.raises(ValueError, match=r"config\.data\.sample_type=image, and this cache holds captions"):
        data.read_batch(pictures_only, data.make_source(pictures_only), [0])
