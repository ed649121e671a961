"""Hashes, casts and places each parameter of a frozen network as it is read, so that the host never holds all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Placement(Protocol):
    """Puts parameters on devices one by one, and gathers them where they are used; hashable. See train.sharding.Frozen.

    Attributes:
      shapes_only: whether parameters are shapes, and weights are not read where their shapes are known.
    """

    shapes_only: bool

    def __call__(self, path: str, array: np.ndarray | jax.ShapeDtypeStruct) -> Any:
        """A parameter in the compute dtype, or its shape -> what is kept of it. Below `blocks/` the first dim counts layers."""

    def gather(self, tree: Any) -> Any:
        """Inside a compiled function: parameters, of one layer say -> the same, replicated on every device."""


def keep(tree: Any) -> Any:
    """The gather of parameters that no device has only a part of."""
    return tree


def gather_of(place: Placement | None) -> Callable[[Any], Any]:
    return keep if place is None else place.gather


class Placer:
    """(path, array) -> the parameter in the compute dtype where it is kept; its content goes into the network's hash first.

    Args:
      dtype: the compute dtype; empty leaves parameters as they are.
      place: puts them on devices; None leaves them on the host.
    """

    def __init__(self, dtype: str = "", place: Callable[[str, Any], Any] | None = None):
        self._dtype, self._place = jnp.dtype(dtype) if dtype else None, place
        self._hashes: dict[str, str] = {}

    def __call__(self, path: str, array: np.ndarray | jax.ShapeDtypeStruct) -> Any:
        if isinstance(array, jax.ShapeDtypeStruct):  # its identity is that of no weights
            array = jax.ShapeDtypeStruct(array.shape, self._dtype or array.dtype)
        else:
            array = np.asarray(array)
            self._hashes[path] = _hash(path, np.ascontiguousarray(array))
            array = array.astype(self._dtype or array.dtype, copy=False)
        return array if self._place is None else self._place(path, array)

    def identity(self, weights: str) -> str:
        """The last part of the name that the weights were given by, and a hash of the parameters: "name@hash".

        Checkpoints hold it, so the hash must never change. It does not depend on the order of the parameters.
        """
        both = hashlib.blake2b(json.dumps(self._hashes, sort_keys=True).encode(), digest_size=8).hexdigest()
        return f"{weights.rstrip('/').rsplit('/', 1)[-1]}@{both}"


def _hash(path: str, array: np.ndarray) -> str:
    made = hashlib.blake2b(f"{path}{array.shape}{array.dtype}".encode(), digest_size=8)
    made.update(array.view(np.uint8).reshape(-1) if array.size else b"")
    return made.hexdigest()


def same_content(identity: str, other: str) -> bool:
    """Whether two identities are of the same parameters, whatever the files are called."""
    return identity.rpartition("@")[2] == other.rpartition("@")[2]
