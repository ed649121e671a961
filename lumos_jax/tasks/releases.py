"""Released priors, read and written: which settings a state dict of the official release, or of another prior, stands for.

    lumos-i2i      Lumos-I2I: DINO ViT-B/16 [CLS], one token of 768 features
    lumos-t2i      Lumos-T2I at 256 px: T5-XXL, 120 tokens of 4096 features
    lumos-t2i-ms   the multi-scale Lumos-T2I at 1024 px: the same, and embedders of the image's size and ratio
    pixart         PixArt-alpha at 256 px, whose shared modulation becomes one a block, without loss
    dit            DiT, class-conditional, at 256 or 512 px; the last row of its table of classes stands for none
    rcg            RCG's DiT, conditioned on a feature of MoCo-v3's projector; its MLPs have the exact GELU

A file that `lumos_jax.convert export` wrote carries its run's settings; of others the shapes of the arrays tell all but the
number of heads, which the DiT paper's table gives.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lumos_jax import config, models
from lumos_jax.config import io as config_io
from lumos_jax.models import Network, layers
from lumos_jax.models.network import SIZES
from lumos_jax.weights import files, official, rules

VAE_FACTOR = 8  # pixels a latent pixel, of Stable Diffusion's autoencoder
SETTINGS_KEY = "lumos_jax"  # of a safetensors file's metadata: the settings of the run that wrote it

Shapes = Mapping[str, tuple[int, ...]]


def _tokens(shapes: Shapes, vector_kind: str = "linear") -> dict[str, Any]:
    return {"token_shape": shapes["y_embedder.y_embedding"], "vector_kind": vector_kind}


def _vector(dim: int, kind: str) -> dict[str, Any]:
    return {"token_shape": None, "vector_dim": dim, "vector_kind": kind, "final": "adaln"}


@dataclasses.dataclass(frozen=True)
class Release:
    """What a kind of released file stands for.

    Attributes:
      task: as config.task.name.
      encoder: the encoder that gives its condition.
      mark: a name that only files of this kind have; empty where others have the same.
      convert: (state dict, path -> shape of the network's parameters) -> parameters, report.
      condition: shapes of the file's arrays -> what `models.make_dit` takes about the condition.
      model: fields of config.model that are not the defaults.
      unhosted: whether its encoder's weights are on no hub, so that `encoder` names a file that one has to have.
    """

    task: str
    encoder: config.Encoder
    mark: str = ""
    convert: Callable = official.from_official
    condition: Callable[[Shapes], dict[str, Any]] = _tokens
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unhosted: bool = False


# The text encoder of the released text-to-image priors, T5 v1.1 XXL; the encoder of RCG, MoCo-v3's ViT-B.
_T5 = config.Encoder(kind="t5", weights="google/t5-v1_1-xxl", output="all", normalize="none", max_tokens=120)
_MOCO = config.Encoder(weights="moco_v3_vit_b.pth.tar", output="pooled", normalize="standard", interpolation="bicubic")
_CLASSES, _FEATURE, _SIZES = "y_embedder.embedding_table.weight", "rep_embedder.weight", "csize_embedder.mlp.0.weight"
RELEASES: Mapping[str, Release] = {
    "lumos-i2i": Release("i2i", config.Encoder()),
    "lumos-t2i": Release("t2i", _T5),
    "lumos-t2i-ms": Release("t2i", _T5, _SIZES, condition=functools.partial(_tokens, vector_kind="size")),
    "pixart": Release("t2i", _T5, "t_block.1.weight", official.from_pixart),
    "rcg": Release(
        "rcg", _MOCO, _FEATURE, functools.partial(official.from_official, rules=official.RCG_RULES),
        lambda shapes: _vector(shapes[_FEATURE][1], "linear"), {"activation": "gelu"}, unhosted=True,
    ),
    "dit": Release(
        "class_conditional", config.Encoder(), _CLASSES, functools.partial(official.from_official, rules=official.DIT_RULES),
        lambda shapes: _vector(shapes[_CLASSES][0] - 1, "class"),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Prior:
    """Settings to sample or train with, the network, its parameters (or shapes), and what became of every name on disk."""

    settings: config.Settings
    network: Network
    params: Any
    report: rules.ImportReport


def kind_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The kind of release that a state dict is, by its names and by how many condition tokens it has."""
    if marked := [kind for kind, release in RELEASES.items() if release.mark in shapes]:
        return marked[0]
    return "lumos-i2i" if shapes.get("y_embedder.y_embedding", (1,))[0] == 1 else "lumos-t2i"


def load(source: str, field: str, *, kind: str = "", heads: int = 0, shapes_only: bool = False) -> Prior:
    """A released prior under official or diffusers' names: `source`, `field` as of `weights.files.read_release`, the rest as of
    `read`. `shapes_only`: reads no arrays, for the report alone."""
    state, metadata, described = files.read_release(source, field, shapes_only)
    state = official.from_diffusers(rules.strip_wrappers(state, source))
    settings = None
    if SETTINGS_KEY in metadata:
        settings = config_io.from_saved(json.loads(metadata[SETTINGS_KEY]))
    elif "autoencoder" in described:  # a run's config.json beside a .pth
        settings = config_io.from_saved(described)
    return read(kind, state, origin=source, heads=heads, settings=settings, side=described.get("sample_size", 0))


def read(
    kind: str, state: Mapping[str, Any], *, origin: str, heads: int = 0, settings: config.Settings | None = None, side: int = 0
) -> Prior:  # fmt: skip
    """A state dict of a release as a prior.

    Args:
      kind: a key of RELEASES; empty: by the names.
      state: name -> array, or name -> shape to see the report without data.
      origin: what the state dict is, for messages.
      heads: attention heads; 0: as in the DiT paper's table.
      settings: of the run that wrote it; None finds them from the shapes.
      side: of the latents it was trained on; 0 where its table of positions tells.

    Raises:
      ValueError: another kind of file, a network that the shapes do not settle, or names that no rule accounts for.
    """
    shapes = rules.shapes_of(state)
    kind = kind or kind_of(shapes)
    release = RELEASES[kind]
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        out_channels = shapes["final_layer.linear.weight"][0] // patch**2
        found = kind_of(shapes)
        if (RELEASES[found].mark or release.mark) and found != kind:
            raise ValueError(f"{origin} holds a {found}, not a {kind}: give --kind={found}")
        network = release.condition(shapes)
    except KeyError as error:
        raise ValueError(
            f"{origin} has no {error.args[0]}, so it is none of {', '.join(RELEASES)}; it holds "
            f"{', '.join(list(state)[:5])} ..."
        ) from None
    if "pos_embed" in state:
        side = math.isqrt(shapes["pos_embed"][1]) * patch
    elif not side:
        raise ValueError(f"{origin} tells no image size: it has no pos_embed, nor a config.json with sample_size")
    if settings is None:
        settings = _settings(release, state, network, width, patch, side, heads, origin)
    network |= {"latent_shape": (side, side, channels), "out_channels": out_channels}
    dit = models.make_dit(settings.model, position_scale=models.position_scale(settings.data.image_size), **network)
    return Prior(settings, dit, *release.convert(state, rules.parameter_shapes(dit), origin=origin))


def write(settings: config.Settings, params: Mapping[str, Any]) -> dict[str, Any]:
    """A run's parameters under the official names. Raises ValueError for parts that the official release has not."""
    if "cross" not in params["blocks"] or "modulation" in params["final"]:
        raise ValueError(
            "this network cannot be exported: the official Lumos release has no names for one without cross-attention, or "
            "with a final layer as DiT's"
        )
    patch, side = settings.model.patch_size, settings.data.image_size
    factor = 1 if settings.autoencoder.kind == "identity" else VAE_FACTOR
    grid = (side // factor // patch,) * 2
    positions = layers.positions(grid, grid, models.position_scale(side), params["patch"]["bias"].shape[0])
    return official.to_official(params, positions, patch)


def _settings(release: Release, state, network, width: int, patch: int, side: int, heads: int, origin: str):
    """Settings of a run that trains such a prior, by its shapes."""
    depth = 1 + max((int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    size = next((n for n, s in SIZES.items() if s[:2] == (width, depth) and heads in (0, s.heads)), None)
    if size is None and not heads:
        raise ValueError(
            f"{origin}: width {width} and depth {depth} are in no table that tells the heads; give --heads"
        )
    autoencoder, classes = config.Autoencoder(), network.get("vector_kind") == "class"
    labels = {"sample_type": "labeled", "num_classes": network["vector_dim"]} if classes else {}
    settings = config.Settings(
        data=config.Data(image_size=side * VAE_FACTOR, **labels),
        encoder=release.encoder,
        autoencoder=autoencoder,
        model=config.Model(size=size or f"{width}x{depth}x{heads}", patch_size=patch, **release.model),
        task=config.Task(name=release.task),
    )
    config.validate(settings)
    return settings
