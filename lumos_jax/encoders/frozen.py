"""Loads a frozen network: released files under anyone's names, the directory that `convert import` made, or random weights.

    image-encoder  DINO, DINOv2, MoCo-v3, CLIP's image tower         autoencoder  Stable Diffusion's
    t5             T5 v1.1 and Flan-T5                               clip-text    CLIP's text tower

Each parameter is hashed, cast and placed on devices as it is read, so that the host never holds all of them. Our own form is a
directory of one safetensors file by parameter path and network.json, which says the network's shape; or of such directories,
named by the kind, of networks that were trained together.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, progress
from lumos_jax.encoders import architectures
from lumos_jax.encoders.clip_text import ClipText
from lumos_jax.encoders.kl import KLAutoencoder
from lumos_jax.encoders.t5 import T5Encoder
from lumos_jax.encoders.vit import Vit
from lumos_jax.weights import files, rules

DESCRIPTION, WEIGHTS = "network.json", "weights.safetensors"
# Small encoders that come with us, trained on the embedded scenes by configs/dino.py, contrastive.py and moco.py (:desk).
_SCENES = pathlib.Path(__file__).parent.parent / "scenes"
SHIPPED = {"scenes": _SCENES / "vit", "scenes-clip": _SCENES / "clip", "scenes-moco": _SCENES / "vit_moco"}

KINDS: Mapping[str, tuple[type, Callable]] = {  # network, and how its weights are recognized
    "image-encoder": (Vit, architectures.recognize_vit),
    "autoencoder": (KLAutoencoder, architectures.recognize_kl),
    "t5": (T5Encoder, architectures.recognize_t5),
    "clip-text": (ClipText, architectures.recognize_clip_text),
}
KIND_OF = {"vit": "image-encoder", "kl": "autoencoder", "t5": "t5", "clip_text": "clip-text"}  # config's kind -> ours


class Placement(Protocol):
    """Puts parameters on devices one by one, and gathers them where they are used; hashable. See train.sharding.Frozen."""

    shapes_only: bool  # parameters are shapes, and weights are not read where their shapes are known

    def __call__(self, path: str, array: np.ndarray | jax.ShapeDtypeStruct) -> Any:
        """A parameter in the compute dtype, or its shape -> what is kept of it. Below `blocks/` the first dim counts layers."""

    def gather(self, tree: Any) -> Any:
        """Inside a compiled function: parameters, of one layer say -> the same, replicated on every device."""


@dataclasses.dataclass(frozen=True)
class OnHost:
    """The placement that leaves parameters on the host, whole."""

    shapes_only = False

    def __call__(self, path: str, array: Any) -> Any:
        return array

    def gather(self, tree: Any) -> Any:
        return tree


ON_HOST = OnHost()


class Placer:
    """(path, array) -> the parameter, hashed, in the compute dtype `dtype` (empty: as it is), and what `place` keeps of it."""

    def __init__(self, dtype: str, place: Callable[[str, Any], Any]):
        self._dtype, self._place, self._hashes = dtype, place, {}

    def __call__(self, path: str, array: np.ndarray | jax.ShapeDtypeStruct) -> Any:
        dtype = jnp.dtype(self._dtype or array.dtype)
        if isinstance(array, jax.ShapeDtypeStruct):  # its identity is that of no weights
            return self._place(path, jax.ShapeDtypeStruct(array.shape, dtype))
        flat = np.ascontiguousarray(array)
        made = hashlib.blake2b(f"{path}{flat.shape}{flat.dtype}".encode(), digest_size=8)
        made.update(flat.view(np.uint8).reshape(-1) if flat.size else b"")
        self._hashes[path] = made.hexdigest()
        return self._place(path, np.asarray(array).astype(dtype, copy=False))

    def identity(self, weights: str) -> str:
        """The last part of the name that the weights were given by, and a hash of the parameters: "name@hash".

        Checkpoints hold it, so the hash must never change. It does not depend on the order of the parameters.
        """
        both = hashlib.blake2b(json.dumps(self._hashes, sort_keys=True).encode(), digest_size=8).hexdigest()
        return f"{weights.rstrip('/').rsplit('/', 1)[-1]}@{both}"


def same_content(identity: str, other: str) -> bool:
    """Whether two identities are of the same parameters, whatever the files are called."""
    return identity.rpartition("@")[2] == other.rpartition("@")[2]


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
    field: str = "",
) -> Loaded:
    """Loads a frozen network, in the compute dtype.

    Args:
      kind: a key of KINDS.
      weights: directory, file or hub id; a name of SHIPPED; or random:<seed>.
      random: the network that random weights are for.
      heads: for image encoders' files that do not say; 0 takes the usual number.
      dtype: the compute dtype; empty leaves parameters as they are.
      place: puts each array on devices as it is read; None keeps them on the host.
      field: the setting that `weights` is from, as for `read`.

    Raises:
      ValueError: weights that cannot be found, read or fitted.
    """
    place = place or ON_HOST
    placer = Placer(dtype, place)
    if weights.startswith("random:"):
        network, seed = random(), int(weights.removeprefix("random:"))
    else:
        network, seed = architectures.KNOWN.get(weights), 0
        known = isinstance(network, KINDS[kind][0]) and not pathlib.Path(weights).expanduser().exists()
        if not (place.shapes_only and known):
            network, flat = read(kind, weights, field=field, heads=heads, place=placer)[1:3]
            return Loaded(network, rules.unflatten(flat), placer.identity(weights))
    init = functools.partial(jax.eval_shape, network.init) if place.shapes_only else jax.jit(network.init)
    flat = {path: placer(path, leaf) for path, leaf in rules.flatten(init(jax.random.key(seed))).items()}
    return Loaded(network, rules.unflatten(flat), placer.identity(weights))


def with_moved_weights(
    settings: config.Settings, fingerprints: Mapping[str, str], **moved: str | None
) -> config.Settings:
    """A run's settings with weights of frozen networks where they are now, if their files have moved.

    fingerprints: of the run's checkpoint. moved: `encoder`, `autoencoder` -> directory, file or hub id, which is read for its
    hash; None leaves the setting. Raises ValueError if it is another network than the run was trained with.
    """
    for group, weights in moved.items():
        if weights is None:
            continue
        fields, flag = getattr(settings, group), f"--{group}-weights={weights}"
        if fields.kind not in KIND_OF or weights.startswith("random:"):
            raise ValueError(f"{flag}: config.{group}.kind={fields.kind} has no weights, or this names no file")
        placer = Placer("", lambda path, array: None)  # keeps nothing
        read(KIND_OF[fields.kind], weights, place=placer)
        now = placer.identity(weights)
        then = fingerprints.get(group, now)  # imported weights do not say
        if not same_content(now, then):
            raise ValueError(f"{flag} is not the network that this run was trained with: {then} then, {now} now")
        settings = dataclasses.replace(settings, **{group: dataclasses.replace(fields, weights=weights)})
    return settings


def read(
    kind: str,
    source: str,
    *,
    field: str = "",
    heads: int = 0,
    place: Callable[[str, np.ndarray], Any] = rules.keep,
    shapes_only: bool = False,
) -> Imported:
    """Reads weights under anyone's names, or in our own form.

    Args:
      kind, heads: as for `load`.
      source: directory, file or hub id, or a name of SHIPPED; with `shapes_only` a .json file of name -> shape will do.
      field: the setting that `source` is from, for messages; empty takes the kind's.
      place: (path, array) -> what is kept of it, called as each array is read.
      shapes_only: nothing large is read; the parameters are shapes.

    Raises:
      ValueError: as `files.locate`, `files.read`, `rules.convert`; or another architecture.
    """
    group, stem = ("autoencoder", "diffusion_pytorch_model") if kind == "autoencoder" else ("encoder", "model")
    path = SHIPPED.get(source) or files.locate(source, field or f"config.{group}.weights")
    path = path / kind if (path / kind / DESCRIPTION).exists() else path
    if (path / DESCRIPTION).exists():
        return _read_own(path, kind, place)
    if heads and kind != "image-encoder":
        raise ValueError(f"heads={heads}: the weights of a {kind} say how many there are; leave it out")
    state, described = files.read(path, stem, shapes_only)
    more = {"heads": heads} if heads else {}
    network, state, table = KINDS[kind][1](rules.strip_wrappers(state, source), described, source, **more)
    params, report = rules.convert(state, table, rules.parameter_shapes(network), origin=source, place=place)
    logging.getLogger(__name__).info("%s\n%s", path, report.table())
    return Imported(kind, network, params, report)


def _read_own(path: pathlib.Path, kind: str, place: Callable[[str, np.ndarray], Any]) -> Imported:
    described = files.read_json(path / DESCRIPTION)
    if described.get("kind", kind) != kind:
        raise ValueError(f"{path} holds a {described['kind']}; this field needs a {kind}")
    try:
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in described["network"].items()}
        network = KINDS[kind][0](**fields)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / DESCRIPTION} is not what `convert import` writes: {error!r}") from error
    state = files.read_file(path / WEIGHTS)
    bar = progress.bar(state.items(), unit="parameter")
    return Imported(kind, network, {name: place(name, np.asarray(value)) for name, value in bar}, None)


def save(folder: pathlib.Path, imported: Imported, origin: str) -> None:
    """Writes a network in our own form into an existing folder; `origin` says where the weights are from."""
    files.save_safetensors(imported.params, folder / WEIGHTS, {"format": "np"})
    described = {"kind": imported.kind, "network": dataclasses.asdict(imported.network), "origin": origin}
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def save_together(folder: pathlib.Path, networks: Sequence[Imported], origin: str) -> None:
    """Writes networks that were trained together into an existing folder, from which each is read by its kind."""
    for imported in networks:
        inner = folder / imported.kind if len(networks) > 1 else folder
        inner.mkdir(exist_ok=True)
        save(inner, imported, origin)
