"""The attention kernel on GPUs: which devices have it, and that the sharded forward pass with it gives the plain one's numbers.

cuDNN runs on GPUs alone; here XLA's form of the same function stands in for it, with the same arguments.
"""

import dataclasses
import functools
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumos_jax import config
from lumos_jax.models import Condition, Network, attention, make_dit
from lumos_jax.planning import ahead, parse_target, read_program
from lumos_jax.train import sharded_forward, sharding

ROWS = 4


@pytest.mark.parametrize(
    ("device", "hardware"),
    [
        ({"platform": "tpu"}, "tpu"),
        ({"platform": "gpu", "compute_capability": "9.0"}, "cuda"),
        ({"platform": "gpu", "compute_capability": "12.0"}, "cuda"),
        ({"platform": "gpu", "compute_capability": "7.5"}, ""),
        ({"platform": "gpu", "compute_capability": "gfx942"}, ""),
        ({"platform": "cpu"}, ""),
    ],
)
def test_which_hardware_has_kernels(device, hardware):
    assert sharded_forward.hardware_of(types.SimpleNamespace(**device)) == hardware


@dataclasses.dataclass(frozen=True)
class Task:
    network: Network


@pytest.mark.parametrize(("platform", "unroll"), [("tpu", 1), ("gpu", 3), ("cpu", 2)])
def test_gpus_unroll_the_layers(platform, unroll):
    dit = make_dit(config.Model(size="32x3x2", patch_size=2), latent_shape=(8, 8, 4), out_channels=4, token_shape=None)
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device]), size=1)
    task = sharded_forward.shard(Task(dataclasses.replace(dit, unroll=2)), mesh)
    assert task.network.unroll == unroll


def test_which_form_of_attention_is_taken():
    chosen = functools.partial(attention.kernel_for, "cuda")
    assert chosen(256, 72, jnp.bfloat16) == chosen(4096, 128, jnp.bfloat16) == "cudnn"
    assert chosen(255, 72, jnp.bfloat16) == chosen(1024, 68, jnp.bfloat16) == chosen(1024, 136, jnp.bfloat16) == ""
    assert chosen(1024, 72, jnp.float32) == attention.kernel_for("", 1024, 72, jnp.bfloat16) == ""
    assert attention.kernel_for("tpu", 1024, 72, jnp.bfloat16) == "pallas"
    assert attention.kernel_for("tpu", 1000, 72, jnp.bfloat16) == ""


