"""Representation alignment of a run: its loss, on meshes as alone, what off means, hand-offs, and where it is refused."""

import json

import jax
import numpy as np
import pytest

from configs import i2i, i2v, t2i
from configs.ablations import alignment
from lumos_jax import config, convert, sample
from lumos_jax.config import io as config_io
from lumos_jax.train import loop, rngs
from lumos_jax.train.experiment import Experiment
from lumos_jax.weights.rules import flatten
from tests.stepping import assert_close, losses, settings_with, train

SHIPPED = {"weights": "scenes", "normalize": "white", "image_size": 16}
ON = {"weight": 0.5, "block": 1} | {f"encoder.{name}": value for name, value in SHIPPED.items()}
SMALL = {"model": {"size": "16x1x2"}, "encoder": SHIPPED}


def abstract(of=i2i, align=None, **groups):
    """A run as shapes."""
    return Experiment.build(settings_with(of, align=align or {}, **(SMALL | groups)), jax.devices()[:1], abstract=True)


def shapes_of(task):
    return {path: leaf.shape for path, leaf in flatten(jax.eval_shape(task.network.init, rngs.key(0, "init"))).items()}


def test_the_loss_has_the_similarity_and_meshes_and_accumulation_agree():
    settings = settings_with(align=ON, **SMALL)
    alone, state = train(settings, 1, 2)
    split, other = train(config.replace(settings, {"mesh.fsdp": 2, "optimizer.accumulate": 2}), 4, 2)
    for first in alone:
        np.testing.assert_allclose(first["loss"], first["mse"] + 0.5 * first["alignment"], rtol=1e-6)
    np.testing.assert_allclose(losses(split), losses(alone), rtol=1e-5)
    np.testing.assert_allclose([m["alignment"] for m in split], [m["alignment"] for m in alone], rtol=1e-4)
    assert_close(other.params, state.params)


def test_the_target_is_the_encoders_patches_and_the_held_out_loss_is_without_it():
    experiment = Experiment.build(settings_with(align=ON, **SMALL), jax.devices()[:1])
    task, keys = experiment.task, rngs.streams(0, "train", 0)
    batch = {"image": np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8), "weight": np.ones(4, "f")}
    example = jax.jit(lambda frozen, batch: task.example(frozen, batch, keys))(experiment.frozen, batch)
    # This run conditions on [CLS] and patches of the same ViT.
    np.testing.assert_allclose(example.target, example.condition.tokens[:, 1:], atol=1e-5)
    assert set(jax.eval_shape(task.loss_terms, experiment.abstract_state.params, example)) == {"loss", "mse"}


def test_without_weight_nothing_changes():
    on, off, default = (abstract(align=fields) for fields in (ON, ON | {"weight": 0.0}, {}))
    assert off.task == default.task
    assert set(off.frozen) == {"encoder", "autoencoder"}
    assert {path for path in shapes_of(on.task) if path not in shapes_of(off.task)} == {
        f"align/fc{layer}/{part}" for layer in (1, 2, 3) for part in ("kernel", "bias")
    }


def test_the_projector_is_new_dropped_or_kept_at_a_hand_off():
    on, off, wider = (
        abstract(align=fields).task
        for fields in (
            ON,
            {},
            ON | {"encoder.weights": "random:0", "encoder.size": "32x1x2/8", "encoder.normalize": "unit"},
        )
    )
    projector = {path for path in shapes_of(on) if path.startswith("align/")}

    def rules(ours, theirs, same=True):
        found = ours.handoff().rules(shapes_of(ours), shapes_of(theirs), same)
        return {name: set(paths) for name, paths in found.items() if paths}

    assert rules(on, off) == {"reinitialise": projector}
    assert rules(off, on) == {"drop": projector}
    assert rules(on, on) == rules(off, off) == {}
    assert rules(wider, on) == {"reinitialise": {"align/fc3/kernel", "align/fc3/bias"}}


def test_a_run_of_captions_trains_and_what_it_leaves_has_no_projector(one_device, tmp_path):
    made = alignment.get_config("test,0.5")
    made.model.size, made.encoder.size, made.align.block = "16x1x2", "16x1x2", 1
    made.train.steps = made.checkpoint.every = 2
    made.log.every, made.eval.every, made.eval.num_scored, made.optimizer.decay = 1, 0, 0, "constant"
    run = loop.prepare(config_io.resolve(made), str(tmp_path))
    assert set(run.fingerprints) == {"data", "encoder", "autoencoder", "align"}
    assert loop.train(run) == 0
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == pytest.approx(last["mse"] + 0.5 * last["alignment"], rel=1e-5)
    flags = ["--prompts=a red box", f"--out={tmp_path / 'x.png'}", "--steps=1", "--guidance=1"]
    assert sample.main([f"--workdir={tmp_path}", *flags]) == 0
    assert (tmp_path / "x.png").exists()
    export = [f"--workdir={tmp_path}", f"--out={tmp_path / 'release'}", "--format=safetensors"]
    assert convert.main(["export", *export]) == 0
    assert (tmp_path / "release" / "lumos_2.safetensors").exists()


@pytest.mark.parametrize(
    ("of", "groups", "message"),
    [
        (i2v, {}, "config.task.name=i2v is not; set it to 0"),
        (t2i, {"encoder": {}, "data": {"aspect_ratios": (0.5, 2.0)}}, "set the weight to 0, or the ratios to"),
        (i2i, {"model": {"size": "32x2x2"}, "align": {"block": 3}}, "config.align.block=3: .* has 2 blocks"),
        (i2i, {"align": {"encoder.image_size": 12}}, "config.align.encoder.image_size=12 is not divisible"),
        (i2i, {"align": {"encoder.weights": "nowhere/x.npz"}}, "config.align.encoder.weights"),
    ],
)  # fmt: skip
def test_where_it_cannot_be_it_is_refused(of, groups, message):
    groups = groups | {"align": ON | groups.get("align", {})}
    with pytest.raises(ValueError, match=message):
        abstract(of, **groups)


def test_a_cache_without_images_and_a_change_on_resume_are_refused():
    of_pixels = abstract(align=ON).without_encoders()  # which a cache holds as they are
    assert set(of_pixels.frozen) == {"autoencoder", "align"}
    latents = {"autoencoder": {"weights": "random:0"}, "model": {"size": "16x1x2", "patch_size": 2}}
    with pytest.raises(ValueError, match="a cache holds latents in their place"):
        abstract(align=ON, **latents).without_encoders()
    with pytest.raises(ValueError, match="with init_from only"):
        settings_with(checkpoint={"allow_change": ("align.weight",)})
