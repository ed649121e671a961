"""Parameters of frozen networks split over devices: the same features, an eighth of the bytes on each device."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lumos_jax import config, encoders
from lumos_jax.train import sharding
from tests.running import finish, free_port, start

SMALL = config.Encoder(
    kind="t5", weights="random:0", tokenizer="scenes", size="32x2x4",
    output="all", max_tokens=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(config.Mesh(fsdp=2))


def text_inputs():
    rng = np.random.default_rng(0)
    return rng.integers(0, 64, (8, 8), np.int32), np.arange(8)[None] < rng.integers(1, 9, (8, 1))


def image_inputs():
    return (np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8),)


VIT = config.Encoder(
    weights="random:0", size="32x2x2/8", image_size=32, output="all",
)  # fmt: skip
KINDS = {
    "t5": (SMALL, encoders.make_text_encoder, text_inputs),
    "clip_text": (
        dataclasses.replace(SMALL, kind="clip_text", output="pooled"), encoders.make_text_encoder, text_inputs
    ),
    "vit": (VIT, encoders.make_encoder, image_inputs),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_split_networks_give_the_features_of_whole_ones(mesh, kind):
    wanted, make, inputs = KINDS[kind]
    whole, everywhere = make(wanted)
    split, parts = make(wanted, sharding.Frozen(mesh, split_above=1024))
    assert whole.identity == split.identity
    batch = jax.device_put(inputs(), sharding.batch_layout(mesh))
    everywhere = jax.device_put(everywhere, sharding.replicated(mesh))
    compiled = jax.jit(split.apply).lower(parts, *batch).compile()
    features = np.asarray(compiled(parts, *batch))
    np.testing.assert_array_equal(features, jax.jit(whole.apply)(everywhere, *batch))
    assert features.std() > 0.1

    held = [sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(p)) for p in (everywhere, parts)]
    assert held[1] < 0.25 * held[0]
    kernel = parts["blocks"]["fc1" if kind != "t5" else "wi_0"]["kernel"]
    assert kernel.sharding.spec == P(None, None, ("data", "fsdp"))
    assert {shard.data.nbytes * 8 for shard in kernel.addressable_shards} == {kernel.nbytes}

    # No gathered array has the layers' dim of 2: the loop gathers one layer, and nothing is gathered before it.
    lines = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    gathered = [tuple(map(int, re.search(r" = f32\[([\d,]*)\]", line)[1].split(","))) for line in lines]
    assert kernel.shape[1:] in [shape[-2:] for shape in gathered]
    assert not [shape for shape in gathered if len(shape) > 2 and shape[0] == 2]


def test_the_rule(mesh):
    def spec(path, *shape, split_above=0, mesh=mesh):
        return sharding.Frozen(mesh, split_above).spec(path, shape, 4)

    assert spec("embedding", 24, 16) == P(("data", "fsdp"))
    assert spec("embedding", 25, 16) == P(None, ("data", "fsdp"))
    assert spec("blocks/q/kernel", 64, 16, 8) == P(None, ("data", "fsdp"))
    assert spec("encoder/blocks/q/kernel", 64, 15, 8) == P(None, None, ("data", "fsdp"))
    assert spec("norm/scale", 12) == P(("data",))
    assert spec("norm/scale", 6) == P(("fsdp",))
    assert spec("norm/scale", 5) == P()
    assert spec("norm/scale", 32, split_above=4) == P()
    assert spec("norm/scale", 32, mesh=sharding.make_mesh(config.Mesh(), jax.devices()[:1])) == P()


def test_what_is_split_at_full_size():
    """T5-XXL: an eighth of its bytes on each of eight devices. ViT-L and smaller are whole."""
    from lumos_jax.encoders import vit
    from lumos_jax.weights.rules import parameter_shapes

    place = sharding.Frozen(sharding.make_mesh(config.Mesh()))

    def share(network):
        shapes = parameter_shapes(network)
        sizes = {path: 2 * int(np.prod(shape)) for path, shape in shapes.items()}
        parts = {path: place.spec(path, shapes[path], size) != P() for path, size in sizes.items()}
        return sum(size / (8 if parts[path] else 1) for path, size in sizes.items()) / sum(sizes.values())

    xxl = encoders.text_encoder.T5Encoder(4096, 24, 64, 64, 10240, 32128)
    assert 0.125 < share(xxl) < 0.126
    assert share(vit.Vit(1024, 24, 16, 14, 224)) == 1


def test_each_of_two_processes_places_its_own_parts(program):
    port = str(free_port())
    both = [start(program("tests.train.placing", port, str(number), devices=2)) for number in range(2)]
    for process in both:
        assert "placed" in finish(process).split()
