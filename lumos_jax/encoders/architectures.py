"""Which network weights are for: by hub id, by config.json, or by the names and shapes of the arrays.

Each `recognize_...` takes a state dict (arrays, or shapes alone), its config.json if there is one, and what the weights are,
for messages. It returns the network, the state dict under the names that the rules have, and the rules. All raise ValueError
for another architecture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lumos_jax.encoders.clip_text import LEGACY_EOS, ClipText
from lumos_jax.encoders.kl import KLAutoencoder
from lumos_jax.encoders.t5 import T5Encoder
from lumos_jax.encoders.vit import ACTIVATIONS, Vit
from lumos_jax.weights import encoder_names as names
from lumos_jax.weights.rules import Rule, has_data, parameter_shapes, shapes_of

HEAD_DIM = 64  # of every original release's ViT but one: their files do not say how many heads there are
MOCO_SMALL_HEADS = 12  # MoCo-v3's ViT-S has 12 heads of 32 (Chen et al. 2021)
T5_MAX_DISTANCE = 128  # configs written before transformers 4.15 do not say it; it never was anything else

# Networks of hub ids, for planning without their weights. Position offsets and the like, which cost nothing, are left at their
# defaults. The weights of any other id are read.
_T5_SIZES = {
    "small": (512, 8, 6, 64, 1024),
    "base": (768, 12, 12, 64, 2048),
    "large": (1024, 24, 16, 64, 2816),
    "xl": (2048, 24, 32, 64, 5120),
    "xxl": (4096, 24, 64, 64, 10240),
}
_T5_VOCABULARY = 32128
_DINO_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12)}
_DINOV2_SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
KNOWN: Mapping[str, Any] = {
    **{f"facebook/dino-vit{s}{p}": Vit(*sides, p, 224, eps=1e-12) for s, sides in _DINO_SIZES.items() for p in (16, 8)},
    **{f"facebook/dinov2-{size}": Vit(*sides, 14, 518, layer_scale=True) for size, sides in _DINOV2_SIZES.items()},
    **{f"stabilityai/sd-vae-ft-{kind}": KLAutoencoder() for kind in ("mse", "ema")},
    **{f"google/t5-v1_1-{size}": T5Encoder(*sides, _T5_VOCABULARY) for size, sides in _T5_SIZES.items()},
    **{f"google/flan-t5-{size}": T5Encoder(*sides, _T5_VOCABULARY) for size, sides in _T5_SIZES.items()},
    "openai/clip-vit-large-patch14": ClipText(768, 12, 12, 3072, 49408, 77, 768, LEGACY_EOS),
}

State = Mapping[str, Any]
Described = Mapping[str, Any] | None
Recognized = tuple[Any, State, Sequence[Rule]]


class _Named(dict):
    """A dict that raises ValueError where it lacks a name."""

    def __init__(self, values: Mapping[str, Any], message: str):
        super().__init__(values)
        self.message = message

    def __missing__(self, name: str):
        raise ValueError(f"{self.message} {name}")


class _Shapes(_Named):
    """Name -> shape of the arrays of a network."""

    def __init__(self, state: State, wanted: str, origin: str):
        super().__init__(shapes_of(state), f"{origin} holds {', '.join(list(state)[:5])} ..., not {wanted}: it has no")

    def some(self, *prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in self)

    def depth(self, prefix: str) -> int:
        """One more than the highest layer, whose number follows the prefix."""
        layers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in self)
        return 1 + max((int(found[1]) for found in layers if found), default=-1)


def _check(described: Mapping[str, Any], origin: str, types: Sequence[str], wanted: str) -> None:
    kind, activation = described.get("model_type"), described.get("hidden_act", "gelu")
    if kind not in types:
        raise ValueError(f"{origin}: config.json says model_type={kind!r}; {wanted} has {' or '.join(types)}")
    if activation not in ACTIVATIONS:
        supported = ", ".join(ACTIVATIONS)
        raise ValueError(f"{origin}: config.json says hidden_act={activation!r}; supported are {supported}")


def recognize_vit(state: State, described: Described, origin: str, heads: int = 0) -> Recognized:
    """The ViT that weights are for: names and shapes tell most, config.json (`described`) or `heads` the rest.
    Raises ValueError: another architecture, or one that names and shapes do not tell; names `origin`."""
    told: Mapping[str, Any] = {}
    if described is not None:
        told = {"model_type": described.get("model_type"), **described.get("vision_config", described)}
        _check(told, origin, ("vit", "dinov2", "clip", "clip_vision_model"), "an image encoder")
        if told.get("use_swiglu_ffn"):
            raise ValueError(f"{origin}: DINOv2 giant's gated MLP is not supported; DINOv2 small, base and large are")
    shapes = _Shapes(state, "the names of a ViT", origin)
    clip = shapes.some("vision_model.")
    dinov2 = shapes.some("encoder.layer.0.layer_scale1", "embeddings.mask_token", "blocks.0.ls1.gamma")
    official = not clip and not shapes.some("encoder.layer.", "layers.")
    moco, projection = "head.1.running_mean" in shapes, shapes.get("visual_projection.weight")
    if clip:
        patch, table, layers = "patch_embedding", "position_embedding.weight", "vision_model.encoder.layers"
        patch, table = (f"vision_model.embeddings.{name}" for name in (patch, table))
    elif official:
        patch, table, layers = "patch_embed.proj", "pos_embed", "blocks"
    else:
        patch, table = "embeddings.patch_embeddings.projection", "embeddings.position_embeddings"
        layers = "encoder.layer" if shapes.some("encoder.layer.") else "layers"
    width, _, side, _ = shapes[f"{patch}.weight"]
    if described is not None:
        heads = told.get("num_attention_heads", 12)  # nested configs leave out what is their class's default
    elif not heads:
        heads = MOCO_SMALL_HEADS if moco and width == 384 else max(width // HEAD_DIM, 1)
    mlps = tuple(f"{layers}.0.{name}.weight" for name in ("mlp.fc1", "intermediate.dense"))
    network = Vit(
        width,
        told.get("num_hidden_layers", shapes.depth(layers)),
        heads,
        side,
        math.isqrt(shapes[table][-2] - 1) * side,
        told.get("layer_norm_eps", 1e-5 if clip else 1e-6 if dinov2 or official else 1e-12),
        position_offset=0.1 if official and not moco else 0.0,
        activation=told.get("hidden_act", "quick_gelu" if clip else "gelu"),
        layer_scale=dinov2,
        input_norm=clip,
        hidden=next((shapes[name][0] for name in mlps if name in shapes), 0),
        head="mlp" if moco else "linear" if projection else "",
        head_dims=tuple(shapes[f"head.{i}.weight"][0] for i in (0, 3, 6)) if moco else projection[:1] if projection else (),
    )  # fmt: skip
    return network, state, names.VIT


def recognize_kl(state: State, described: Described, origin: str) -> Recognized:
    """The KL-autoencoder that weights are for; without a config.json, Stable Diffusion's."""
    network = KLAutoencoder()
    if described is not None:
        found = described.get("_class_name")
        if found != "AutoencoderKL" or set(described.get("down_block_types", ())) != {"DownEncoderBlock2D"}:
            raise ValueError(f"{origin}: config.json describes a {found}, not Stable Diffusion's AutoencoderKL")
        told = _Named(described, f"{origin}: config.json does not say")
        fields = ("layers_per_block", "norm_num_groups", "latent_channels")
        network = KLAutoencoder(tuple(told["block_out_channels"]), *(told[field] for field in fields))
    return network, names.modern_kl_names(state), names.kl_rules(parameter_shapes(network))


