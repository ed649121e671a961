"""Hugging Face names of the text encoders -> parameter paths, as rules of `lumos_jax.weights.rules`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lumos_jax.weights.rules import Rule

SHARED, COPY = "shared.weight", "encoder.embed_tokens.weight"

_T5_ENCODER: tuple[Rule, ...] = (
    # Held by layer 0 alone, used by all: a relative bias in another layer (umT5) has no rule.
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias"),
    *(Rule(f"encoder.block.{{i}}.layer.0.SelfAttention.{p}.weight", f"blocks/{p}/kernel", "linear") for p in "qkvo"),
    Rule("encoder.block.{i}.layer.0.layer_norm.weight", "blocks/norm1/scale"),
    *(
        Rule(f"encoder.block.{{i}}.layer.1.DenseReluDense.{p}.weight", f"blocks/{p}/kernel", "linear")
        for p in ("wi_0", "wi_1", "wo")
    ),
    Rule("encoder.block.{i}.layer.1.layer_norm.weight", "blocks/norm2/scale"),
    Rule("encoder.final_layer_norm.weight", "norm/scale"),
)
_DECODER = "the decoder: captions are only encoded"
_T5_DECODER: tuple[Rule, ...] = tuple(
    Rule(f"{name}.weight", "", why=_DECODER)
    for name in (
        "decoder.embed_tokens",
        *(f"decoder.block.{{i}}.layer.0.SelfAttention.{part}" for part in "qkvo"),
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        *(f"decoder.block.{{i}}.layer.1.EncDecAttention.{part}" for part in "qkvo"),
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias",  # early uploads of v1.0
        *(f"decoder.block.{{i}}.layer.2.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
        *(f"decoder.block.{{i}}.layer.{sub}.layer_norm" for sub in range(3)),
        "decoder.final_layer_norm",
        "lm_head",
    )
)


def t5_rules(names: Iterable[str]) -> tuple[Rule, ...]:
    """The table for T5's names. Files keep the shared embedding under one of two names, or under both."""
    if SHARED in set(names):
        embedding = (Rule(SHARED, "embedding"), Rule(COPY, "", why=f"the same array as {SHARED}"))
    else:
        embedding = (Rule(COPY, "embedding"),)
    return (*embedding, *_T5_ENCODER, *_T5_DECODER)


def _affine(name: str, path: str) -> list[Rule]:
    return [Rule(f"{name}.weight", f"{path}/kernel", "linear"), Rule(f"{name}.bias", f"{path}/bias")]


def _norm(name: str, path: str) -> list[Rule]:
    return [Rule(f"{name}.weight", f"{path}/scale"), Rule(f"{name}.bias", f"{path}/bias")]


_LAYER = "text_model.encoder.layers.{i}"
CLIP_TEXT: tuple[Rule, ...] = (
    Rule("text_model.embeddings.token_embedding.weight", "embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "positions"),
    Rule("text_model.embeddings.position_ids", "", why="a buffer that counts 0, 1, 2, ..."),
    *_norm(f"{_LAYER}.layer_norm1", "blocks/norm1"),
    *(rule for part in "qkv" for rule in _affine(f"{_LAYER}.self_attn.{part}_proj", f"blocks/{part}")),
    *_affine(f"{_LAYER}.self_attn.out_proj", "blocks/o"),
    *_norm(f"{_LAYER}.layer_norm2", "blocks/norm2"),
    *_affine(f"{_LAYER}.mlp.fc1", "blocks/fc1"),
    *_affine(f"{_LAYER}.mlp.fc2", "blocks/fc2"),
    *_norm("text_model.final_layer_norm", "norm"),
    Rule("text_projection.weight", "projection/kernel", "linear"),
)


def clip_rules(names: Iterable[str]) -> tuple[Rule, ...]:
    """The table for CLIP's names; in a file of both towers everything of the image tower is dropped."""
    image = [n for n in names if n.startswith(("vision_model.", "visual_projection.")) or n == "logit_scale"]
    return (*CLIP_TEXT, *(Rule(name, "", why="CLIP's image tower and its temperature") for name in image))


def with_text_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """CLIP names with "text_model." put before them if no name has it: transformers 5 holds a lone text tower without."""
    if any(name.startswith("text_model.") for name in state):
        return dict(state)
    bare = ("embeddings.", "encoder.layers.", "final_layer_norm.")
    return {f"text_model.{name}" if name.startswith(bare) else name: value for name, value in state.items()}
