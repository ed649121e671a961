"""Names on disk of the frozen networks -> parameter paths, as tables of rules: ViTs, KL-autoencoder, T5, CLIP's text tower."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lumos_jax.weights.rules import Rule


def _dense(name: str, path: str) -> list[Rule]:
    return [Rule(f"{name}.weight", f"{path}/kernel", "linear"), Rule(f"{name}.bias", f"{path}/bias")]


def _norm(name: str, path: str) -> list[Rule]:
    return [Rule(f"{name}.weight", f"{path}/scale"), Rule(f"{name}.bias", f"{path}/bias")]


def _qkv(names: Iterable[str]) -> list[Rule]:
    """Three linears that become one fused kernel."""
    leaves = {"weight": ("blocks/qkv/kernel", "linear", 1), "bias": ("blocks/qkv/bias", "same", 0)}
    return [Rule(f"{name}.{leaf}", *where) for name in names for leaf, where in leaves.items()]


def _dropped(why: str, *names: str) -> list[Rule]:
    return [Rule(name, "", why=why) for name in names]


# MoCo-v3's projector: Linear, batch norm, ReLU, twice, then Linear and a batch norm without scale.
_MOCO_PROJECTOR = [
    *(Rule(f"head.{3 * i}.weight", f"head/layer{i}/kernel", "linear") for i in range(3)),
    *(Rule(f"head.{3 * i + 1}.running_mean", f"head/layer{i}/mean") for i in range(3)),
    *(Rule(f"head.{3 * i + 1}.running_var", f"head/layer{i}/variance") for i in range(3)),
    *(rule for i in range(2) for rule in _norm(f"head.{3 * i + 1}", f"head/layer{i}")),
    *_dropped("counts training steps", *(f"head.{3 * i + 1}.num_batches_tracked" for i in range(3))),
]


def _blocks(prefix: str, **parts: str) -> list[Rule]:
    """The rules of stacked blocks: name on disk of each of our `norm1`, `proj`, `norm2`, `fc1`, `fc2` and others."""
    rules = []
    for part, name in parts.items():
        make = _norm if part.startswith("norm") else _dense
        rules += make(f"{prefix}.{{i}}.{name}", f"blocks/{part}")
    return rules


# The names of the original releases: DINO, DINOv2 (ls1, ls2) and MoCo-v3 (whose projector is its head).
OFFICIAL_VIT: tuple[Rule, ...] = (
    Rule("cls_token", "cls", "squeeze"),
    Rule("pos_embed", "positions", "squeeze"),
    Rule("patch_embed.proj.weight", "patch/kernel", "patch"),
    Rule("patch_embed.proj.bias", "patch/bias"),
    *_blocks("blocks", norm1="norm1", qkv="attn.qkv", proj="attn.proj", norm2="norm2", fc1="mlp.fc1", fc2="mlp.fc2"),
    Rule("blocks.{i}.ls1.gamma", "blocks/scale1"),
    Rule("blocks.{i}.ls2.gamma", "blocks/scale2"),
    *_norm("norm", "norm"),
    *_MOCO_PROJECTOR,
    *_dropped("hides patches in DINOv2's training", "mask_token"),
    *_dropped("a head of another training", "head.{rest}"),
    *_dropped("MoCo-v3's EMA of base_encoder, and its predictor", "momentum_encoder.{rest}", "predictor.{rest}"),
)

_MLP = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_HF_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_CLIP_BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", **_MLP}

# Names as transformers writes them to disk ("encoder.layer.0....") and, since version 5, holds them in memory ("layers.0....").
_HF_EMBEDDINGS = (
    Rule("embeddings.cls_token", "cls", "squeeze"),
    Rule("embeddings.position_embeddings", "positions", "squeeze"),
    Rule("embeddings.patch_embeddings.projection.weight", "patch/kernel", "patch"),
    Rule("embeddings.patch_embeddings.projection.bias", "patch/bias"),
    *_norm("layernorm", "norm"),
    *_dropped("the pooler: DINO's feature is the [CLS] token itself", "pooler.dense.weight", "pooler.dense.bias"),
    *_dropped("a classifier", "classifier.{rest}"),
)
_QKV = [f"attention.attention.{part}" for part in ("query", "key", "value")]
HF_VIT: tuple[Rule, ...] = (
    *_HF_EMBEDDINGS,
    *_qkv(f"encoder.layer.{{i}}.{name}" for name in _QKV),
    *_blocks("encoder.layer", proj="attention.output.dense", **_HF_NORMS, fc1="intermediate.dense", fc2="output.dense"),
)
HF_VIT_5: tuple[Rule, ...] = (
    *_HF_EMBEDDINGS,
    *_qkv(f"layers.{{i}}.attention.{part}_proj" for part in "qkv"),
    *_blocks("layers", proj="attention.o_proj", **_HF_NORMS, **_MLP),
)
HF_DINOV2: tuple[Rule, ...] = (
    *_HF_EMBEDDINGS,
    *_dropped("hides patches in DINOv2's training", "embeddings.mask_token"),
    *_qkv(f"encoder.layer.{{i}}.{name}" for name in _QKV),
    *_qkv(f"encoder.layer.{{i}}.attention.{part}_proj" for part in "qkv"),
    *_blocks(
        "encoder.layer", norm1="norm1", proj="attention.output.dense", norm2="norm2", fc1="mlp.fc1", fc2="mlp.fc2"
    ),
    *_blocks("encoder.layer", proj="attention.o_proj"),
    Rule("encoder.layer.{i}.layer_scale1.lambda1", "blocks/scale1"),
    Rule("encoder.layer.{i}.layer_scale2.lambda1", "blocks/scale2"),
)
HF_CLIP_VISION: tuple[Rule, ...] = (
    Rule("vision_model.embeddings.class_embedding", "cls"),
    Rule("vision_model.embeddings.patch_embedding.weight", "patch/kernel", "patch"),
    Rule("vision_model.embeddings.position_embedding.weight", "positions"),
    *_norm("vision_model.pre_layrnorm", "input_norm"),
    *_qkv(f"vision_model.encoder.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
    *_blocks("vision_model.encoder.layers", proj="self_attn.out_proj", **_CLIP_BLOCK),
    *_norm("vision_model.post_layernorm", "norm"),
    Rule("visual_projection.weight", "head/layer0/kernel", "linear"),
    *_dropped("position numbers, 0 1 2 ...", "vision_model.embeddings.position_ids"),
    *_dropped("CLIP's text half", "text_model.{rest}", "text_projection.weight", "logit_scale"),
)


def vit_rules(names: Iterable[str]) -> tuple[Rule, ...]:
    """The table that goes with a state dict's names: the original releases', or one of Hugging Face's."""
    names = list(names)

    def some(*prefixes):
        return any(name.startswith(prefixes) for name in names)

    if some("vision_model."):
        return HF_CLIP_VISION
    if some("encoder.layer.0.layer_scale1", "embeddings.mask_token"):
        return HF_DINOV2
    if some("encoder.layer."):
        return HF_VIT
    return HF_VIT_5 if some("layers.") else OFFICIAL_VIT


