"""Settings: what is refused, what may change on resume, and that every config file resolves."""

import dataclasses
import json
import pathlib
import re
import runpy

import pytest

from configs import i2i
from lumos_jax import config
from lumos_jax.config import documentation
from lumos_jax.config import io as config_io
from tests.fields import put


def changed(**fields):
    """Default settings with "group__field" replaced."""
    tree = config_io.to_dict(config.Settings())
    put(tree, fields)
    return config_io.from_dict(tree)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train__batch_siz": 3}, "did you mean batch_size"),
        ({"train__batch_size": "many"}, "must be of type int"),
        ({"train__batch_size": True}, "must be of type int"),
        ({"model__size": "XXL"}, "must be one of S, B, L, XL, or"),
        ({"model__size": "36x1x5"}, "must be one of S, B, L, XL, or WIDTHxDEPTHxHEADS"),
        ({"encoder__size": "0x1x1"}, "must be one of Ti, S, B, L, or WIDTHxDEPTHxHEADS"),
        ({"diffusion__prediction": "flow"}, "does not go with prediction=flow"),
        (
            {"diffusion__schedule": "flow", "diffusion__prediction": "flow", "eval__sampler": "heun"},
            "loss=hybrid is for",
        ),
        ({"data__record": "image"}, r"this field is config\.data\.sample_type now"),
        ({"eval__sampler": "heun"}, "does not solve"),
        ({"optimizer__accumulate": 3}, "not divisible by optimizer.accumulate=3"),
        ({"mesh__context": 2}, "config.task.name=i2i with config.data.sample_type=image have none; leave it at 1"),
        ({"mesh__fsdp": 0}, "at least 1, or -1"),
        ({"mesh__data": 2}, "this field is gone: it takes the devices that mesh.fsdp and mesh.context leave"),
        ({"eval__every": 10}, "data.holdout=0 must be at least"),
        ({"eval__guidance_interval": (0.8, 0.2)}, "rising within 0 and 1"),
        ({"encoder__weights": "random:x"}, "random:<seed>"),
        ({"encoder__normalize": "l2"}, "not one of none, unit, standard"),
        ({"encoder__size": "B/0"}, "with patches of other than 16 pixels, as B/8"),
        ({"encoder__weights": "random:0", "encoder__size": "B/9"}, "not divisible by the patches of encoder.size=B/9"),
        ({"data__source": "folder"}, "needs config.data.path"),
        ({"data__source": "mixture"}, "config.data.mixture"),
        ({"optimizer__learning_rate": float("nan")}, "at least 0"),
        ({"checkpoint__allow_change": ("train.batchsize",)}, "no field"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        changed(**fields)


def test_json_round_trip_keeps_every_field(tmp_path):
    settings = changed(eval__guidance_interval=(0.1, 0.9), eval__sheet=(3, 1), train__seed=7)
    config_io.save(settings, tmp_path / "config.json")
    assert config_io.load(tmp_path / "config.json") == settings


@pytest.mark.parametrize(("saved", "meant"), [(True, "unit"), (False, "none"), ("standard", "standard")])
def test_settings_saved_when_normalize_was_a_bool_are_read(tmp_path, saved, meant):
    tree = config_io.to_dict(config.Settings())
    tree["encoder"]["normalize"] = saved
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert config_io.load(tmp_path / "config.json").encoder.normalize == meant


def test_gone_fields_are_refused_by_name_unless_they_had_their_default(tmp_path):
    tree = config_io.to_dict(config.Settings())
    tree["model"]["mlp_ratio"], tree["mesh"]["tensor"] = 4.0, 1
    assert config_io.from_saved(tree) == config.Settings()
    tree["model"]["mlp_ratio"] = 2.0
    with pytest.raises(ValueError, match=r"config\.model\.mlp_ratio=2\.0 of these settings is gone"):
        config_io.from_saved(tree)


FORMER = json.loads((pathlib.Path(__file__).parent / "goldens" / "former_settings.json").read_text())


@pytest.mark.parametrize("task", FORMER)
def test_settings_of_the_former_layout_are_those_of_the_same_config_today(task):
    """The config.json that configs/<task>.py:test wrote before settings were renamed and grouped."""
    folder = pathlib.Path(__file__).parents[1] / "configs"
    path = next(path for path in (folder / f"{task}.py", folder / "ablations" / f"{task}.py") if path.exists())
    today = runpy.run_path(str(path))["get_config"]("test")
    assert config_io.from_saved(FORMER[task]) == config_io.resolve(today)


def former(task, *changes):
    """Settings of that task as the former layout saved them, with ("group.field", value) changed."""
    tree = json.loads(json.dumps(FORMER[task]))
    for name, value in changes:
        group, _, field = name.partition(".")
        assert field in tree[group]
        tree[group][field] = value
    return tree


@pytest.mark.parametrize(
    ("task", "name", "value"),
    [
        ("i2i", "encoder.resize", 20), ("i2i", "encoder.dtype", "bfloat16"), ("rcg", "encoder.heads", 3),
        ("dino", "autoencoder.posterior", "mode"), ("i2i", "autoencoder.channels", [8, 16]),
        ("i2i", "autoencoder.layers", 1), ("i2i", "autoencoder.groups", 4), ("i2i", "model.position_scale", 2.0),
        ("i2i", "diffusion.steps", 500), ("i2i", "diffusion.logit_std", 0.5), ("i2i", "optimizer.ema_dtype", "bfloat16"),
        ("i2i", "finetune.lora_alpha", 8.0), ("t2i", "data.bucket_step", 2), ("i2v", "video.first_guidance", 2.0),
        ("i2v", "video.sample_noise", 0.1), ("dino", "dino.local_side", 16), ("nvs", "mesh.tensor", 2),
    ],
)  # fmt: skip
def test_former_runs_that_would_not_continue_are_refused_by_name(task, name, value):
    today = {"video.first_guidance": "task.min_guidance_scale", "video.sample_noise": "task.noise_aug_strength",
             "dino.local_side": "task.local_size", "data.bucket_step": "data.buckets.step"}  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(today.get(name, name))):
        config_io.from_saved(former(task, (name, value)))