@pytest.fixture
def asked(monkeypatch):
    """Shapes of the queries of each call of cuDNN, on devices that pass for GPUs, however few the tokens, and in float32, where
    numbers can be held against each other closely."""
    calls, plain = [], jax.nn.dot_product_attention

    def attend(q, k, v, implementation):
        assert implementation == "cudnn"
        calls.append(q.shape)
        return plain(q, k, v, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    monkeypatch.setattr(sharded_forward, "hardware_of", lambda device: "cuda")
    monkeypatch.setattr(attention, "kernel_for", lambda hardware, *_: "cudnn" if hardware == "cuda" else "")
    return calls


@pytest.fixture(scope="module")
def network():
    """A network, its parameters with no zeros, what it is given, and what `passes` gives of it alone."""
    model = config.Model(size="32x1x2", patch_size=2, dtype="float32")
    dit = make_dit(model, latent_shape=(8, 8, 4), out_channels=4, token_shape=(1, 12))
    numbers = np.random.default_rng(0)
    params = jax.eval_shape(dit.init, jax.random.key(0))
    params = jax.tree.map(lambda p: 0.2 * numbers.standard_normal(p.shape, np.float32), params)
    x, tokens = (numbers.standard_normal(shape, np.float32) for shape in ((ROWS, 8, 8, 4), (ROWS, 1, 12)))
    given = (x, np.linspace(3, 700, ROWS, dtype=np.float32), Condition(tokens=tokens))
    return dit, params, given, passes(dit, params, given)


def passes(dit, params, given):
    """The output and the gradient of the attention's parameters."""

    def loss(attn):
        out = dit.apply(params | {"blocks": params["blocks"] | {"attn": attn}}, *given)
        return (out**2).mean(), out

    grad, out = jax.jit(jax.grad(loss, has_aux=True))(params["blocks"]["attn"])
    return out, *jax.tree.leaves(grad)


@pytest.mark.parametrize(
    ("devices", "fsdp", "queries"),
    [(4, 2, [(1, 16, 2, 16)]), (8, 1, [])],
    ids=["rows of their own", "fewer rows than devices"],
)
def test_split_over_gpus_it_gives_the_same(network, asked, devices, fsdp, queries):
    dit, params, given, alone = network
    mesh = sharding.make_mesh(config.Mesh(fsdp=fsdp), jax.devices()[:devices])
    there = passes(sharded_forward.ShardedForward(**vars(dit), mesh=mesh), params, given)
    assert asked[:1] == queries
    for ours, theirs in zip(there, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(np.abs(theirs).max()))


def test_under_fsdp_the_scan_gathers_each_layer_and_reduce_scatters_its_gradient():
    model = config.Model(size="64x3x4", patch_size=2, remat="mlp")
    dit = dataclasses.replace(make_dit(model, latent_shape=(8, 8, 4), out_channels=4, token_shape=(2, 12)), unroll=1)
    mesh = sharding.make_mesh(config.Mesh(fsdp=8))
    rows = jax.NamedSharding(mesh, sharding.BATCH)
    shapes = jax.eval_shape(dit.init, jax.random.key(0))
    layouts = sharding.param_shardings(mesh, shapes, dit.logical_axes())
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, layouts)
    x, t, tokens = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=rows) for s in ((8, 8, 8, 4), (8,), (8, 2, 12)))
    sharded = sharded_forward.ShardedForward(**vars(dit), mesh=mesh)

    def loss(params, x, t, tokens):
        return (sharded.apply(params, x, t, Condition(tokens=tokens)) ** 2).mean()

    text = jax.jit(jax.grad(loss), out_shardings=layouts).lower(params, x, t, tokens).compile().as_text()
    kernels = sum("fsdp" in layout.spec for layout in jax.tree.leaves(layouts["blocks"]) if len(layout.spec) > 2)
    assert kernels == 8
    kernels -= 1  # the modulation's is not gathered: its rows are exchanged, before the scan
    assert sorted(read_program(text, 8).trips.values()) == [3, 3]
    loops, entry = text.split("\nENTRY ")
    assert {name: loops.count(f" {name}(") for name in ("all-gather", "reduce-scatter", "all-reduce")} == {
        "all-gather": 2 * kernels,  # forward, and again for backward
        "reduce-scatter": kernels,
        "all-reduce": 0,
    }
    assert entry.count(" reduce-scatter(") == 1  # of the embedded time's gradient
    assert entry.count(" all-to-all(") == 2


@pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or not any(map(importlib.util.find_spec, ahead.CUDA_PLUGINS)),
    reason="the compiler for CUDA is not installed",
)
def test_the_cuda_compiler_takes_it_within_and_without_shard_map():
    target = parse_target("h100:8")
    mesh = sharding.make_mesh(config.Mesh(fsdp=2), ahead.devices_of(target))
    layout = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    heads = jax.ShapeDtypeStruct((8, 1024, 2, 72), jnp.bfloat16, sharding=layout)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    for form in (attend, jax.shard_map(attend, mesh=mesh, in_specs=sharding.BATCH, out_specs=sharding.BATCH)):
        gradient = jax.jit(jax.grad(lambda q, k, v, form=form: form(q, k, v).astype(jnp.float32).sum(), (0, 1, 2)))
        compiled = ahead.compile_for(target, gradient.lower(heads, heads, heads))
        assert compiled.text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == 1
        assert compiled.memory.total < 4 * 2 * 1024**2  # of one device's logits