def kl_rules(target: Mapping[str, Any]) -> tuple[Rule, ...]:
    """diffusers' names for the parameter paths of the KL-autoencoder; nothing is stacked, so each path has one rule."""
    rules = []
    for path in target:
        side, *middle, leaf = path.split("/")
        module = ".".join(
            re.sub(r"_(\d+)(_conv)?$", lambda m: f".{m[1]}" + (".conv" if m[2] else ""), m) for m in middle
        )
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
    modern = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", name)
        modern[f"{found[1]}.{_OLD_ATTENTION[found[2]]}.{found[3]}" if found else name] = value
    return modern


# Text encoders, under Hugging Face's names.

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
_T5_DECODER = _dropped(
    "the decoder: captions are only encoded",
    "decoder.embed_tokens.weight",
    *(f"decoder.block.{{i}}.layer.0.SelfAttention.{part}.weight" for part in "qkvo"),
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    *(f"decoder.block.{{i}}.layer.1.EncDecAttention.{part}.weight" for part in "qkvo"),
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",  # early uploads of v1.0
    *(f"decoder.block.{{i}}.layer.2.DenseReluDense.{part}.weight" for part in ("wi_0", "wi_1", "wo")),
    *(f"decoder.block.{{i}}.layer.{sub}.layer_norm.weight" for sub in range(3)),
    "decoder.final_layer_norm.weight",
    "lm_head.weight",
)


def t5_rules(names: Iterable[str]) -> tuple[Rule, ...]:
    """The table for T5's names. Files keep the shared embedding under one of two names, or under both."""
    if SHARED in set(names):
        embedding = (Rule(SHARED, "embedding"), Rule(COPY, "", why=f"the same array as {SHARED}"))
    else:
        embedding = (Rule(COPY, "embedding"),)
    return (*embedding, *_T5_ENCODER, *_T5_DECODER)


_TEXT_ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj"}
CLIP_TEXT: tuple[Rule, ...] = (
    Rule("text_model.embeddings.token_embedding.weight", "embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "positions"),
    *_dropped("a buffer that counts 0, 1, 2, ...", "text_model.embeddings.position_ids"),
    *_blocks("text_model.encoder.layers", **_TEXT_ATTENTION, **_CLIP_BLOCK),
    *_norm("text_model.final_layer_norm", "norm"),
    Rule("text_projection.weight", "projection/kernel", "linear"),
)


def clip_rules(names: Iterable[str]) -> tuple[Rule, ...]:
    """The table for CLIP's names; in a file of both towers everything of the image tower is dropped."""
    image = [n for n in names if n.startswith(("vision_model.", "visual_projection.")) or n == "logit_scale"]
    return (*CLIP_TEXT, *_dropped("CLIP's image tower and its temperature", *image))


def with_text_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """CLIP names with "text_model." put before them if no name has it: transformers 5 holds a lone text tower without."""
    if any(name.startswith("text_model.") for name in state):
        return dict(state)
    bare = ("embeddings.", "encoder.layers.", "final_layer_norm.")
    return {f"text_model.{name}" if name.startswith(bare) else name: value for name, value in state.items()}
