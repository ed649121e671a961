"""Parameter names of the official Lumos release (PyTorch) and of diffusers <-> this network's, both ways; those of
PixArt-alpha, DiT and RCG, read in.

One table serves I2I, T2I and the multi-scale T2I; DiT and RCG share most of its names. The rules are for arrays as the release
stores them, with heads merged; `from_official` and `to_official` split and merge them.

diffusers' PixArtTransformer2DModel shares one modulation among blocks; the Lumos network has one a block, for which it has no
class: `norm1.linear` is what diffusers calls it where blocks have their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lumos_jax.weights.rules import ImportReport, Rule, convert, dropped, export, flatten, has_data, linear, unflatten

# official | parameters, up to "kernel" and "bias" | diffusers, which splits fused projections into parts
_SHARED = (
    ("t_embedder.mlp.0", "time/fc1/", "adaln_single.emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time/fc2/", "adaln_single.emb.timestep_embedder.linear_2"),
    ("blocks.{i}.attn.qkv", "blocks/attn/qkv_", *(f"transformer_blocks.{{i}}.attn1.to_{part}" for part in "qkv")),
    ("blocks.{i}.attn.proj", "blocks/attn/out_", "transformer_blocks.{i}.attn1.to_out.0"),
    ("blocks.{i}.mlp.fc1", "blocks/mlp/fc1/", "transformer_blocks.{i}.ff.net.0.proj"),
    ("blocks.{i}.mlp.fc2", "blocks/mlp/fc2/", "transformer_blocks.{i}.ff.net.2"),
    ("blocks.{i}.adaLN_modulation.1", "blocks/modulation/", "transformer_blocks.{i}.norm1.linear"),
    ("final_layer.linear", "final/out/", "proj_out"),
)
_LUMOS = (
    ("y_embedder.y_proj.fc1", "tokens/fc1/", "caption_projection.linear_1"),
    ("y_embedder.y_proj.fc2", "tokens/fc2/", "caption_projection.linear_2"),
    ("csize_embedder.mlp.0", "vector/side/fc1/", "adaln_single.emb.resolution_embedder.linear_1"),
    ("csize_embedder.mlp.2", "vector/side/fc2/", "adaln_single.emb.resolution_embedder.linear_2"),
    ("ar_embedder.mlp.0", "vector/ratio/fc1/", "adaln_single.emb.aspect_ratio_embedder.linear_1"),
    ("ar_embedder.mlp.2", "vector/ratio/fc2/", "adaln_single.emb.aspect_ratio_embedder.linear_2"),
    ("blocks.{i}.cross_attn.q_linear", "blocks/cross/q_", "transformer_blocks.{i}.attn2.to_q"),
    ("blocks.{i}.cross_attn.kv_linear", "blocks/cross/kv_", *(f"transformer_blocks.{{i}}.attn2.to_{part}" for part in "kv")),
    ("blocks.{i}.cross_attn.proj", "blocks/cross/out_", "transformer_blocks.{i}.attn2.to_out.0"),
)  # fmt: skip
# Names without "weight" and "bias": official -> diffusers.
_TABLES = {
    "final_layer.scale_shift_table": "scale_shift_table",
    "blocks.{i}.scale_shift_table": "transformer_blocks.{i}.scale_shift_table",
    "y_embedder.y_embedding": "caption_projection.y_embedding",
    "pos_embed": "pos_embed.pos_embed",
}
# Layers of PixArt-alpha alone, and the first, whose rule is not that of a linear layer.
_MORE = (("x_embedder.proj", "", "pos_embed.proj"), ("t_block.1", "", "adaln_single.linear"))

_BASE: Sequence[Rule] = [
    *dropped("fixed sin-cos positions, computed for the grid at hand", "pos_embed"),
    *linear("x_embedder.proj", "patch/", "patch"),
    *(rule for name, path, *_ in _SHARED for rule in linear(name, path)),
]
RULES: Sequence[Rule] = [
    *_BASE,
    Rule("y_embedder.y_embedding", "null/tokens"),
    *(rule for name, path, *_ in _LUMOS for rule in linear(name, path)),
    Rule("final_layer.scale_shift_table", "final/table"),
]
_ADALN: Sequence[Rule] = [*_BASE, *linear("final_layer.adaLN_modulation.1", "final/modulation/")]
DIT_RULES: Sequence[Rule] = [*_ADALN, Rule("y_embedder.embedding_table.weight", "vector/table")]
RCG_RULES: Sequence[Rule] = [
    *_ADALN,
    *linear("rep_embedder", "vector/"),
    Rule("fake_latent", "null/vector", "squeeze"),
    *dropped("a table of classes that RCG keeps and does not look at", "y_embedder.embedding_table.weight"),
]


def _merged(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with heads merged: attention kernels (layers, in, out), biases (layers, out)."""
    if path.endswith("out_kernel"):
        return shape[0], math.prod(shape[1:-1]), shape[-1]
    if path.endswith(("q_kernel", "qkv_kernel", "kv_kernel")):
        return shape[0], shape[1], math.prod(shape[2:])
    if path.endswith(("q_bias", "qkv_bias", "kv_bias")):
        return shape[0], math.prod(shape[1:])
    return shape


