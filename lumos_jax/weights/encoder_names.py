"""Names on disk of the frozen networks -> parameter paths, as rules of `lumos_jax.weights.rules`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lumos_jax.weights.rules import Rule


def _dense(name: str, path: str, **more: Any) -> list[Rule]:
    return [Rule(f"{name}.weight", f"{path}/kernel", "linear", **more), Rule(f"{name}.bias", f"{path}/bias", **more)]


def _norm(name: str, path: str) -> list[Rule]:
    return [Rule(f"{name}.weight", f"{path}/scale"), Rule(f"{name}.bias", f"{path}/bias")]


def _qkv(names: Iterable[str]) -> list[Rule]:
    """Three linears that become one fused kernel."""
    rules = []
    for name in names:
        rules.append(Rule(f"{name}.weight", "blocks/qkv/kernel", "linear", join=1))
        rules.append(Rule(f"{name}.bias", "blocks/qkv/bias", join=0))
    return rules


def _dropped(why: str, *names: str) -> list[Rule]:
    return [Rule(name, "", why=why) for name in names]


def _batch_norm(name: str, path: str, affine: bool) -> list[Rule]:
    return [
        Rule(f"{name}.running_mean", f"{path}/mean"),
        Rule(f"{name}.running_var", f"{path}/variance"),
        Rule(f"{name}.num_batches_tracked", "", why="counts training steps"),
        *(_norm(name, path) if affine else []),
    ]


# MoCo-v3's projector: Linear, batch norm, ReLU, twice, then Linear and a batch norm without scale.
_MOCO_PROJECTOR = [
    rule
    for number, place in enumerate((0, 3, 6))
    for rule in (
        Rule(f"head.{place}.weight", f"head/layer{number}/kernel", "linear"),
        *_batch_norm(f"head.{place + 1}", f"head/layer{number}", affine=place < 6),
    )
]

# The names of the original releases: DINO, DINOv2 (ls1, ls2) and MoCo-v3 (whose projector is its head).
OFFICIAL_VIT: tuple[Rule, ...] = (
    Rule("cls_token", "cls", "squeeze"),
    Rule("pos_embed", "positions", "squeeze"),
    Rule("patch_embed.proj.weight", "patch/kernel", "patch"),
    Rule("patch_embed.proj.bias", "patch/bias"),
    *_norm("blocks.{i}.norm1", "blocks/norm1"),
    *_dense("blocks.{i}.attn.qkv", "blocks/qkv"),
    *_dense("blocks.{i}.attn.proj", "blocks/proj"),
    *_norm("blocks.{i}.norm2", "blocks/norm2"),
    *_dense("blocks.{i}.mlp.fc1", "blocks/fc1"),
    *_dense("blocks.{i}.mlp.fc2", "blocks/fc2"),
    Rule("blocks.{i}.ls1.gamma", "blocks/scale1"),
    Rule("blocks.{i}.ls2.gamma", "blocks/scale2"),
    *_norm("norm", "norm"),
    *_MOCO_PROJECTOR,
    *_dropped("hides patches in DINOv2's training", "mask_token"),
    *_dropped("a head of another training", "head.{rest}"),
    *_dropped("MoCo-v3's average of base_encoder, and its predictor", "momentum_encoder.{rest}", "predictor.{rest}"),
)

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
HF_VIT: tuple[Rule, ...] = (
    *_HF_EMBEDDINGS,
    *_norm("encoder.layer.{i}.layernorm_before", "blocks/norm1"),
    *_qkv(f"encoder.layer.{{i}}.attention.attention.{part}" for part in ("query", "key", "value")),
    *_dense("encoder.layer.{i}.attention.output.dense", "blocks/proj"),
    *_norm("encoder.layer.{i}.layernorm_after", "blocks/norm2"),
    *_dense("encoder.layer.{i}.intermediate.dense", "blocks/fc1"),
    *_dense("encoder.layer.{i}.output.dense", "blocks/fc2"),
)
HF_VIT_5: tuple[Rule, ...] = (
    *_HF_EMBEDDINGS,
    *_norm("layers.{i}.layernorm_before", "blocks/norm1"),
    *_qkv(f"layers.{{i}}.attention.{part}_proj" for part in "qkv"),
    *_dense("layers.{i}.attention.o_proj", "blocks/proj"),
    *_norm("layers.{i}.layernorm_after", "blocks/norm2"),
    *_dense("layers.{i}.mlp.fc1", "blocks/fc1"),
    *_dense("layers.{i}.mlp.fc2", "blocks/fc2"),
)


HF_DINOV2: tuple[Rule, ...] = (
    *_HF_EMBEDDINGS,
    *_dropped("hides patches in DINOv2's training", "embeddings.mask_token"),
    *_norm("encoder.layer.{i}.norm1", "blocks/norm1"),
    *_qkv(f"encoder.layer.{{i}}.attention.attention.{part}" for part in ("query", "key", "value")),
    *_qkv(f"encoder.layer.{{i}}.attention.{part}_proj" for part in "qkv"),
    *_dense("encoder.layer.{i}.attention.output.dense", "blocks/proj"),
    *_dense("encoder.layer.{i}.attention.o_proj", "blocks/proj"),
    Rule("encoder.layer.{i}.layer_scale1.lambda1", "blocks/scale1"),
    *_norm("encoder.layer.{i}.norm2", "blocks/norm2"),
    *_dense("encoder.layer.{i}.mlp.fc1", "blocks/fc1"),
    *_dense("encoder.layer.{i}.mlp.fc2", "blocks/fc2"),
    Rule("encoder.layer.{i}.layer_scale2.lambda1", "blocks/scale2"),
)
HF_CLIP_VISION: tuple[Rule, ...] = (
    Rule("vision_model.embeddings.class_embedding", "cls"),
    Rule("vision_model.embeddings.patch_embedding.weight", "patch/kernel", "patch"),
    Rule("vision_model.embeddings.position_embedding.weight", "positions"),
    *_norm("vision_model.pre_layrnorm", "input_norm"),
    *_norm("vision_model.encoder.layers.{i}.layer_norm1", "blocks/norm1"),
    *_qkv(f"vision_model.encoder.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
    *_dense("vision_model.encoder.layers.{i}.self_attn.out_proj", "blocks/proj"),
    *_norm("vision_model.encoder.layers.{i}.layer_norm2", "blocks/norm2"),
    *_dense("vision_model.encoder.layers.{i}.mlp.fc1", "blocks/fc1"),
    *_dense("vision_model.encoder.layers.{i}.mlp.fc2", "blocks/fc2"),
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
    """A diffusers autoencoder's state dict with the attention's old names replaced by today's, and 1x1 kernels flattened."""
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


_LAYER = "text_model.encoder.layers.{i}"
CLIP_TEXT: tuple[Rule, ...] = (
    Rule("text_model.embeddings.token_embedding.weight", "embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "positions"),
    Rule("text_model.embeddings.position_ids", "", why="a buffer that counts 0, 1, 2, ..."),
    *_norm(f"{_LAYER}.layer_norm1", "blocks/norm1"),
    *(rule for part in "qkv" for rule in _dense(f"{_LAYER}.self_attn.{part}_proj", f"blocks/{part}")),
    *_dense(f"{_LAYER}.self_attn.out_proj", "blocks/o"),
    *_norm(f"{_LAYER}.layer_norm2", "blocks/norm2"),
    *_dense(f"{_LAYER}.mlp.fc1", "blocks/fc1"),
    *_dense(f"{_LAYER}.mlp.fc2", "blocks/fc2"),
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
