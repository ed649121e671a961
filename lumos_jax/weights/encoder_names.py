"""Names on disk of the frozen networks -> parameter paths, as tables of rules: ViTs, KL-autoencoder, T5, CLIP's text tower."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lumos_jax.weights.rules import Rule, dropped, linear


def _norm(name: str, path: str) -> list[Rule]:
    return [Rule(f"{name}.weight", f"{path}scale"), Rule(f"{name}.bias", f"{path}bias")]


def _matrix(name: str, path: str) -> Rule:
    return Rule(f"{name}.weight", f"{path}/kernel", "linear")


def _qkv(names: Iterable[str]) -> list[Rule]:
    """Three linears that become one fused kernel."""
    leaves = {"weight": ("blocks/qkv/kernel", "linear", 1), "bias": ("blocks/qkv/bias", "same", 0)}
    return [Rule(f"{name}.{leaf}", *where) for name in names for leaf, where in leaves.items()]


def _blocks(prefix: str, **parts: str) -> list[Rule]:
    """The rules of stacked blocks: name on disk of each of our `norm1`, `proj`, `norm2`, `fc1`, `fc2` and others."""
    pairs = [(_norm if part.startswith("norm") else linear, part, name) for part, name in parts.items()]
    return [rule for make, part, name in pairs for rule in make(f"{prefix}.{{i}}.{name}", f"blocks/{part}/")]


_MLP = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_HF_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_CLIP_BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", **_MLP}
_HIDES = "hides patches in DINOv2's training"

# The names of all ViTs that are read; no name is of two families.
VIT: tuple[Rule, ...] = (
    # The original releases: DINO, DINOv2 (ls1, ls2) and MoCo-v3.
    Rule("cls_token", "cls", "squeeze"),
    Rule("pos_embed", "positions", "squeeze"),
    *linear("patch_embed.proj", "patch/", "patch"),
    *_blocks("blocks", norm1="norm1", qkv="attn.qkv", proj="attn.proj", norm2="norm2", **_MLP),
    Rule("blocks.{i}.ls1.gamma", "blocks/scale1"),
    Rule("blocks.{i}.ls2.gamma", "blocks/scale2"),
    *_norm("norm", "norm/"),
    # MoCo-v3's projector: Linear, batch norm, ReLU, twice, then Linear and a batch norm without scale.
    *(_matrix(f"head.{3 * i}", f"head/layer{i}") for i in range(3)),
    *(Rule(f"head.{3 * i + 1}.running_mean", f"head/layer{i}/mean") for i in range(3)),
    *(Rule(f"head.{3 * i + 1}.running_var", f"head/layer{i}/variance") for i in range(3)),
    *(rule for i in range(2) for rule in _norm(f"head.{3 * i + 1}", f"head/layer{i}/")),
    *dropped("counts training steps", *(f"head.{3 * i + 1}.num_batches_tracked" for i in range(3))),
    *dropped(_HIDES, "mask_token"),
    *dropped("a head of another training", "head.{rest}"),
    *dropped("MoCo-v3's EMA of base_encoder, and its predictor", "momentum_encoder.{rest}", "predictor.{rest}"),
    # Hugging Face's, as transformers writes them to disk ("encoder.layer.0....") and, since version 5, holds DINO's in memory.
    Rule("embeddings.cls_token", "cls", "squeeze"),
    Rule("embeddings.position_embeddings", "positions", "squeeze"),
    *linear("embeddings.patch_embeddings.projection", "patch/", "patch"),
    *_norm("layernorm", "norm/"),
    *_qkv(f"encoder.layer.{{i}}.attention.attention.{part}" for part in ("query", "key", "value")),
    *_qkv(f"{prefix}.{{i}}.attention.{part}_proj" for prefix in ("encoder.layer", "layers") for part in "qkv"),
    *_blocks("encoder.layer", **_HF_NORMS, fc1="intermediate.dense", fc2="output.dense"),
    *_blocks("encoder.layer", norm1="norm1", norm2="norm2", **_MLP),
    *_blocks("encoder.layer", proj="attention.output.dense"),
    *_blocks("encoder.layer", proj="attention.o_proj"),
    Rule("encoder.layer.{i}.layer_scale1.lambda1", "blocks/scale1"),
    Rule("encoder.layer.{i}.layer_scale2.lambda1", "blocks/scale2"),
    *_blocks("layers", proj="attention.o_proj", **_HF_NORMS, **_MLP),
    *dropped("the pooler: DINO's feature is the [CLS] token itself", "pooler.dense.weight", "pooler.dense.bias"),
    *dropped("a classifier", "classifier.{rest}"),
    *dropped(_HIDES, "embeddings.mask_token"),
    # CLIP's image tower.
    Rule("vision_model.embeddings.class_embedding", "cls"),
    Rule("vision_model.embeddings.patch_embedding.weight", "patch/kernel", "patch"),
    Rule("vision_model.embeddings.position_embedding.weight", "positions"),
    *_norm("vision_model.pre_layrnorm", "input_norm/"),
    *_qkv(f"vision_model.encoder.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
    *_blocks("vision_model.encoder.layers", proj="self_attn.out_proj", **_CLIP_BLOCK),
    *_norm("vision_model.post_layernorm", "norm/"),
    _matrix("visual_projection", "head/layer0"),
    *dropped("position numbers, 0 1 2 ...", "vision_model.embeddings.position_ids"),
    *dropped("CLIP's text half", "text_model.{rest}", "text_projection.weight", "logit_scale"),
)


def kl_rules(target: Mapping[str, Any]) -> tuple[Rule, ...]:
    """diffusers' names for the parameter paths of the KL-autoencoder; nothing is stacked, so each path has one rule."""
    rules = []
    for path in target:
        side, *middle, leaf = path.split("/")
        module = re.sub(r"_(\d+)(_conv)?(?=\.|$)", lambda m: f".{m[1]}" + (".conv" if m[2] else ""), ".".join(middle))
        module = module if module.endswith("quant_conv") else f"{side}.{module}"
        if leaf != "kernel":
            rules.append(Rule(f"{module}.{'weight' if leaf == 'scale' else 'bias'}", path))
        else:
            rules.append(Rule(f"{module}.weight", path, "linear" if ".to_" in module else "conv"))
    return tuple(rules)


