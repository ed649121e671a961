"""Frozen networks in the project's own form: one safetensors file of parameter paths, and network.json with the shape.

What `lumos_jax.convert import` writes. It loads like any other weights, without renaming anything.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lumos_jax.weights import files
from lumos_jax.weights import rules as name_rules

DESCRIPTION, WEIGHTS = "network.json", "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A network's shape (a frozen dataclass), its parameters by path, and their account, if they were imported."""

    kind: str
    network: Any
    params: Mapping[str, np.ndarray]
    account: name_rules.Account | None = None


def save(folder: pathlib.Path, frozen: Frozen, origin: str) -> None:
    """Writes into an existing folder; `origin` says where the weights are from."""
    files.save_safetensors(frozen.params, folder / WEIGHTS, {"format": "np"})
    describe(folder, frozen.kind, frozen.network, origin)


def describe(folder: pathlib.Path, kind: str, network: Any, origin: str, **more: str) -> None:
    """Writes what the weights are: the network's shape, where they are from, and `more`."""
    told = {"kind": kind, "network": dataclasses.asdict(network), "origin": origin, **more}
    (folder / DESCRIPTION).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def load(
    path: pathlib.Path, kind: str, network_class: Callable, take: Callable[[str, np.ndarray], Any] | None = None
) -> tuple[Any, dict[str, Any]] | None:
    """(network, {path: array}) from such a folder; None if this is no such folder. `take` is called as each array is read, and
    what it returns is kept.

    Raises:
      ValueError: it holds another kind of network, or a damaged file.
    """
    described = path / DESCRIPTION
    if not described.exists():
        return None
    try:
        told = json.loads(described.read_text(encoding="utf-8"))
        held, network = told["kind"], told["network"]
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in network.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{described} is damaged, or not what `convert import` writes: {error!r}") from error
    if held != kind:
        raise ValueError(f"{path} holds a {held}; this field needs a {kind}")
    state, _ = files.read(path / WEIGHTS, "")
    return network_class(**fields), {
        name: np.asarray(value) if take is None else take(name, np.asarray(value)) for name, value in state.items()
    }


def load_any(
    path: pathlib.Path, kind: str, network_class: Callable, convert: Callable, take: Callable | None
) -> tuple[Any, dict[str, Any]]:
    """(network, {path: array}) of such a folder, or else of what `convert` makes of weights under anyone's names."""
    own = load(path, kind, network_class, take)
    if own is not None:
        return own
    network, flat, account = convert()
    logging.getLogger(__name__).info("%s\n%s", path, account.table())
    return network, flat
