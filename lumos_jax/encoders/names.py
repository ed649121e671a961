"""Names on disk of the frozen networks -> parameter paths, as rules of `lumos_jax.name_rules`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lumos_jax.name_rules import Rule


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


_PROJECTION = "DINO's projection head: only its training needs it"

DINO_VIT: tuple[Rule, ...] = (
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
    *_norm("norm", "norm"),
    *(Rule(f"head.mlp.{leaf}", "", why=_PROJECTION) for leaf in ("weight", "bias")),
    *(
        Rule(f"head.mlp.{{i}}.{leaf}", "", why=_PROJECTION)
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ),
    *(Rule(f"head.last_layer.{leaf}", "", why=_PROJECTION) for leaf in ("weight", "weight_g", "weight_v")),
)

# Names as transformers writes them to disk ("encoder.layer.0....") and, since version 5, holds them in memory ("layers.0....").
_HF_EMBEDDINGS = (
    Rule("embeddings.cls_token", "cls", "squeeze"),
    Rule("embeddings.position_embeddings", "positions", "squeeze"),
    Rule("embeddings.patch_embeddings.projection.weight", "patch/kernel", "patch"),
    Rule("embeddings.patch_embeddings.projection.bias", "patch/bias"),
    *_norm("layernorm", "norm"),
    Rule("pooler.dense.weight", "", why="the pooler: DINO's feature is the [CLS] token itself"),
    Rule("pooler.dense.bias", "", why="the pooler: DINO's feature is the [CLS] token itself"),
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


def vit_rules(names: Iterable[str]) -> tuple[Rule, ...]:
    """The table that goes with a state dict's names: official DINO, or one of Hugging Face's two."""
    names = list(names)
    if any(name.startswith("encoder.layer.") for name in names):
        return HF_VIT
    if any(name.startswith("layers.") for name in names):
        return HF_VIT_5
    return DINO_VIT


def bare_vit_names(state: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A ViT's state dict without what wrappers put before its names.

    "module." is DistributedDataParallel's, "backbone." DINO's in training (beside "head.", whose names stay), "vit." a Hugging
    Face classifier's.

    Raises:
      ValueError: as `without_prefix`.
    """
    state = without_prefix(state, "module.", origin)
    state = without_prefix(state, "backbone.", origin, apart="head.")
    return without_prefix(state, "vit.", origin)


def without_prefix(state: Mapping[str, Any], prefix: str, origin: str, apart: str | None = None) -> dict[str, Any]:
    """The state dict with `prefix` taken off its names, if they have it.

    Args:
      state: name -> anything.
      prefix: with its dot.
      origin: what the state dict is, for messages.
      apart: names that start like this are left as they are, whatever the others do.

    Raises:
      ValueError: some names have the prefix and others do not; or two names would become one.
    """
    apart_names = {name for name in state if apart is not None and name.startswith(apart)}
    have = [name for name in state if name.startswith(prefix)]
    lack = [name for name in state if not name.startswith(prefix) and name not in apart_names]
    if have and lack:
        raise ValueError(
            f"{origin} mixes names with and without {prefix!r}: {', '.join(have[:3])} ... but {', '.join(lack[:3])} ...; keep "
            "those of one network"
        )
    bare = {name.removeprefix(prefix): value for name, value in state.items()}
    if len(bare) < len(state):
        twice = sorted(apart_names & {name.removeprefix(prefix) for name in have})
        raise ValueError(f"{origin} has {', '.join(twice[:3])} twice, with and without {prefix!r}")
    return bare


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