# Before diffusers 0.19 the middle attention's projections had other names.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_kl_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers autoencoder's state dict with the attention's old names replaced by today's."""
    old = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")
    return {old.sub(lambda m: _OLD_ATTENTION[m[1]], name): value for name, value in state.items()}


# Text encoders, under Hugging Face's names.

SHARED, COPY = "shared.weight", "encoder.embed_tokens.weight"  # of T5's embedding; files have either, or both

_T5_ENCODER: tuple[Rule, ...] = (
    # Held by layer 0 alone, used by all: a relative bias in another layer (umT5) has no rule.
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias"),
    *(_matrix(f"encoder.block.{{i}}.layer.0.SelfAttention.{part}", f"blocks/{part}") for part in "qkvo"),
    Rule("encoder.block.{i}.layer.0.layer_norm.weight", "blocks/norm1/scale"),
    *(
        _matrix(f"encoder.block.{{i}}.layer.1.DenseReluDense.{part}", f"blocks/{part}")
        for part in ("wi_0", "wi_1", "wo")
    ),
    Rule("encoder.block.{i}.layer.1.layer_norm.weight", "blocks/norm2/scale"),
    Rule("encoder.final_layer_norm.weight", "norm/scale"),
    *dropped("the decoder: captions are only encoded", "decoder.{rest}", "lm_head.weight"),
)


def t5_rules(names: Iterable[str]) -> tuple[Rule, ...]:
    """The table for T5's names."""
    if SHARED in names:
        return Rule(SHARED, "embedding"), *dropped(f"the same array as {SHARED}", COPY), *_T5_ENCODER
    return Rule(COPY, "embedding"), *_T5_ENCODER


CLIP_TEXT: tuple[Rule, ...] = (
    Rule("text_model.embeddings.token_embedding.weight", "embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "positions"),
    *dropped("a buffer that counts 0, 1, 2, ...", "text_model.embeddings.position_ids"),
    *_blocks("text_model.encoder.layers", **{part: f"self_attn.{part}_proj" for part in "qkv"}, o="self_attn.out_proj"),
    *_blocks("text_model.encoder.layers", **_CLIP_BLOCK),
    *_norm("text_model.final_layer_norm", "norm/"),
    _matrix("text_projection", "projection"),
    *dropped(
        "CLIP's image tower and its temperature", "vision_model.{rest}", "visual_projection.{rest}", "logit_scale"
    ),
)


def with_text_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """CLIP names with "text_model." put before them if no name has it: transformers 5 holds a lone text tower without."""
    if any(name.startswith("text_model.") for name in state):
        return dict(state)
    bare = ("embeddings.", "encoder.layers.", "final_layer_norm.")
    return {f"text_model.{name}" if name.startswith(bare) else name: value for name, value in state.items()}
