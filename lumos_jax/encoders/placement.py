"""Hashes, casts and places each parameter of a frozen network as it is read, so that the host never holds all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.weights.files import ContentHash


class Placement(Protocol):
    """Puts parameters on devices one by one, and gathers them where they are used; frozen and hashable.

    Attributes:
      shapes_only: whether nothing is to be read where shapes are known without: parameters are then shapes.
    """

    shapes_only: bool

    def __call__(self, path: str, array: np.ndarray | jax.ShapeDtypeStruct) -> Any:
        """A parameter in the compute dtype, or its shape -> what is kept of it: whole on every device, or split over them.
        Below `blocks/` the first dim counts layers."""
        ...

    def gather(self, tree: Any) -> Any:
        """Inside a compiled function: parameters, of one layer say -> the same, whole on every device."""
        ...


def whole(tree: Any) -> Any:
    """The gather of parameters that are nowhere split."""
    return tree


def gather_of(place: Placement | None) -> Callable[[Any], Any]:
    return whole if place is None else place.gather


class Placer:
    """(path, array) -> the parameter in the compute dtype where it is kept; its content goes into the network's hash first.

    Args:
      dtype: the compute dtype; empty leaves parameters as they are.
      place: puts them on devices; None leaves them on the host.
    """

    def __init__(self, dtype: str = "", place: Placement | None = None):
        self._dtype, self._place = jnp.dtype(dtype) if dtype else None, place
        self._hash = ContentHash()

    @property
    def shapes_only(self) -> bool:
        """As of Placement."""
        return self._place is not None and self._place.shapes_only

    def __call__(self, path: str, array: np.ndarray | jax.ShapeDtypeStruct) -> Any:
        if isinstance(array, jax.ShapeDtypeStruct):  # its identity is that of no weights
            array = jax.ShapeDtypeStruct(array.shape, self._dtype or array.dtype)
        else:
            array = np.asarray(array)
            self._hash.add(path, array)
            array = array.astype(self._dtype or array.dtype, copy=False)
        return array if self._place is None else self._place(path, array)

    def identity(self, weights: str) -> str:
        """The last part of the name that the weights were given by, and a hash of the parameters: "name@hash"."""
        return f"{weights.rstrip('/').rsplit('/', 1)[-1]}@{self._hash.hexdigest()}"


def same_content(identity: str, other: str) -> bool:
    """Whether two identities are of the same parameters, whatever the files are called."""
    return identity.rpartition("@")[2] == other.rpartition("@")[2]