def recognize_t5(state: State, described: Described, origin: str) -> Recognized:
    """The T5 encoder that weights are for, by shapes, which tell all but what config.json may say otherwise."""
    wanted = "an encoder of T5 v1.1 or Flan-T5"
    if described is not None:
        _check(described, origin, ("t5", "mt5"), wanted)
        activation = described.get("feed_forward_proj", "relu")
        if activation != "gated-gelu":
            raise ValueError(
                f"{origin}: config.json says feed_forward_proj={activation!r}, as T5 v1.0 has it; only gated-gelu (T5 v1.1, "
                "Flan-T5) is supported"
            )
    told, shapes, first = described or {}, _Shapes(state, wanted, origin), "encoder.block.0.layer"
    vocabulary, width = shapes[names.SHARED if names.SHARED in shapes else names.COPY]
    buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    network = T5Encoder(
        width,
        told.get("num_layers", shapes.depth("encoder.block")),
        heads,
        shapes[f"{first}.0.SelfAttention.q.weight"][0] // heads,
        shapes[f"{first}.1.DenseReluDense.wi_0.weight"][0],
        vocabulary,
        buckets,
        told.get("relative_attention_max_distance", T5_MAX_DISTANCE),
        told.get("layer_norm_epsilon", 1e-6),
    )
    both = [state[name] for name in (names.SHARED, names.COPY) if name in state]
    if len(both) == 2 and not np.array_equal(*both):
        raise ValueError(f"{origin}: {names.SHARED} and {names.COPY} differ; in T5 they are one array")
    return network, state, names.t5_rules(state)


def recognize_clip_text(state: State, described: Described, origin: str) -> Recognized:
    """The CLIP text encoder that weights are for, by shapes and config.json; for a report of names, by shapes alone."""
    wanted, state, layers = "a CLIP text encoder", names.with_text_prefix(state), "text_model.encoder.layers"
    shapes = _Shapes(state, wanted, origin)
    if described is not None:
        told = {"model_type": described.get("model_type"), **described.get("text_config", described)}
        _check(told, origin, ("clip_text_model", "clip"), wanted)
    elif has_data(state):
        raise ValueError(f"{origin}: the shape of {wanted} is in config.json; give the directory that holds both")
    else:  # guesses
        heads = max(shapes["text_model.final_layer_norm.weight"][0] // HEAD_DIM, 1)
        told = {
            "num_attention_heads": heads,
            "eos_token_id": LEGACY_EOS,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }
    told = _Named(told, f"{origin}: config.json does not say")
    tables = (shapes[f"text_model.embeddings.{name}_embedding.weight"] for name in ("token", "position"))
    (vocabulary, width), (positions, _) = tables
    network = ClipText(
        width,
        told.get("num_hidden_layers", shapes.depth(layers)),
        told["num_attention_heads"],
        shapes[f"{layers}.0.mlp.fc1.weight"][0],
        vocabulary,
        positions,
        projection=shapes.get("text_projection.weight", (0,))[0],
        eos=told["eos_token_id"],
        activation=told["hidden_act"],
        eps=told["layer_norm_eps"],
    )
    return network, state, names.CLIP_TEXT
