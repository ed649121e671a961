"""Parameter names of the official Lumos release (PyTorch) <-> this network's, read both ways; those of
PixArt-alpha, DiT and RCG, read in.

One table serves I2I, T2I and the multi-scale T2I; DiT and RCG share most of its names. The rules are for arrays as the
release stores them, with heads merged; `from_official` and `to_official` split and merge them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lumos_jax.weights.rules import ImportReport, Rule, convert, export, flatten, unflatten


def _linear(name: str, kernel: str, bias: str) -> list[Rule]:
    return [Rule(f"{name}.weight", kernel, "linear"), Rule(f"{name}.bias", bias)]


_SHARED: Sequence[Rule] = [
    Rule("pos_embed", "", why="fixed sin-cos positions, computed for the grid at hand"),
    Rule("x_embedder.proj.weight", "patch/kernel", "patch"),
    Rule("x_embedder.proj.bias", "patch/bias"),
    *_linear("t_embedder.mlp.0", "time/fc1/kernel", "time/fc1/bias"),
    *_linear("t_embedder.mlp.2", "time/fc2/kernel", "time/fc2/bias"),
    *_linear("blocks.{i}.attn.qkv", "blocks/attn/qkv_kernel", "blocks/attn/qkv_bias"),
    *_linear("blocks.{i}.attn.proj", "blocks/attn/out_kernel", "blocks/attn/out_bias"),
    *_linear("blocks.{i}.mlp.fc1", "blocks/mlp/fc1/kernel", "blocks/mlp/fc1/bias"),
    *_linear("blocks.{i}.mlp.fc2", "blocks/mlp/fc2/kernel", "blocks/mlp/fc2/bias"),
    *_linear("blocks.{i}.adaLN_modulation.1", "blocks/modulation/kernel", "blocks/modulation/bias"),
    *_linear("final_layer.linear", "final/out/kernel", "final/out/bias"),
]

RULES: Sequence[Rule] = [
    *_SHARED,
    Rule("y_embedder.y_embedding", "null/tokens"),
    *_linear("y_embedder.y_proj.fc1", "tokens/fc1/kernel", "tokens/fc1/bias"),
    *_linear("y_embedder.y_proj.fc2", "tokens/fc2/kernel", "tokens/fc2/bias"),
    *_linear("csize_embedder.mlp.0", "vector/side/fc1/kernel", "vector/side/fc1/bias"),
    *_linear("csize_embedder.mlp.2", "vector/side/fc2/kernel", "vector/side/fc2/bias"),
    *_linear("ar_embedder.mlp.0", "vector/ratio/fc1/kernel", "vector/ratio/fc1/bias"),
    *_linear("ar_embedder.mlp.2", "vector/ratio/fc2/kernel", "vector/ratio/fc2/bias"),
    *_linear("blocks.{i}.cross_attn.q_linear", "blocks/cross/q_kernel", "blocks/cross/q_bias"),
    *_linear("blocks.{i}.cross_attn.kv_linear", "blocks/cross/kv_kernel", "blocks/cross/kv_bias"),
    *_linear("blocks.{i}.cross_attn.proj", "blocks/cross/out_kernel", "blocks/cross/out_bias"),
    Rule("final_layer.scale_shift_table", "final/table"),
]

_ADALN: Sequence[Rule] = [
    *_SHARED,
    *_linear("final_layer.adaLN_modulation.1", "final/modulation/kernel", "final/modulation/bias"),
]

DIT_RULES: Sequence[Rule] = [*_ADALN, Rule("y_embedder.embedding_table.weight", "vector/table")]

RCG_RULES: Sequence[Rule] = [
    *_ADALN,
    *_linear("rep_embedder", "vector/kernel", "vector/bias"),
    Rule("fake_latent", "null/vector", "squeeze"),
    Rule("y_embedder.embedding_table.weight", "", why="a table of classes that RCG keeps and does not look at"),
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
    has_data = hasattr(bias, "shape")
    renamed = {}
    for name, value in state.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.scale_shift_table", name):
            modulation = f"blocks.{found[1]}.adaLN_modulation.1"
            renamed[f"{modulation}.weight"] = weight
            renamed[f"{modulation}.bias"] = np.asarray(bias) + np.asarray(value).reshape(-1) if has_data else bias
        elif name not in shared:
            renamed[name] = value
    return from_official(renamed, shapes, origin=origin)


def to_official(params: Mapping[str, Any], positions: np.ndarray, patch_size: int) -> dict[str, np.ndarray]:
    """A network's parameters under the official names, bit for bit, and its fixed positions (N, D) as `pos_embed`.

    Raises:
      ValueError: the network has parts that the official release has not.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    if foreign := sorted(set(flat) - {rule.path for rule in RULES}):
        raise ValueError(f"the official Lumos network has no {', '.join(foreign)}; convert a network without them")
    flat = {path: array.reshape(_merged(path, array.shape)) for path, array in flat.items()}
    return {"pos_embed": np.asarray(positions)[None], **export(flat, RULES, patch_size)}
