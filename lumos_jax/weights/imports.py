"""Frozen networks of every kind from a state dict under anyone's names: arrays, or shapes alone to see the account."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lumos_jax.encoders import latents, text_encoder
from lumos_jax.weights import files
from lumos_jax.weights.frozen_files import Frozen
from lumos_jax.weights.vit_files import convert_vit


def _vit(state, told, heads, origin):
    return convert_vit(state, told, heads, origin)


def _autoencoder(state, told, heads, origin):
    shape = latents.kl.KlShape() if told is None else latents.kl_shape_of(told, origin)
    return shape, *latents.convert_kl(state, shape, origin)


def _t5(state, told, heads, origin):
    return text_encoder.convert_t5(state, told or _told_of_t5(state), origin)


def _clip_text(state, told, heads, origin):
    return text_encoder.convert_clip_text(state, told, origin)


# kind -> (name of the weights in a directory, state dict to network, parameters and account)
KINDS: Mapping[str, tuple[str, Callable]] = {
    "image-encoder": ("model", _vit),
    "autoencoder": ("diffusion_pytorch_model", _autoencoder),
    "t5": ("model", _t5),
    "clip-text": ("model", _clip_text),
}


def read(kind: str, source: str, *, heads: int = 0, shapes_only: bool = False) -> Frozen:
    """Weights under anyone's names as a frozen network.

    Args:
      kind: a key of KINDS.
      source: directory, file or hub id; with `shapes_only` a .json file of name -> shape will do.
      heads: for files that do not say; 0 takes the usual number.
      shapes_only: nothing large is read; the parameters are shapes.

    Raises:
      ValueError: as `files.locate`, `files.read` and the network's own reader.
    """
    stem, convert = KINDS[kind]
    state, told = files.read(files.locate(source, "--source"), stem, shapes_only)
    if told is None and kind == "clip-text" and shapes_only:
        told = _told_of_clip_text(state)
    return Frozen(kind, *convert(state, told, heads, source))


def _told_of_t5(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """T5's config.json from the shapes of its arrays, which tell all of it; None if these are no T5's arrays."""
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in state.items()}
    first = "encoder.block.0.layer"
    bias = shapes.get(f"{first}.0.SelfAttention.relative_attention_bias.weight")
    gate = shapes.get(f"{first}.1.DenseReluDense.wi_0.weight")
    if bias is None or gate is None:
        return None
    depths = [int(found[1]) for name in shapes if (found := re.match(r"encoder\.block\.(\d+)\.", name))]
    embedding = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    return {
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "d_model": embedding[1], "vocab_size": embedding[0],
        "num_layers": 1 + max(depths), "num_heads": bias[1], "d_kv": shapes[f"{first}.0.SelfAttention.q.weight"][0] // bias[1],
        "d_ff": gate[0], "relative_attention_num_buckets": bias[0], "layer_norm_epsilon": 1e-6,
    }  # fmt: skip


def _told_of_clip_text(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Enough of CLIP's config.json to see the account of its names; the number of heads and the end-of-text id are guesses.
    None if these are no CLIP text tower's arrays."""
    tables = [f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position")]
    if not {*tables, "text_model.encoder.layers.0.mlp.fc1.weight"} <= state.keys():
        return None
    vocabulary, width = state["text_model.embeddings.token_embedding.weight"]
    depths = [int(found[1]) for name in state if (found := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))]
    return {
        "model_type": "clip_text_model", "hidden_size": width, "num_hidden_layers": 1 + max(depths, default=-1),
        "num_attention_heads": max(width // 64, 1), "vocab_size": vocabulary, "hidden_act": "quick_gelu", "eos_token_id": 2,
        "intermediate_size": state["text_model.encoder.layers.0.mlp.fc1.weight"][0], "layer_norm_eps": 1e-5,
        "max_position_embeddings": state["text_model.embeddings.position_embedding.weight"][0],
    }  # fmt: skip
