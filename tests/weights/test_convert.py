"""Weights in and out as users ask for it: real files, real commands, and nothing written when something is wrong."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lumos_jax import config, convert, encoders
from lumos_jax.checkpoints import Checkpoints
from lumos_jax.config import io as config_io
from lumos_jax.encoders import frozen
from lumos_jax.tasks import releases
from lumos_jax.train import finetune, loop
from lumos_jax.weights import official, rules, torch_files
from tests.running import finish, start

KINDS = {
    "lumos_i2i_xl_2_256": ("lumos-i2i", 822_006_176 + 768),
    "lumos_t2i_xl_2_256": ("lumos-t2i", 826_331_552),
    "lumos_t2i_ms_xl_2_1024": ("lumos-t2i-ms", 826_824_608),
    "pixart_alpha_xl_2_256": ("pixart", 826_331_552),
    "dino_vitb16_official": ("image-encoder", 85_798_656),
    "hf_dino_vitb16": ("image-encoder", 85_798_656),
    "hf_dinov2_base": ("image-encoder", 86_579_712),
    "hf_clip_vit_large_patch14_vision": ("image-encoder", 303_966_208),
    "hf_clip_vit_large_patch14_text": ("clip-text", 123_650_304),
    "hf_t5_v1_1_xxl_encoder": ("t5", 4_762_310_656),
    "diffusers_sd_vae_ft_mse": ("autoencoder", 83_653_863),
}


@pytest.mark.parametrize("name", KINDS)
def test_dry_run_covers_every_full_size_list(goldens, name, capsys, tmp_path):
    kind, parameters = KINDS[name]
    source = goldens / "full_size_shapes" / f"{name}.json"
    code = convert.main(["import", f"--kind={kind}", f"--source={source}", "--dry-run", f"--out={tmp_path / 'out'}"])
    printed = capsys.readouterr().out
    assert code == 0
    assert f"{parameters:,} parameters" in printed.splitlines()[0]
    loaded, dropped = (int(line.split()[1]) for line in printed.splitlines()[:2])
    # PixArt's two shared arrays become two a block, in place of one table a block.
    extra = 28 - 2 if kind == "pixart" else 0
    assert loaded + dropped == len(json.loads(source.read_text())) + extra
    assert not (tmp_path / "out").exists()


def save_encoder(folder, encoder, params):
    folder.mkdir()
    frozen.save(folder, frozen.Imported("image-encoder", encoder.vit, rules.flatten(params), None), "a test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a checkpoint of step 2, and its EMA."""
    from configs import i2i

    workdir = tmp_path_factory.mktemp("trained")
    settings = i2i.test()
    settings.train.steps, settings.eval.every = 2, 0
    settings.optimizer.decay = "constant"
    made = encoders.make_encoder(config_io.resolve(settings).encoder)
    save_encoder(workdir / "encoder", *made)
    settings.encoder.weights, settings.encoder.size = str(workdir / "encoder"), "B"
    run = loop.prepare(config_io.resolve(settings), str(workdir))
    ema = jax.tree.map(lambda leaf: leaf + 0.01, run.start.state.ema)
    run.checkpoints.save(2, vars(run.start.state) | {"step": jnp.int32(2), "ema": ema}, run.meta({}))
    run.checkpoints.wait()
    run.checkpoints.close()
    (workdir / "metrics.jsonl").write_text('{"step": 2, "loss": 0.5, "images_per_second": 9.0}\n')
    return workdir, jax.tree.map(np.asarray, ema)


def weights(workdir):
    checkpoints = Checkpoints(workdir)
    placement = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ema = finetune.read_weights(checkpoints, checkpoints.latest(), "ema", placement)
    checkpoints.close()
    return jax.tree.map(np.asarray, ema)


