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
from lumos_jax.weights import diffusers_names, files, official, rules

SETTINGS_KEY = "lumos_jax"  # of a safetensors file's metadata: the settings of the run that wrote it

# The text encoder of the released text-to-image priors, T5 v1.1 XXL; the encoder of RCG, MoCo-v3's ViT-B.
_T5 = config.Encoder(kind="t5", weights="google/t5-v1_1-xxl", output="all", normalize="none", max_tokens=120)
_MOCO = config.Encoder(weights="moco_v3_vit_b.pth.tar", output="pooled", normalize="standard", interpolation="bicubic")


@dataclasses.dataclass(frozen=True)
class Release:
    """What a kind of released file stands for.

    Attributes:
      task: as config.task.name.
      encoder: the encoder that gives its condition.
      mark: a name that only files of this kind have; empty where others have the same.
      convert: (state dict, path -> shape of the network's parameters) -> parameters, report.
      model: fields of config.model that are not the defaults.
      condition: what it is conditioned on: tokens | sized (tokens, and the image's size and ratio) | class | feature.
      unhosted: whether its encoder's weights are on no hub, so that `encoder` names a file that one has to have.
    """

    task: str
    encoder: config.Encoder
    mark: str = ""
    convert: Callable = official.from_official
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    condition: str = "tokens"
    unhosted: bool = False


_CLASSES = "y_embedder.embedding_table.weight"
_DIT = functools.partial(official.from_official, rules=official.DIT_RULES)
_RCG = functools.partial(official.from_official, rules=official.RCG_RULES)
RELEASES: Mapping[str, Release] = {
    "lumos-i2i": Release("i2i", config.Encoder()),
    "lumos-t2i": Release("t2i", _T5),
    "lumos-t2i-ms": Release("t2i", _T5, "csize_embedder.mlp.0.weight", condition="sized"),
    "pixart": Release("t2i", _T5, "t_block.1.weight", official.from_pixart),
    "rcg": Release("rcg", _MOCO, "rep_embedder.weight", _RCG, {"activation": "gelu"}, "feature", unhosted=True),
    "dit": Release("class_conditional", config.Encoder(), _CLASSES, _DIT, condition="class"),
}


@dataclasses.dataclass(frozen=True)
class Prior:
    """An imported prior: settings to sample or train with, the network, its parameters (or shapes) and what became of every
    name on disk."""

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
    """A released prior from a file, a directory or a hub id.

    Args:
      source: as `weights.files.read_release` takes it; names may be official, or diffusers'.
      field: the setting it is from, for messages.
      kind, heads: as for `read`.
      shapes_only: read no arrays, for the report alone.

    Raises:
      ValueError: as `weights.files.read_release` and `read`.
    """
    state, metadata, described = files.read_release(source, field, shapes_only)
    described, side = described or {}, 0
    state = rules.strip_wrappers(state, source)
    if diffusers_names.is_diffusers(state):
        state, side = diffusers_names.from_diffusers(state), described.get("sample_size", 0)
    if SETTINGS_KEY in metadata:
        settings = config_io.from_saved(json.loads(metadata[SETTINGS_KEY]))
    else:  # a run's config.json beside a .pth
        settings = config_io.from_saved(described) if "autoencoder" in described else None
    return read(kind, state, origin=source, heads=heads, settings=settings, side=side)


def read(
    kind: str,
    state: Mapping[str, Any],
    *,
    origin: str,
    heads: int = 0,
    settings: config.Settings | None = None,
    side: int = 0,
) -> Prior:
    """A state dict of a release as a prior.

    Args:
      kind: a key of RELEASES; empty: by the names.
      state: name -> array, or name -> shape to see the report without data.
      origin: what the state dict is, for messages.
      heads: attention heads; 0: as in the DiT paper's table.
      settings: those of the run that wrote it, if it says; else they are found from the shapes.
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
        network = _network(release.condition, shapes)
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
    latent_shape = (side, side, channels)
    scale = models.position_scale(settings.data.image_size)
    dit = models.make_dit(
        settings.model, latent_shape=latent_shape, out_channels=out_channels, position_scale=scale, **network
    )
    return Prior(settings, dit, *release.convert(state, rules.parameter_shapes(dit), origin=origin))


def write(settings: config.Settings, params: Mapping[str, Any]) -> dict[str, Any]:
    """A run's parameters under the official names.

    Raises:
      ValueError: the network has parts that the official release has not.
    """
    if "cross" not in params["blocks"] or "modulation" in params["final"]:
        raise ValueError(
            "this network cannot be exported: the official Lumos release has no names for one without cross-attention, or "
            "with a final layer as DiT's"
        )
    model, autoencoder = settings.model, settings.autoencoder
    factor = 1 if autoencoder.kind == "identity" else 2 ** (len(autoencoder.channels) - 1)
    grid = (settings.data.image_size // factor // model.patch_size,) * 2
    base = (model.position_base,) * 2 if model.position_base else grid
    scale = models.position_scale(settings.data.image_size)
    positions = layers.positions(grid, base, scale, params["patch"]["bias"].shape[0])
    return official.to_official(params, positions, model.patch_size)


def _network(condition: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of `models.make_dit` about the condition. Raises KeyError for an array that is not there."""
    if condition == "class":
        classes = shapes[_CLASSES][0] - 1
        return {"token_shape": None, "vector_dim": classes, "vector_kind": "class", "final": "adaln"}
    if condition == "feature":
        return {"token_shape": None, "vector_dim": shapes["rep_embedder.weight"][1], "final": "adaln"}
    vector_kind = "size" if condition == "sized" else "linear"
    return {"token_shape": shapes["y_embedder.y_embedding"], "vector_kind": vector_kind}


def _settings(
    release: Release, state, network, width: int, patch: int, side: int, heads: int, origin: str
) -> config.Settings:
    depth = 1 + max((int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    named = [name for name, size in SIZES.items() if (size.width, size.depth) == (width, depth)]
    if named and heads in (0, SIZES[named[0]].heads):
        model = config.Model(size=named[0])
    elif heads:
        model = config.Model(size=f"{width}x{depth}x{heads}")
    else:
        raise ValueError(
            f"{origin}: width {width} and depth {depth} are in no table that tells the heads; give --heads"
        )
    autoencoder = config.Autoencoder()
    labels = {"sample_type": "labeled", "num_classes": network["vector_dim"]} if release.condition == "class" else {}
    settings = config.Settings(
        data=config.Data(image_size=side * 2 ** (len(autoencoder.channels) - 1), **labels),
        encoder=release.encoder,
        autoencoder=autoencoder,
        model=dataclasses.replace(model, patch_size=patch, **release.model),
        task=config.Task(name=release.task),
    )
    config.validate(settings)
    return settings
