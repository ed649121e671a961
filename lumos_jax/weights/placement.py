"""Where the parameters of frozen networks go: the interface that the trainer's placement fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.weights import files


class Placement(Protocol):
    """Puts parameters on devices one by one as they are read, and gathers them where they are used; frozen and hashable.

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


class Take:
    """Takes parameters as they are read: into the hash of the network, then in the compute dtype to where they are kept.

    Without a dtype they stay as they are, without a place on the host.
    """

    def __init__(self, dtype: str = "", place: Placement | None = None):
        self._dtype, self._place = jnp.dtype(dtype) if dtype else None, place
        self.reset()

    @property
    def shapes_only(self) -> bool:
        """As of Placement."""
        return self._place is not None and self._place.shapes_only

    def reset(self) -> None:
        """Forgets what was taken."""
        self._digests = files.Digests()

    def __call__(self, path: str, array: np.ndarray | jax.ShapeDtypeStruct) -> Any:
        if isinstance(array, jax.ShapeDtypeStruct):  # its identity is that of no weights
            array = jax.ShapeDtypeStruct(array.shape, self._dtype or array.dtype)
        else:
            array = np.asarray(array)
            self._digests.add(path, array)
            array = array.astype(self._dtype or array.dtype, copy=False)
        return array if self._place is None else self._place(path, array)

    def total(self) -> str:
        """The hash of all that was taken."""
        return self._digests.total()

    def identity(self, weights: str) -> str:
        """Where the weights are from, shortly, and that hash."""
        return f"{weights.rstrip('/').rsplit('/', 1)[-1]}@{self.total()}"