@pytest.mark.parametrize("layout", convert.PRIOR_FORMATS)
def test_import_of_export_is_bit_for_bit(trained, tmp_path, layout, capsys):
    workdir, before = trained
    out, back = tmp_path / "out", tmp_path / "back"
    assert convert.main(["export", f"--workdir={workdir}", f"--format={layout}", f"--out={out}"]) == 0
    assert convert.main(["import", "--kind=lumos-i2i", f"--source={out}", f"--out={back}"]) == 0
    after = weights(back)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    assert config_io.load(back / "config.json") == config_io.load(workdir / "config.json")
    card = (out / "README.md").read_text()
    meta = Checkpoints(workdir).meta(2)
    for value in (*meta["fingerprints"].values(), "for 2 steps", '"learning_rate": 0.002', "| loss | 0."):
        assert value in card
    assert "images_per_second" not in card
    assert json.loads((back / "handoff.json").read_text())["loaded"]


def test_exported_names_are_the_official_ones(trained, tmp_path, goldens):
    workdir, _ = trained
    convert.main(["export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--weights=params"])
    state = torch_files.load(tmp_path / "out" / "lumos_2.pth")
    names = json.loads((goldens / "full_size_shapes" / "lumos_i2i_xl_2_256.json").read_text())
    assert set(state) == {name for name in names if not any(f"blocks.{i}." in name for i in range(2, 28))}


def test_files_of_exports_are_readable_as_the_umask_says(trained, tmp_path):
    workdir, _ = trained
    before = os.umask(0o027)
    try:
        convert.main(["export", f"--workdir={workdir}", "--format=safetensors", f"--out={tmp_path / 'out'}"])
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {"0o640"}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers_are_stripped_and_told(trained, tmp_path, prefix, caplog):
    workdir, before = trained
    convert.main(["export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}"])
    (file,) = (tmp_path / "out").glob("*.pth")
    state = torch_files.load(file)
    wrapped = shutil.copytree(tmp_path / "out", tmp_path / "wrapped") / file.name
    torch_files.save(wrapped, {"model": {f"{prefix}{name}": value for name, value in state.items()}})
    assert convert.main(["import", "--kind=lumos-i2i", f"--source={wrapped}", f"--out={tmp_path / 'back'}"]) == 0
    assert f"stripped the prefix {prefix!r} from its names" in caplog.text
    assert jax.tree.all(jax.tree.map(np.array_equal, weights(tmp_path / "back"), before))


