"""Names and shapes of every official file at full size.

tests/goldens/full_size_shapes/evaluation.json has the state dicts of torchvision's VGG16 and AlexNet, pytorch-fid's Inception,
transformers' CLIP and DINOv2 and DreamSim's CLIP ViT, made on PyTorch's meta device; DINOv2's own; and TATS's I3D, as it
names what TensorFlow Hub has. {a,b} stands for a and b, {0..11} for twelve layers.
"""

import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax.encoders import frozen
from lumos_jax.encoders.clip_text import ClipText
from lumos_jax.encoders.vit import Vit
from lumos_jax.evaluation.networks import dreamsim, encoders, i3d, inception, vgg
from lumos_jax.weights.rules import flatten


def expand(name):
    parts = re.split(r"\{(.*?)\}", name)
    ranges = [re.fullmatch(r"0\.\.(\d+)", part) for part in parts]
    choices = [
        map(str, range(int(found[1]) + 1)) if found else part.split(",") if index % 2 else [part]
        for index, (part, found) in enumerate(zip(parts, ranges, strict=True))
    ]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


@pytest.fixture
def tables(goldens):
    folder = goldens / "full_size_shapes"
    content = json.loads((folder / "evaluation.json").read_text())
    content["dino_vitb16"] = json.loads((folder / "dino_vitb16_official.json").read_text())
    return {
        network: {name: tuple(shape) for pattern, shape in table.items() for name in expand(pattern)}
        for network, table in content.items()
    }


def traced_shape(loaded, *shape):
    """Of the features of two inputs, and the number of parameters."""
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), loaded.params)
    features = jax.eval_shape(loaded.apply, params, jax.ShapeDtypeStruct((2, *shape), jnp.uint8))
    return features.shape, sum(leaf.size for leaf in flatten(params).values())


IMAGE, CLIP = (300, 400, 3), (16, 128, 171, 3)


@pytest.mark.parametrize(
    ("load", "name", "protocol", "shape", "dim", "parameters"),
    [
        (inception.load, "inception", "tf1", IMAGE, 2048, 23_885_392),
        (i3d.load, "i3d", "torch", CLIP, 400, 12_704_544 + 7_280),  # norms' scales, which are ones
        (vgg.load, "vgg16", "224", IMAGE, 512, 14_714_688),
        (encoders.load_dinov2, "dinov2_vitl14", "dgm-eval", IMAGE, 1024, 304_367_616),
        (encoders.load_dinov2, "hf_dinov2_large", "dgm-eval", IMAGE, 1024, 304_367_616),
        (encoders.load_clip, "clip_vit_large_patch14_336", "cmmd", IMAGE, 768, 304_293_888),
    ],
)
def test_names_and_shapes_at_full_size(load, name, protocol, shape, dim, parameters, tables):
    loaded = load(tables[name], protocol)
    assert loaded.dim == dim
    assert traced_shape(loaded, *shape) == ((2, dim), parameters)
    lacking = dict(tables[name])
    removed = next(key for key in lacking if key.endswith("bias") and "classifier" not in key and "text" not in key)
    del lacking[removed]
    with pytest.raises(ValueError, match=rf"{re.escape(removed)}"):
        load(lacking, protocol)


def test_lpips_at_full_size(tables):
    for net, name, layers in (("vgg", "vgg16", 13), ("alex", "alexnet", 5)):
        assert len(vgg.load_lpips(net, tables[name])["trunk"]) == layers


def test_both_towers_of_the_clip_score_at_full_size(tables, tmp_path):
    path = tmp_path / "clip_vit_base_patch32.json"
    path.write_text(json.dumps(tables["clip_vit_base_patch32"]))
    image, text = (frozen.read(kind, str(path), shapes_only=True) for kind in ("image-encoder", "clip-text"))
    assert image.network == Vit(
        768, 12, 12, 32, 224, 1e-5, 0.0, "quick_gelu", input_norm=True, hidden=3072, head="linear", head_dims=(512,)
    )
    assert isinstance(text.network, ClipText)
    assert (text.network.positions, text.network.projection, text.network.vocabulary) == (77, 512, 49408)
    assert image.report.parameters + text.report.parameters == 151_277_313 - 1  # all but the logit's scale


def test_branches_of_dreamsim_at_full_size(tables):
    _, branches = dreamsim.PROTOCOLS["ensemble"]
    tables = [tables[name] for name in ("dino_vitb16", "dreamsim_clip_vitb16", "dreamsim_clip_vitb16")]
    dims, parameters = [], 0
    for branch, table in zip(branches, tables, strict=True):
        state = {name: np.broadcast_to(np.int8(0), shape) for name, shape in table.items()}
        vit, params = dreamsim.branch_of(state, "", branch, {11: np.zeros((2304, 768), np.int8)})
        x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
        dims.append(jax.eval_shape(functools.partial(dreamsim.embed, vit), params, x).shape[1])
        parameters += sum(leaf.size for leaf in flatten(params).values())
    assert dims == [768, 512, 512]
    assert parameters == 85_798_656 + 2 * (85_800_192 - 768 + 768 * 512)  # CLIP's patches have no bias