@pytest.mark.parametrize(
    ("task", "name", "value"),
    [
        ("i2i", "data.threads", 1), ("i2i", "data.tar_index", "x"), ("i2i", "model.unroll", 4), ("i2i", "mesh.data", 2),
        ("i2i", "train.compilation_cache", "x"), ("i2i", "train.watchdog_minutes", 0.0), ("i2i", "log.tensorboard", True),
        ("i2i", "eval.batch_size", 8), ("dino", "eval.bank", 16), ("i2i", "autoencoder.tile", 32),
        ("i2v", "video.sample_fps", 4.0), ("i2v", "video.sample_motion", 3), ("dino", "encoder.dtype", "bfloat16"),
    ],
)  # fmt: skip
def test_former_settings_that_changed_nothing_learned_are_left_out(task, name, value):
    assert config_io.from_saved(former(task, (name, value))) == config_io.from_saved(former(task))


def test_former_settings_that_are_part_of_others_are_brought_there():
    buckets = ("data.buckets", True), ("data.bucket_ratios", [0.5, 2.0]), ("eval.rows", 3)
    settings = config_io.from_saved(former("t2i", *buckets))
    assert (settings.data.aspect_ratios, settings.eval.sheet) == ((0.5, 2.0), (3, 2))
    low = [(f"optimizer.{name}", "bfloat16") for name in ("ema_dtype", "moments_dtype")]
    assert config_io.from_saved(former("i2i", *low)).optimizer.state_dtype == "bfloat16"
    changes = [("autoencoder.kind", "kl"), ("autoencoder.dtype", "float32"), ("encoder.patch_size", 4)]
    settings = config_io.from_saved(former("i2i", *changes))
    assert (settings.autoencoder.kind, settings.encoder.patch_size) == ("kl", 4)
    with pytest.raises(ValueError, match=r"autoencoder\.dtype"):
        config_io.from_saved(former("i2i", ("autoencoder.kind", "kl")))


def test_the_documentation_is_of_these_settings():
    assert documentation.text() == (pathlib.Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    assert all(field.meaning for field in documentation.settings().values())


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        config_io.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        config_io.load(tmp_path / "config.json")


def test_only_changes_that_break_a_resume_are_frozen():
    old = config.Settings()
    new = changed(log__every=7, data__workers=2, mesh__fsdp=4, train__steps=9, train__batch_size=8, data__seed=3)
    assert set(config_io.frozen_differences(old, new)) == {"train.batch_size", "data.seed"}
    allowed = changed(train__batch_size=8, checkpoint__allow_change=("train.batch_size",))
    assert config_io.frozen_differences(old, allowed) == {}
    cosine = dataclasses.replace(old, optimizer=dataclasses.replace(old.optimizer, decay="cosine"))
    longer = dataclasses.replace(cosine, train=dataclasses.replace(cosine.train, steps=9))
    assert set(config_io.frozen_differences(cosine, longer)) == {"train.steps"}


def test_every_config_file_resolves_and_unknown_sizes_are_named():
    sizes = {}
    for size in ("desk", "test"):
        sizes[size] = config_io.resolve(i2i.get_config(size))
    paper = i2i.get_config()
    with pytest.raises(ValueError, match=r"config\.data\.path"):  # the paper's data are not ours to guess
        config_io.resolve(paper)
    paper.data.path = "shards"
    settings = config_io.resolve(paper)
    assert (settings.model.size, settings.data.image_size, settings.encoder.output) == ("XL", 256, "cls")
    assert sizes["test"].train.steps < sizes["desk"].train.steps
    with pytest.raises(ValueError, match=":desk"):
        i2i.get_config("desc")
