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

# Names in config.json of our networks' first fields, in their order.
_T5_FIELDS = ("d_model", "num_layers", "num_heads", "d_kv", "d_ff", "vocab_size", "relative_attention_num_buckets")
_CLIP_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
                "max_position_embeddings")  # fmt: skip

State = Mapping[str, Any]
Described = Mapping[str, Any] | None
Shapes = Mapping[str, Sequence[int]]
Recognized = tuple[Any, State, Sequence[Rule]]


class _Config(dict):
    """A config.json; reading a key that it lacks raises ValueError."""

    def __init__(self, values: Mapping[str, Any], origin: str):
        super().__init__(values)
        self.origin = origin

    def __missing__(self, key: str):
        raise ValueError(f"{self.origin}: config.json does not say {key}")


def _config(described: Described, origin: str, types: Sequence[str], wanted: str, nested: str) -> _Config:
    """The config of a network of one of the `types`; in that of a larger one it is under the key `nested`."""
    if described is None:
        raise ValueError(f"{origin}: the shape of {wanted} is in config.json; give the directory that holds both")
    kind = described.get("model_type")
    if kind not in types:
        raise ValueError(f"{origin}: config.json says model_type={kind!r}; {wanted} has {' or '.join(types)}")
    return _Config(described.get(nested, described), origin)


def _activation(name: str, origin: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"{origin}: config.json says hidden_act={name!r}; supported are {', '.join(ACTIVATIONS)}")
    return name


def _depth(state: State) -> int:
    """One more than the highest layer."""
    layers = (re.search(r"\b(?:blocks?|layers?)\.(\d+)\.", name) for name in state)
    return 1 + max((int(found[1]) for found in layers if found), default=-1)


def recognize_vit(state: State, described: Described, origin: str, heads: int = 0) -> Recognized:
    """The ViT that weights are for, by their config.json (`described`) or, without one, by names, shapes and `heads`.

    Raises:
      ValueError: another architecture, or one that names and shapes do not tell; names `origin`.
    """
    shapes = shapes_of(state)
    if described is None and any(name.startswith(("vision_model.", "encoder.layer.", "layers.")) for name in shapes):
        described = _vit_config(shapes, heads)
    if described is None:
        return _vit_of_official_names(shapes, heads, origin), state, names.VIT
    return _vit_of_config(described, shapes, origin), state, names.VIT


def _vit_of_config(described: Mapping[str, Any], shapes: Shapes, origin: str) -> Vit:
    types, kind = ("vit", "dinov2", "clip", "clip_vision_model"), described.get("model_type")
    found = _config(described, origin, types, "an image encoder", "vision_config")
    if described.get("use_swiglu_ffn"):
        raise ValueError(f"{origin}: DINOv2 giant's gated MLP is not supported; DINOv2 small, base and large are")
    clip, dinov2 = kind.startswith("clip"), kind == "dinov2"
    projection = shapes.get("visual_projection.weight")
    # CLIP's and DINOv2's nested configs leave out what equals the class's own default.
    width = found["hidden_size"] if dinov2 else found.get("hidden_size", 768)
    return Vit(
        width,
        found.get("num_hidden_layers", 12),
        found.get("num_attention_heads", 12),
        found.get("patch_size", 32 if clip else 16),
        found.get("image_size", 224),
        found.get("layer_norm_eps", 1e-5 if clip else 1e-6 if dinov2 else 1e-12),
        position_offset=0.0,
        activation=_activation(found.get("hidden_act", "quick_gelu" if clip else "gelu"), origin),
        layer_scale=dinov2,
        input_norm=clip,
        hidden=int(found.get("mlp_ratio", 4) * width) if dinov2 else found.get("intermediate_size", 0),
        head="linear" if projection else "",
        head_dims=(projection[0],) if projection else (),
    )


