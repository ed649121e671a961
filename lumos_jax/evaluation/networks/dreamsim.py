"""DreamSim (Fu et al. 2023), the perceptual distance of PIC: 1 - cosine of embeddings.

    dino_vitb16  [CLS] of DINO ViT-B/16 after its last block, before the last norm
    ensemble     that, and the projected features of CLIP and OpenCLIP ViT-B/16, concatenated

The mean over features is subtracted from an embedding, which then gets unit length. Images are squashed to 224 by Pillow's
bicubic. LoRA adapters on the attention's qkv kernels are merged into the weights as these are loaded. CLIP's towers come under
DINO's names: `pos_drop` is the norm before the blocks, `proj` the projection, and a bias of the patches is added to positions.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.encoders import architectures
from lumos_jax.encoders.image_encoder import CLIP_STATISTICS, IMAGENET_STATISTICS, NORMALIZE, normalize
from lumos_jax.encoders.vit import Vit
from lumos_jax.evaluation.networks import weights as weights_of
from lumos_jax.evaluation.networks.resize import resize
from lumos_jax.weights import files
from lumos_jax.weights.encoder_names import VIT
from lumos_jax.weights.rules import Rule, convert, parameter_shapes, strip_wrappers, unflatten

SIDE = 224


class Branch(NamedTuple):
    """One of the networks whose features are concatenated."""

    files: tuple[str, ...]  # the first that exists
    activation: str
    statistics: Any


# DreamSim's code takes DINO's backbone from the torch hub's cache, and only the head from the other file.
_DINO_FILES = ("checkpoints/dino_vitbase16_pretrain.pth", "dino_vitb16_pretrain.pth")
_DINO = Branch(_DINO_FILES, "gelu", IMAGENET_STATISTICS)
_CLIP = Branch(("clip_vitb16_pretrain.pth.tar",), "quick_gelu", CLIP_STATISTICS)
_OPEN_CLIP = Branch(("open_clip_vitb16_pretrain.pth.tar",), "gelu", CLIP_STATISTICS)
# Protocol -> directory of the adapters, branches in the adapters' order.
PROTOCOLS = {
    "ensemble": ("ensemble_lora", (_DINO, _CLIP, _OPEN_CLIP)),
    "dino_vitb16": ("dino_vitb16_single_lora", (_DINO,)),
}
_ADAPTER = re.compile(r"(?:.*extractor_list\.(\d+))?.*\bblocks\.(\d+)\.attn\.qkv\.lora_([AB])\b.*")
_CLIP_RULES = (
    Rule("pos_drop.weight", "input_norm/scale"),
    Rule("pos_drop.bias", "input_norm/bias"),
    Rule("proj", "head/layer0/kernel"),
    *VIT,
)


def load(weights: str, protocol: str) -> weights_of.Loaded:
    """The network of a directory of DreamSim's release; protocol: a key of PROTOCOLS.

    Raises:
      ValueError: files that are missing or of another network, or adapters that do not fit them.
    """
    folder = files.locate(weights_of.given("dreamsim", weights), f"{weights_of.FLAG}=dreamsim")
    adapters, branches = PROTOCOLS[protocol]
    with weights_of.naming("dreamsim"):
        changes = _adapters(folder / adapters)
        loaded = [branch_of(*_read(folder, branch), branch, changes.get(i, {})) for i, branch in enumerate(branches)]
        if stray := sorted(set(changes) - set(range(len(branches)))):
            raise ValueError(f"{folder / adapters} has adapters of backbones {stray}, which {protocol} has not")
    networks = [vit for vit, _ in loaded]

    def apply(params, pixels):
        x = resize(pixels.astype(jnp.float32), SIDE, SIDE, "bicubic", round_uint8=True)
        parts = [
            embed(vit, params[str(i)], normalize(x, branch.statistics))
            for i, (vit, branch) in enumerate(zip(networks, branches, strict=True))
        ]
        x = jnp.concatenate(parts, -1)
        return NORMALIZE["unit"](x - x.mean(-1, keepdims=True))

    params = {str(i): tree for i, (_, tree) in enumerate(loaded)}
    dim = sum(vit.head_dims[-1] if vit.head else vit.width for vit in networks)
    described = {
        "resize": f"squash {SIDE} bicubic antialiased uint8",
        "scale": "of each backbone",
        "layer": "embedding",
    }
    return weights_of.Loaded(apply, params, dim, described)


def embed(vit: Vit, params: Any, x: jax.Array) -> jax.Array:
    """Normalized images (B, 224, 224, 3) -> what DreamSim takes of a branch, (B, D)."""
    tokens = vit.apply(params, x, last_norm=False)
    return vit.project(params, tokens) if vit.head else tokens[:, 0]


def _read(folder: pathlib.Path, branch: Branch) -> tuple[dict[str, np.ndarray], str]:
    """The state dict of a branch, and the file that it is from."""
    path = next((folder / name for name in branch.files if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"{folder} lacks {branch.files[-1]}")
    state, _ = files.read(path, "")
    return {name: np.asarray(value) for name, value in strip_wrappers(state, str(path)).items()}, str(path)


def branch_of(
    state: Mapping[str, np.ndarray], origin: str, branch: Branch, changes: Mapping[int, np.ndarray]
) -> tuple[Vit, Any]:
    """The network and the parameters of a branch.

    Args:
      state: its state dict, from the file `origin`.
      branch: of PROTOCOLS.
      changes: layer -> what is added to its qkv weight (3 D, D).

    Raises:
      ValueError: the state dict of another network, or changes that do not fit it.
    """
    state = dict(state)
    vit, table = architectures.recognize_vit(state, None, origin)[0], VIT
    vit = dataclasses.replace(vit, activation=branch.activation)
    if "pos_drop.weight" in state:
        positions, bias = state["pos_embed"].copy(), state.pop("patch_embed.proj.bias", 0)
        positions[:, 1:] += bias
        state["pos_embed"] = positions
        vit = dataclasses.replace(vit, eps=1e-5, input_norm=True, head="linear", head_dims=state["proj"].shape[1:])
        table = _CLIP_RULES
    for layer, change in changes.items():
        name = f"blocks.{layer}.attn.qkv.weight"
        if name not in state or state[name].shape != change.shape:
            raise ValueError(f"an adapter {change.shape} does not fit {name} of {origin}")
        state[name] = state[name] + change
    params, _ = convert(state, table, parameter_shapes(vit), origin=origin)
    return vit, unflatten(params)


def _adapters(folder: pathlib.Path) -> dict[int, dict[int, np.ndarray]]:
    """Backbone -> layer -> what its qkv weight (3 D, D) gains: alpha / rank times B A."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing")
    settings = files.read_json(folder / "adapter_config.json")
    if missing := {"r", "lora_alpha"} - settings.keys():
        raise ValueError(f"{folder / 'adapter_config.json'} does not say {' and '.join(sorted(missing))}")
    scale = settings["lora_alpha"] / settings["r"]
    names = ("adapter_model.safetensors", "adapter_model.bin")
    path = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
    state, _ = files.read(path, "")
    pairs: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for name, value in state.items():
        found = _ADAPTER.fullmatch(name)
        if not found:
            raise ValueError(f"{path} has {name}, which is no adapter of a qkv kernel")
        pairs.setdefault((int(found[1] or 0), int(found[2])), {})[found[3]] = np.asarray(value)
    changes: dict[int, dict[int, np.ndarray]] = {}
    for (backbone, layer), pair in pairs.items():
        if len(pair) < 2:
            raise ValueError(f"{path} has only one of lora_A and lora_B of backbone {backbone}, block {layer}")
        changes.setdefault(backbone, {})[layer] = (scale * pair["B"] @ pair["A"]).astype(np.float32)
    return changes