def from_official(
    state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, origin: str, rules: Sequence[Rule] = RULES
) -> tuple[dict[str, Any], ImportReport]:
    """The official state dict as a network's parameters, with a report of every name.

    Args:
      state: name -> numpy array, or name -> shape to check coverage without data.
      shapes: path -> shape of the network's parameters.
      origin: what the state dict is, for messages.
      rules: those of Lumos, DIT_RULES or RCG_RULES.

    Raises:
      ValueError: names or shapes of either side that no rule accounts for; lists them all.
    """
    merged = {path: _merged(path, shape) for path, shape in shapes.items()}
    flat, report = convert(state, rules, merged, origin=origin)
    return unflatten({path: array.reshape(shapes[path]) for path, array in flat.items()}), report


def from_pixart(
    state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, origin: str
) -> tuple[dict[str, Any], ImportReport]:
    """PixArt-alpha's state dict as a network's parameters, without loss; arguments and errors as `from_official`.

    PixArt shares one SiLU -> Linear(D, 6 D) among its blocks and adds a table (6, D) of each block's own: the same as a
    linear per block with the shared weight, and the shared bias plus the table. All else has the official names.
    """
    shared = ("t_block.1.weight", "t_block.1.bias")
    if absent := [name for name in shared if name not in state]:
        raise ValueError(f"{origin} lacks {', '.join(absent)}, which every PixArt-alpha network has")
    weight, bias = (state[name] for name in shared)
    renamed = {}
    for name, value in state.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.scale_shift_table", name):
            modulation = f"blocks.{found[1]}.adaLN_modulation.1"
            renamed[f"{modulation}.weight"] = weight
            own = np.asarray(bias) + np.asarray(value).reshape(-1) if has_data(state) else bias
            renamed[f"{modulation}.bias"] = own
        elif name not in shared:
            renamed[name] = value
    return from_official(renamed, shapes, origin=origin)


def to_official(params: Mapping[str, Any], positions: np.ndarray, patch_size: int) -> dict[str, np.ndarray]:
    """A network's parameters under the official names, bit for bit, and its fixed positions (N, D) as `pos_embed`.
    Raises ValueError: the network has parts that the official release has not."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    if foreign := sorted(set(flat) - {rule.path for rule in RULES}):
        raise ValueError(f"the official Lumos network has no {', '.join(foreign)}; convert a network without them")
    flat = {path: array.reshape(_merged(path, array.shape)) for path, array in flat.items()}
    return {"pos_embed": np.asarray(positions)[None], **export(flat, RULES, patch_size)}


def _diffusers(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """Official name -> diffusers' names of its parts, of as many layers as a state dict can have by its highest number."""
    layers = range(1 + max((int(number) for name in state for number in re.findall(r"blocks\.(\d+)", name)), default=0))
    whole = {name: [part] for name, part in _TABLES.items()}
    for name, _, *parts in (*_MORE, *_SHARED, *_LUMOS):
        whole |= {f"{name}.{leaf}": [f"{part}.{leaf}" for part in parts] for leaf in ("weight", "bias")}
    return {n.format(i=i): [part.format(i=i) for part in parts] for n, parts in whole.items() for i in layers}


def to_diffusers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Official names -> diffusers'; fused projections are split. Positions are left out: diffusers computes them.
    Raises ValueError: a name that is not official."""
    renamed, table = {}, _diffusers(state)
    for name, value in state.items():
        if name not in table:
            raise ValueError(f"diffusers has no name for {name}")
        if name != "pos_embed":
            renamed |= zip(table[name], np.split(value, len(table[name])), strict=True)
    return renamed


def from_diffusers(state: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' names -> official ones; parts are fused. Other names stay, so that the import names them.

    Values may be arrays or shapes. Raises ValueError if a part of a fused projection is missing.
    """
    renamed, rest = {}, dict(state)
    for name, parts in _diffusers(state).items():
        values = [rest.pop(part) for part in parts if part in state]
        if 0 < len(values) < len(parts):
            lacking = [part for part in parts if part not in state]
            raise ValueError(f"the file has {name} in parts, but lacks {', '.join(lacking)}")
        if len(values) == 1:
            renamed[name] = values[0]
        elif values and has_data(state):
            renamed[name] = np.concatenate([np.asarray(value) for value in values])
        elif values:
            renamed[name] = (sum(shape[0] for shape in values), *values[0][1:])
    return renamed | rest
