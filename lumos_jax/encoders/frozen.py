"""Loads a frozen network: released files under anyone's names, the directory that `convert import` made, or random weights.

    image-encoder  DINO, DINOv2, MoCo-v3, CLIP's image tower         autoencoder  Stable Diffusion's
    t5             T5 v1.1 and Flan-T5                               clip-text    CLIP's text tower

Our own form is a directory of one safetensors file by parameter path and network.json, which says the network's shape.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lumos_jax import config
from lumos_jax.encoders import architectures
from lumos_jax.encoders.clip_text import ClipText
from lumos_jax.encoders.kl import KLAutoencoder
from lumos_jax.encoders.placement import Placement, Placer, same_content
from lumos_jax.encoders.t5 import T5Encoder
from lumos_jax.encoders.vit import Vit
from lumos_jax.weights import files, rules

DESCRIPTION, WEIGHTS = "network.json", "weights.safetensors"
# The small ViT that comes with us, trained by configs/dino.py:desk on the embedded scenes.
SHIPPED = pathlib.Path(__file__).parent.parent / "scenes" / "vit"


KINDS: Mapping[str, tuple[type, Callable]] = {  # network, and how its weights are recognized
    "image-encoder": (Vit, architectures.recognize_vit),
    "autoencoder": (KLAutoencoder, architectures.recognize_kl),
    "t5": (T5Encoder, architectures.recognize_t5),
    "clip-text": (ClipText, architectures.recognize_clip_text),
}
KIND_OF = {"vit": "image-encoder", "kl": "autoencoder", "t5": "t5", "clip_text": "clip-text"}  # config's kind -> ours


class Loaded(NamedTuple):
    """A network's shape (a frozen dataclass), its parameters as a tree, and "name@hash" of them."""

    network: Any
    params: Any
    identity: str


class Imported(NamedTuple):
    """A network's kind and shape, its parameters by path, and what became of every name on disk (None: in our own form)."""

    kind: str
    network: Any
    params: Mapping[str, Any]
    report: rules.ImportReport | None


def load(
    kind: str,
    weights: str,
    *,
    random: Callable[[], Any] | None = None,
    heads: int = 0,
    dtype: str = "",
    place: Placement | None = None,
) -> Loaded:
    """Loads a frozen network, in the compute dtype.

    Args:
      kind: a key of KINDS.
      weights: directory, file or hub id; "scenes", the small ViT that comes with us; or random:<seed>.
      random: the network that random weights are for.
      heads: for files that do not say; 0 takes the usual number.
      dtype: the compute dtype; empty leaves parameters as they are.
      place: puts each array on devices as it is read; the host then never holds more than this one array of the network
        (T5-XXL has 4.8 billion parameters). None keeps them on the host.

    Raises:
      ValueError: weights that cannot be found, read or fitted.
    """
    placer, shapes_only = Placer(dtype, place), place is not None and place.shapes_only
    if weights.startswith("random:"):
        network, seed = random(), int(weights.removeprefix("random:"))
    else:
        network, seed = architectures.KNOWN.get(weights), 0
        if not shapes_only or pathlib.Path(weights).expanduser().exists() or not isinstance(network, KINDS[kind][0]):
            network, flat = read(kind, weights, heads=heads, placer=placer)[1:3]
            return Loaded(network, rules.unflatten(flat), placer.identity(weights))
    init = functools.partial(jax.eval_shape, network.init) if shapes_only else jax.jit(network.init)
    flat = {path: placer(path, leaf) for path, leaf in rules.flatten(init(jax.random.key(seed))).items()}
    return Loaded(network, rules.unflatten(flat), placer.identity(weights))


def with_moved_weights(
    settings: config.Settings, fingerprints: Mapping[str, str], **moved: str | None
) -> config.Settings:
    """A run's settings with weights of frozen networks where they are now, if their files have moved.

    Args:
      settings: of the run.
      fingerprints: of the run's checkpoint.
      **moved: `encoder`, `autoencoder` -> directory, file or hub id, which is read for its hash. None leaves the setting.

    Raises:
      ValueError: it cannot be read, or it is another network than the run was trained with.
    """
    for group, weights in moved.items():
        if weights is None:
            continue
        fields, flag = getattr(settings, group), f"--{group}-weights={weights}"
        if fields.kind not in KIND_OF or weights.startswith("random:"):
            raise ValueError(f"{flag}: config.{group}.kind={fields.kind} has no weights, or this names no file")
        placer = Placer(place=lambda path, array: None)  # keeps nothing
        read(KIND_OF[fields.kind], weights, heads=getattr(fields, "heads", 0), placer=placer)
        now = placer.identity(weights)
        then = fingerprints.get(group, now)  # imported weights do not say
        if not same_content(now, then):
            raise ValueError(f"{flag} is not the network that this run was trained with: {then} then, {now} now")
        settings = dataclasses.replace(settings, **{group: dataclasses.replace(fields, weights=weights)})
    return settings


def read(
    kind: str, source: str, *, field: str = "", heads: int = 0, placer: Placer | None = None, shapes_only: bool = False
) -> Imported:
    """Reads weights under anyone's names, or in our own form.

    Args:
      kind: a key of KINDS.
      source: directory, file or hub id, or "scenes"; with `shapes_only` a .json file of name -> shape will do.
      field: the setting that `source` is from, for messages; empty takes the kind's.
      heads: as for `load`.
      placer: (path, array) -> what is kept of it, called as each array is read; None keeps the arrays.
      shapes_only: nothing large is read; the parameters are shapes.

    Raises:
      ValueError: as `files.locate`, `files.read`, `rules.convert`; or another architecture.
    """
    recognize, group = KINDS[kind][1], "autoencoder" if kind == "autoencoder" else "encoder"
    path = SHIPPED if source == "scenes" else files.locate(source, field or f"config.{group}.weights")
    if (path / DESCRIPTION).exists():
        return _read_own(path, kind, placer or Placer())
    state, described = files.read(path, "model" if group == "encoder" else "diffusion_pytorch_model", shapes_only)
    network, state, table = recognize(rules.strip_wrappers(state, source), described, heads, source)
    params, report = rules.convert(state, table, rules.parameter_shapes(network), origin=source, place=placer)
    logging.getLogger(__name__).info("%s\n%s", path, report.table())
    return Imported(kind, network, params, report)


def _read_own(path: pathlib.Path, kind: str, placer: Placer) -> Imported:
    described = files.read_json(path / DESCRIPTION)
    if described.get("kind", kind) != kind:
        raise ValueError(f"{path} holds a {described['kind']}; this field needs a {kind}")
    try:
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in described["network"].items()}
        network = KINDS[kind][0](**fields)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / DESCRIPTION} is not what `convert import` writes: {error!r}") from error
    state, _ = files.read(path / WEIGHTS, "")
    return Imported(kind, network, {name: placer(name, value) for name, value in state.items()}, None)


def save(folder: pathlib.Path, imported: Imported, origin: str) -> None:
    """Writes a network in our own form into an existing folder; `origin` says where the weights are from."""
    files.save_safetensors(imported.params, folder / WEIGHTS, {"format": "np"})
    described = {"kind": imported.kind, "network": dataclasses.asdict(imported.network), "origin": origin}
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
