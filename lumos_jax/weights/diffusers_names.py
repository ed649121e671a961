"""diffusers' names of a PixArt-like transformer <-> the official ones, both ways.

diffusers splits fused projections (qkv, kv) into parts. Its PixArtTransformer2DModel shares one modulation among blocks; the
Lumos network has one a block, for which it has no class: `norm1.linear` is what diffusers calls it where blocks have their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

# official <-> diffusers, as patterns with the layer's number; a name stands for its weight and its bias.
_MODULES: Mapping[str, str | tuple[str, ...]] = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "blocks.#.attn.proj": "transformer_blocks.#.attn1.to_out.0",
    "blocks.#.cross_attn.q_linear": "transformer_blocks.#.attn2.to_q",
    "blocks.#.cross_attn.proj": "transformer_blocks.#.attn2.to_out.0",
    "blocks.#.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
    "blocks.#.mlp.fc2": "transformer_blocks.#.ff.net.2",
    "blocks.#.adaLN_modulation.1": "transformer_blocks.#.norm1.linear",
    "final_layer.linear": "proj_out",
    # Tables, whose names have no such ending.
    "final_layer.scale_shift_table": "scale_shift_table",
    "blocks.#.scale_shift_table": "transformer_blocks.#.scale_shift_table",
    "y_embedder.y_embedding": "caption_projection.y_embedding",
    "pos_embed": "pos_embed.pos_embed",
    # Fused projections, with their parts in order.
    "blocks.#.attn.qkv": tuple(f"transformer_blocks.#.attn1.to_{part}" for part in "qkv"),
    "blocks.#.cross_attn.kv_linear": tuple(f"transformer_blocks.#.attn2.to_{part}" for part in "kv"),
}
_PARTS = {name: (parts,) if isinstance(parts, str) else parts for name, parts in _MODULES.items()}
_OFFICIAL = {part: name for name, parts in _PARTS.items() for part in parts}

CLASS = "LumosTransformer2DModel"


def config_json(state: Mapping[str, np.ndarray], heads: int, position_scale: float) -> dict[str, Any]:
    """What stands in `transformer/config.json` beside the weights `state` (official names)."""
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    return {
        "_class_name": CLASS,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_layers": sum(name.endswith(".attn.qkv.weight") for name in state),
        "patch_size": patch_size,
        "sample_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "in_channels": channels,
        "out_channels": state["final_layer.linear.weight"].shape[0] // patch_size**2,
        "caption_channels": state["y_embedder.y_embedding"].shape[1],
        "interpolation_scale": position_scale,
        "norm_type": "ada_norm_zero",
        "norm_eps": 1e-6,
        "activation_fn": "gelu-approximate",
    }


def is_diffusers(state: Mapping[str, Any]) -> bool:
    return any(name.startswith("transformer_blocks.") for name in state)


def _split(name: str) -> tuple[str, str, str]:
    """ "blocks.3.mlp.fc1.weight" -> ("blocks.#.mlp.fc1", "3", ".weight"); tables have no such ending."""
    found = re.search(r"\.(\d+)\.", name) if name.startswith(("blocks.", "transformer_blocks.")) else None
    pattern = name if found is None else f"{name[: found.start()]}.#.{name[found.end() :]}"
    module, dot, leaf = pattern.rpartition(".")
    layer = found[1] if found else ""
    return (module, layer, dot + leaf) if leaf in ("weight", "bias") else (pattern, layer, "")


def to_diffusers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Official names -> diffusers'; fused projections are split. Positions are left out: diffusers computes them.

    Raises:
      ValueError: a name that is not official.
    """
    renamed = {}
    for name, value in state.items():
        pattern, layer, leaf = _split(name)
        if name == "pos_embed":
            continue
        if pattern not in _PARTS:
            raise ValueError(f"diffusers has no name for {name}")
        parts = _PARTS[pattern]
        for part, piece in zip(parts, np.split(value, len(parts)), strict=True):
            renamed[part.replace("#", layer) + leaf] = piece
    return renamed


def from_diffusers(state: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' names -> official ones; parts are fused. Names that are unknown stay, so that the import names them.

    Values may be arrays or shapes. Raises ValueError if a part of a fused projection is missing.
    """
    renamed: dict[str, Any] = {}
    for name, value in state.items():
        pattern, layer, leaf = _split(name)
        official = _OFFICIAL.get(pattern)
        target = name if official is None else official.replace("#", layer) + leaf
        if target in renamed:
            continue
        parts = [] if official is None else [part.replace("#", layer) + leaf for part in _PARTS[official]]
        if missing := [part for part in parts if part not in state]:
            raise ValueError(f"the file has {name}, but lacks {', '.join(missing)}")
        renamed[target] = _fuse([state[part] for part in parts]) if len(parts) > 1 else value
    return renamed


def _fuse(parts: list[Any]) -> Any:
    if hasattr(parts[0], "shape"):
        return np.concatenate([np.asarray(part) for part in parts])
    return (sum(part[0] for part in parts), *parts[0][1:])