def test_weights_that_have_moved_are_named_anew_if_they_are_the_same(trained, tmp_path, capsys):
    workdir, _ = trained
    moved = shutil.copytree(workdir / "encoder", tmp_path / "renamed")
    command = ["export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]
    assert convert.main([*command, f"--encoder-weights={moved}"]) == 0
    assert config_io.load(tmp_path / "out" / "config.json").encoder.weights == str(moved)
    command[-1] = f"--out={tmp_path / 'other'}"
    encoder, params = encoders.make_encoder(config_io.load(workdir / "config.json").encoder)
    save_encoder(tmp_path / "different", encoder, jax.tree.map(lambda a: a + 1, params))
    assert convert.main([*command, f"--encoder-weights={tmp_path / 'different'}"]) == 2
    assert "different is not the network that this run was trained with: encoder@" in capsys.readouterr().err
    assert convert.main([*command, f"--autoencoder-weights={moved}"]) == 2
    assert "config.autoencoder.kind=identity has no weights" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_run_continues_with_its_encoder_under_another_name(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    settings = config_io.load(workdir / "config.json")
    moved = dataclasses.replace(
        settings.encoder, weights=str(shutil.copytree(workdir / "encoder", tmp_path / "renamed"))
    )
    run = loop.prepare(dataclasses.replace(settings, encoder=moved), str(workdir))
    run.checkpoints.close()
    assert run.start.step == 2
    encoder, params = encoders.make_encoder(settings.encoder)
    save_encoder(tmp_path / "different", encoder, jax.tree.map(lambda a: a + 1, params))
    other = dataclasses.replace(settings.encoder, weights=str(tmp_path / "different"))
    with pytest.raises(ValueError, match=r"encoder\.fingerprint: 'encoder@.*' then, 'different@.*' now"):
        loop.prepare(dataclasses.replace(settings, encoder=other, train=settings.train), str(workdir))


def test_imported_weights_train_only_elsewhere(trained, tmp_path):
    workdir, before = trained
    convert.main(["export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}"])
    convert.main(["import", "--kind=lumos-i2i", f"--source={tmp_path / 'out'}", f"--out={tmp_path / 'prior'}"])
    settings = config_io.load(tmp_path / "prior" / "config.json")
    with pytest.raises(ValueError, match=r"holds weights imported from .*--config\.init_from="):
        loop.prepare(settings, str(tmp_path / "prior"))
    for number, source in enumerate((tmp_path / "prior", tmp_path / "out" / "lumos_2.pth")):
        run = loop.prepare(dataclasses.replace(settings, init_from=str(source)), str(tmp_path / f"run{number}"))
        for a, b in zip(jax.tree.leaves(run.start.state.params), jax.tree.leaves(before), strict=True):
            np.testing.assert_array_equal(a, b)
        account = json.loads((tmp_path / f"run{number}" / "handoff.json").read_text())
        assert account["parameters"]["loaded"] == sum(leaf.size for leaf in jax.tree.leaves(before))
        run.checkpoints.close()


def test_pixart_of_diffusers_names_is_the_official_one(goldens):
    with np.load(goldens / "pixart.npz") as arrays:
        state = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    renamed = official.to_diffusers(state)
    assert "transformer_blocks.0.scale_shift_table" in renamed
    assert renamed["transformer_blocks.1.attn1.to_k.weight"].shape == (48, 48)
    back = official.from_diffusers(renamed)
    for name in state.keys() - {"pos_embed"}:
        np.testing.assert_array_equal(back[name], state[name], err_msg=name)
    del renamed["transformer_blocks.1.attn1.to_k.weight"]
    with pytest.raises(ValueError, match=r"lacks transformer_blocks\.1\.attn1\.to_k\.weight"):
        official.from_diffusers(renamed)


@pytest.mark.parametrize(
    ("kind", "golden"),
    [
        ("image-encoder", "hf_dinov2"),
        ("image-encoder", "hf_clip_vision"),
        ("autoencoder", "diffusers_autoencoder_kl"),
        ("t5", "hf_t5_v1_1_encoder"),
        ("clip-text", "hf_clip_text"),
    ],
)
def test_frozen_networks_load_the_same_from_their_own_form(goldens, tmp_path, kind, golden):
    out = tmp_path / "out"
    assert convert.main(["import", f"--kind={kind}", f"--source={goldens / golden}", f"--out={out}"]) == 0
    network, params, identity = frozen.load(kind, str(out))
    expected_network, expected, released = frozen.load(kind, str(goldens / golden))
    assert network == expected_network
    assert encoders.same_content(identity, released)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    other = "t5" if kind != "t5" else "image-encoder"
    with pytest.raises(ValueError, match=f"holds a {kind}"):
        frozen.load(other, str(out))


def test_a_single_file_of_hugging_face_names_tells_its_shape(goldens):
    for name in ("hf_vit_dino", "hf_dinov2", "hf_clip_vision"):
        made = frozen.read("image-encoder", str(goldens / name / "model.safetensors"), heads=4)
        told = frozen.read("image-encoder", str(goldens / name))
        assert made.network.heads == told.network.heads == 4
        assert set(made.params) == set(told.params)


def test_moco_v3(goldens, tmp_path):
    """MoCo-v3's training checkpoint: prefixes, three networks in one file, the projector, fixed positions."""
    with np.load(goldens / "dino_vit.npz") as arrays:
        backbone = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    width = backbone["norm.weight"].shape[0]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    head = {"head.0.weight": normal(40, width), "head.3.weight": normal(40, 40), "head.6.weight": normal(16, 40)}
    for place, features in ((1, 40), (4, 40), (7, 16)):
        head |= {f"head.{place}.running_mean": normal(features), f"head.{place}.running_var": normal(features) ** 2}
        head[f"head.{place}.num_batches_tracked"] = np.array(7)
        if place < 7:
            head |= {f"head.{place}.weight": normal(features), f"head.{place}.bias": normal(features)}
    state = {f"module.base_encoder.{name}": value for name, value in (backbone | head).items()}
    state |= {f"module.momentum_encoder.{name}": np.asarray(value + 1) for name, value in (backbone | head).items()}
    state["module.predictor.0.weight"] = normal(4, 16)
    torch_files.save(tmp_path / "moco.pth", {"state_dict": state})

    made = frozen.read("image-encoder", str(tmp_path / "moco.pth"), heads=4)
    assert (made.network.head, made.network.head_dims, made.network.position_offset) == ("mlp", (40, 40, 16), 0.0)
    assert (
        sum(name.startswith(("momentum_encoder.", "predictor.")) for name in made.report.dropped) == len(state) // 2 + 1
    )
    (tmp_path / "moco").mkdir()
    frozen.save(tmp_path / "moco", made, "moco.pth")
    settings = config.Encoder(weights=str(tmp_path / "moco"), output="pooled", normalize="none", image_size=32)
    encoder, params = encoders.make_encoder(settings)
    assert (encoder.tokens, encoder.dim) == (1, 16)
    image = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    tokens = encoders.make_encoder(dataclasses.replace(settings, output="cls"))[0].apply(params, image)
    x = np.asarray(tokens[:, 0], np.float64)
    for linear, norm in ((0, 1), (3, 4), (6, 7)):
        x = x @ head[f"head.{linear}.weight"].T
        x = (x - head[f"head.{norm}.running_mean"]) / np.sqrt(head[f"head.{norm}.running_var"] + 1e-5)
        if norm < 7:
            x = np.maximum(x * head[f"head.{norm}.weight"] + head[f"head.{norm}.bias"], 0)
    np.testing.assert_allclose(encoder.apply(params, image)[:, 0], x, rtol=1e-4, atol=1e-4)


def damaged(goldens, folder, how):
    source = shutil.copytree(goldens / "hf_dinov2", folder / "source")
    file = source / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif how == "missing shard":
        state = load_file(file)
        file.unlink()
        shards = {name: f"model-0000{i % 2}.safetensors" for i, name in enumerate(state)}
        save_file(
            {n: v for n, v in state.items() if shards[n].endswith("0.safetensors")}, source / "model-00000.safetensors"
        )
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    elif how == "wrong architecture":
        told = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(told | {"model_type": "resnet"}))
    elif how == "mixed prefixes":
        state = load_file(file)
        save_file({("module." if i % 2 else "") + name: v for i, (name, v) in enumerate(state.items())}, file)
    elif how == "foreign name":
        save_file(load_file(file) | {"embeddings.cls_tokem": np.zeros(3, np.float32)}, file)
    elif how == "broken config":
        (source / "config.json").write_text("{")
    elif how == "broken index":
        file.rename(source / "model-00000.safetensors")
        (source / "model.safetensors.index.json").write_text("{}")
    elif how == "cut npz":
        np.savez(folder / "a.npz", **load_file(file))
        (folder / "b.npz").write_bytes((folder / "a.npz").read_bytes()[:-200])
        return folder / "b.npz"
    elif how == "pickled npz":
        np.savez(folder / "a.npz", a=np.array([None]))
        return folder / "a.npz"
    return source


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "damaged or cut short"),
        ("missing shard", "lacks model-00001.safetensors, which model.safetensors.index.json lists"),
        ("wrong architecture", "model_type='resnet'"),
        ("mixed prefixes", "mixes names with and without 'module.'"),
        ("foreign name", "embeddings.cls_tokem (3,): no rule (near: embeddings.cls_token"),
        ("broken config", "source/config.json is damaged, or no JSON"),
        ("broken index", "source/model.safetensors.index.json has no weight_map"),
        ("cut npz", "b.npz is damaged, cut short or no .npz"),
        ("pickled npz", "a.npz is damaged, cut short or no .npz of plain arrays: Object arrays cannot be loaded"),
    ],
)
def test_wrong_sources_are_refused_and_nothing_is_written(goldens, tmp_path, how, message, capsys):
    source = damaged(goldens, tmp_path, how)
    out = tmp_path / "made" / "out"
    assert convert.main(["import", "--kind=image-encoder", f"--source={source}", f"--out={out}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_hub_id_without_network_says_how(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert convert.main(["import", "--kind=lumos-i2i", "--source=someone/prior", f"--out={tmp_path / 'out'}"]) == 2
    assert "--local-dir DIR) and set --source=DIR" in capsys.readouterr().err


def test_a_prior_of_another_kind_is_named(goldens, tmp_path, capsys):
    lists = goldens / "full_size_shapes"
    for name, kind in (("pixart_alpha_xl_2_256", "lumos-t2i"), ("lumos_t2i_ms_xl_2_1024", "lumos-t2i")):
        assert convert.main(["import", f"--kind={kind}", f"--source={lists / name}.json", "--dry-run"]) == 2
        assert f"give --kind={KINDS[name][0]}" in capsys.readouterr().err
    assert (
        convert.main(["import", "--kind=lumos-i2i", f"--source={lists / 'dino_vitb16_official.json'}", "--dry-run"])
        == 2
    )
    assert "is none of lumos-i2i" in capsys.readouterr().err
    state = {"x_embedder.proj.weight": (48, 4, 2, 2), "pos_embed": (1, 16, 48), "blocks.0.attn.qkv.weight": (144, 48)}
    state |= {"final_layer.linear.weight": (32, 48), "y_embedder.y_embedding": (1, 24)}
    with pytest.raises(ValueError, match="give --heads"):
        releases.read("lumos-i2i", state, origin="it")


def test_a_taken_directory_and_a_missing_one_are_refused(trained, tmp_path, capsys):
    workdir, _ = trained
    (tmp_path / "out").mkdir()
    assert convert.main(["export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]) == 2
    assert "exists; give a new directory" in capsys.readouterr().err
    assert convert.main(["export", f"--workdir={tmp_path}", f"--out={tmp_path / 'new'}"]) == 2
    assert "no config.json" in capsys.readouterr().err
    assert convert.main(["import", "--kind=t5", "--source=x"]) == 2
    assert "--out is missing" in capsys.readouterr().err
    assert convert.main(["import", "--kind=t5", "--source=nowhere", f"--out={tmp_path / 'out'}"]) == 2
    assert "exists; give a new directory" in capsys.readouterr().err  # before anything is read
    (tmp_path / "a.json").write_text("[1]")
    for kind in ("t5", "clip-text", "lumos-i2i"):
        assert convert.main(["import", f"--kind={kind}", f"--source={tmp_path / 'a.json'}", "--dry-run"]) == 2
        assert "a.json holds a list, not names" in capsys.readouterr().err


def test_help_and_metadata(trained, program, tmp_path):
    assert "--kind=lumos-i2i" in finish(start(program("lumos_jax.convert", "--help")))
    workdir, _ = trained
    convert.main(["export", f"--workdir={workdir}", "--format=safetensors", f"--out={tmp_path / 'out'}"])
    with safe_open(tmp_path / "out" / "lumos_2.safetensors", "numpy") as file:
        assert json.loads(file.metadata()[releases.SETTINGS_KEY])["model"]["size"] == "32x2x2"