def _vit_config(shapes: Shapes, heads: int) -> dict[str, Any]:
    """What config.json would say, for arrays under Hugging Face's names without one."""
    clip = any(name.startswith("vision_model.") for name in shapes)
    dinov2 = any(name.startswith(("encoder.layer.0.layer_scale1", "embeddings.mask_token")) for name in shapes)
    patch, positions = (
        ("vision_model.embeddings.patch_embedding", "vision_model.embeddings.position_embedding.weight")
        if clip
        else ("embeddings.patch_embeddings.projection", "embeddings.position_embeddings")
    )
    width, _, side, _ = shapes[f"{patch}.weight"]
    mlps = ("mlp.fc1.weight", "intermediate.dense.weight")
    hidden = next(shape[0] for name, shape in shapes.items() if name.endswith(mlps))
    image = {name: shape for name, shape in shapes.items() if not name.startswith("text_model.")}
    return {
        "model_type": "clip_vision_model" if clip else "dinov2" if dinov2 else "vit",
        "hidden_size": width, "num_hidden_layers": _depth(image), "num_attention_heads": heads or max(width // HEAD_DIM, 1),
        "patch_size": side, "image_size": math.isqrt(shapes[positions][-2] - 1) * side, "intermediate_size": hidden,
        "mlp_ratio": hidden / width,
    }  # fmt: skip


def _vit_of_official_names(shapes: Shapes, heads: int, origin: str) -> Vit:
    try:
        width, _, patch, _ = shapes["patch_embed.proj.weight"]
        side = math.isqrt(shapes["pos_embed"][1] - 1) * patch
    except (KeyError, ValueError, IndexError):
        raise ValueError(
            f"{origin} has neither a config.json nor the original names of a ViT (patch_embed.proj.weight, pos_embed); it "
            f"holds {', '.join(list(shapes)[:5])} ..."
        ) from None
    moco = "head.1.running_mean" in shapes
    usual = MOCO_SMALL_HEADS if moco and width == 384 else max(width // HEAD_DIM, 1)
    return Vit(
        width,
        _depth([name for name in shapes if name.startswith("blocks.")]),
        heads or usual,
        patch,
        side,
        position_offset=0.0 if moco else 0.1,
        layer_scale="blocks.0.ls1.gamma" in shapes,
        hidden=shapes.get("blocks.0.mlp.fc1.weight", (0,))[0],
        head="mlp" if moco else "",
        head_dims=tuple(shapes[f"head.{place}.weight"][0] for place in (0, 3, 6)) if moco else (),
    )


def recognize_kl(state: State, described: Described, origin: str) -> Recognized:
    """The KL-autoencoder that weights are for; without a config.json, Stable Diffusion's."""
    network = KLAutoencoder()
    if described is not None:
        found = described.get("_class_name")
        if found != "AutoencoderKL" or set(described.get("down_block_types", ())) != {"DownEncoderBlock2D"}:
            raise ValueError(f"{origin}: config.json describes a {found}, not Stable Diffusion's AutoencoderKL")
        described = _Config(described, origin)
        fields = ("layers_per_block", "norm_num_groups", "latent_channels")
        network = KLAutoencoder(tuple(described["block_out_channels"]), *(described[field] for field in fields))
    return network, names.modern_kl_names(state), names.kl_rules(parameter_shapes(network))


def recognize_t5(state: State, described: Described, origin: str) -> Recognized:
    """The T5 encoder that weights are for; shapes alone tell it too."""
    described = described or _t5_config(shapes_of(state))
    described = _config(described, origin, ("t5", "mt5"), "an encoder of T5 v1.1 or Flan-T5", "")
    activation = described.get("feed_forward_proj", "relu")
    if activation != "gated-gelu":
        raise ValueError(
            f"{origin}: config.json says feed_forward_proj={activation!r}, as T5 v1.0 has it; only gated-gelu (T5 v1.1, "
            "Flan-T5) is supported"
        )
    distance = described.get("relative_attention_max_distance", T5_MAX_DISTANCE)
    network = T5Encoder(*[described[name] for name in _T5_FIELDS], distance, described["layer_norm_epsilon"])
    both = [state[name] for name in (names.SHARED, names.COPY) if name in state]
    if len(both) == 2 and not np.array_equal(*both):
        raise ValueError(f"{origin}: {names.SHARED} and {names.COPY} differ; in T5 they are one array")
    return network, state, names.t5_rules(state)


def _t5_config(shapes: Shapes) -> Described:
    """T5's config.json from the shapes of its arrays, which tell all of it; None if these are no T5's arrays."""
    first = "encoder.block.0.layer"
    bias = shapes.get(f"{first}.0.SelfAttention.relative_attention_bias.weight")
    gate = shapes.get(f"{first}.1.DenseReluDense.wi_0.weight")
    if bias is None or gate is None:
        return None
    embedding = shapes.get(names.SHARED) or shapes[names.COPY]
    inner = shapes[f"{first}.0.SelfAttention.q.weight"][0]
    return {
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "d_model": embedding[1], "vocab_size": embedding[0],
        "num_layers": _depth([name for name in shapes if name.startswith("encoder.")]), "num_heads": bias[1],
        "d_kv": inner // bias[1], "d_ff": gate[0], "relative_attention_num_buckets": bias[0], "layer_norm_epsilon": 1e-6,
    }  # fmt: skip


def recognize_clip_text(state: State, described: Described, origin: str) -> Recognized:
    """The CLIP text encoder that weights are for. Without a config.json, shapes alone give a report of its names."""
    state = names.with_text_prefix(state)
    shapes = shapes_of(state)
    if described is None and not has_data(state):
        described = _clip_text_config(shapes)
    described = _config(described, origin, ("clip_text_model", "clip"), "a CLIP text encoder", "text_config")
    network = ClipText(
        *[described[name] for name in _CLIP_FIELDS],
        projection=shapes.get("text_projection.weight", (0,))[0],
        eos=described["eos_token_id"],
        activation=_activation(described["hidden_act"], origin),
        eps=described["layer_norm_eps"],
    )
    return network, state, names.CLIP_TEXT


def _clip_text_config(shapes: Shapes) -> Described:
    """Enough of CLIP's config.json to see the report of its names; the number of heads and the end-of-text id are guesses.
    None if these are no CLIP text tower's arrays."""
    tables = [f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position")]
    mlp = "text_model.encoder.layers.0.mlp.fc1.weight"
    if not {*tables, mlp} <= shapes.keys():
        return None
    (vocabulary, width), (positions, _) = (shapes[name] for name in tables)
    return {
        "model_type": "clip_text_model", "hidden_size": width, "num_attention_heads": max(width // HEAD_DIM, 1),
        "num_hidden_layers": _depth([name for name in shapes if name.startswith("text_model.")]), "vocab_size": vocabulary,
        "hidden_act": "quick_gelu", "eos_token_id": 2, "intermediate_size": shapes[mlp][0], "layer_norm_eps": 1e-5,
        "max_position_embeddings": positions,
    }  # fmt: skip
