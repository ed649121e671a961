"""Pre-trained vision transformers from the files people have, whatever names these use."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lumos_jax.encoders.vit import Vit
from lumos_jax.weights import files, frozen_files, names
from lumos_jax.weights import rules as name_rules
from lumos_jax.weights.placement import Take

HEAD_DIM = 64  # of every original release's ViT but one: their files do not say how many heads there are
MOCO_SMALL_HEADS = 12  # MoCo-v3's ViT-S has 12 heads of 32 (Chen et al. 2021)
SHIPPED = (
    pathlib.Path(__file__).parent.parent / "scenes" / "vit"
)  # trained by configs/dino.py:desk on the embedded scenes
MODEL_TYPES = ("vit", "dinov2", "clip", "clip_vision_model")

Shapes = Mapping[str, Sequence[int]]


def load_vit(weights: str, heads: int = 0, take: Take | None = None) -> tuple[Vit, Any]:
    """A pre-trained ViT: DINO, DINOv2 or MoCo-v3 under their original names; ViT, DINOv2 or CLIP under Hugging Face's.

    Args:
      weights: directory, file or hub id; or "scenes", the small one that comes with us.
      heads: only for files without a config; 0 takes width / 64 (and 12 for MoCo-v3's ViT-S).
      take: (path, array) -> what is kept of it, called as each array is read; None keeps the arrays.

    Raises:
      ValueError: as `files.locate`, `files.read` and `name_rules.convert` do.
    """
    path = SHIPPED if weights == "scenes" else files.locate(weights, "config.encoder.weights")

    def convert():
        return convert_vit(*files.read(path, "model"), heads, weights, take)

    vit, params = frozen_files.load_any(path, "image-encoder", Vit, convert, take)
    return vit, name_rules.unflatten(params)


def convert_vit(
    state: Mapping[str, Any], told: dict[str, Any] | None, heads: int, origin: str, take: Callable | None = None
):
    """A state dict (arrays, or shapes alone) and its config.json, if any -> (Vit, {path: array}, name_rules.Account).

    Raises:
      ValueError: another architecture, or names and shapes that no rule accounts for.
    """
    state = names.bare_vit_names(state, origin)
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in state.items()}
    told = told or _config_of_names(shapes, heads)
    vit = _vit_of_config(told, shapes, origin) if told is not None else _vit_of_names(shapes, heads, origin)
    target = {
        path: leaf.shape for path, leaf in name_rules.flatten(jax.eval_shape(vit.init, jax.random.key(0))).items()
    }
    params, account = name_rules.convert(state, names.vit_rules(state), target, origin=origin, place=take)
    return vit, params, account


def _vit_of_config(told: dict[str, Any], shapes: Shapes, origin: str) -> Vit:
    kind = told.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"{origin}: config.json says model_type={kind!r}; this encoder is one of {', '.join(MODEL_TYPES)}"
        )
    if told.get("use_swiglu_ffn"):
        raise ValueError(f"{origin}: DINOv2 giant's gated MLP is not supported; DINOv2 small, base and large are")
    told = told.get("vision_config", told)
    clip = kind.startswith("clip")
    projection = shapes.get("visual_projection.weight")
    activation = told.get("hidden_act", "quick_gelu" if clip else "gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise ValueError(f"{origin}: config.json says hidden_act={activation!r}; gelu and quick_gelu are supported")
    # CLIP's and DINOv2's nested configs leave out what equals the class's own default.
    return Vit(
        told.get("hidden_size", 768),
        told.get("num_hidden_layers", 12),
        told.get("num_attention_heads", 12),
        told.get("patch_size", 32 if clip else 16),
        told.get("image_size", 224),
        told.get("layer_norm_eps", 1e-5 if clip else 1e-6 if kind == "dinov2" else 1e-12),
        position_offset=0.0,
        activation=activation,
        layer_scale=kind == "dinov2",
        input_norm=clip,
        hidden=told.get("intermediate_size", 0)
        if kind != "dinov2"
        else int(told.get("mlp_ratio", 4) * told["hidden_size"]),
        head="linear" if projection else "",
        head_dims=(projection[0],) if projection else (),
    )


def _config_of_names(shapes: Shapes, heads: int) -> dict[str, Any] | None:
    """What config.json would say, for arrays under Hugging Face's names without one; None for other names."""
    rules = names.vit_rules(shapes)
    clip = rules is names.HF_CLIP_VISION
    if rules is names.OFFICIAL_VIT or not shapes:
        return None
    patch, positions = (
        ("vision_model.embeddings.patch_embedding", "vision_model.embeddings.position_embedding.weight")
        if clip
        else ("embeddings.patch_embeddings.projection", "embeddings.position_embeddings")
    )
    width, _, side, _ = shapes[f"{patch}.weight"]
    grid = math.isqrt(shapes[positions][-2] - 1)
    layers = [int(found[1]) for name in shapes if (found := re.search(r"\blayers?\.(\d+)\.", name))]
    hidden = next(
        shape[0] for name, shape in shapes.items() if name.endswith(("mlp.fc1.weight", "intermediate.dense.weight"))
    )
    kind = "clip_vision_model" if clip else "dinov2" if rules is names.HF_DINOV2 else "vit"
    return {
        "model_type": kind, "hidden_size": width, "num_hidden_layers": 1 + max(layers), "patch_size": side,
        "num_attention_heads": heads or max(width // HEAD_DIM, 1), "image_size": grid * side, "intermediate_size": hidden,
        "mlp_ratio": hidden / width,
    }  # fmt: skip


def _vit_of_names(shapes: Shapes, heads: int, origin: str) -> Vit:
    """From the shapes of arrays under the original names."""
    try:
        width, _, patch, _ = shapes["patch_embed.proj.weight"]
        side = math.isqrt(shapes["pos_embed"][1] - 1) * patch
    except (KeyError, ValueError, IndexError):
        raise ValueError(
            f"{origin} has neither a config.json nor the original names of a ViT (patch_embed.proj.weight, pos_embed); it "
            f"holds {', '.join(list(shapes)[:5])} ..."
        ) from None
    depth = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")), default=-1)
    hidden = shapes.get("blocks.0.mlp.fc1.weight", (0,))[0]
    moco = "head.1.running_mean" in shapes
    usual = MOCO_SMALL_HEADS if moco and width == 384 else max(width // HEAD_DIM, 1)
    return Vit(
        width,
        depth,
        heads or usual,
        patch,
        side,
        position_offset=0.0 if moco else 0.1,
        layer_scale="blocks.0.ls1.gamma" in shapes,
        hidden=hidden,
        head="mlp" if moco else "",
        head_dims=tuple(shapes[f"head.{place}.weight"][0] for place in (0, 3, 6)) if moco else (),
    )
