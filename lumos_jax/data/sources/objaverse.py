"""Rendered objects in the layout of the Objaverse renders of Zero-1-to-3: <object>/000.png, 000.npy, 001.png, 001.npy ...

Any number of views; images RGBA (laid on white by their alpha) or RGB, matrices 3x4 world-to-camera in NumPy's format.
"""

from __future__ import annotations

import os
import pathlib
import re

import numpy as np

from lumos_jax import fileio
from lumos_jax.data.base import CorruptRecord, HasViews, digest, printable, register
from lumos_jax.data.cameras import check_matrix
from lumos_jax.data.files import FilesSource, Names, directory, read_file, read_npy

LAYOUT = "<object>/000.png + 000.npy, 001.png + 001.npy ..., one folder an object"
_VIEW = re.compile(r"([0-9]+)\.(png|npy)")
_MAX_MATRIX_BYTES = 4096
_Views = tuple[frozenset[str], frozenset[str]]  # the numbers, as written, of which there are images, and matrices


@register("objaverse")
class ObjaverseSource(FilesSource, HasViews):
    """Every folder in a directory that holds numbered views is a record, by sorted name; links are followed.

    All folders are listed when the source is opened, nothing in them is read. An object with too few views, or with an image
    without its matrix or the other way round, is a corrupt record. Other files, and folders without views, are left out.
    Raises ValueError: no such directory, not readable, or another layout.
    """

    def __init__(self, path: str):
        self.root = directory(path)
        try:
            with os.scandir(self.root) as entries:
                folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
            listed = [(name, _views_in(self.root / name)) for name in folders]
        except OSError as error:
            raise fileio.failure(error, f"{error.filename} cannot be listed: {error.strerror}") from error
        listed = [(name, views) for name, views in listed if views[0] or views[1]]
        if not any(images & matrices for _, (images, matrices) in listed):
            there = _what_is_there(self.root, folders, listed)
            raise ValueError(f"config.data.path={path!r} has another layout than {LAYOUT}: {there}")
        self.names = Names(name for name, _ in listed)
        # Most objects have the same views: each set of them is kept once.
        kinds: dict[_Views, int] = {}
        self._kind = np.array([kinds.setdefault(views, len(kinds)) for _, views in listed], np.int32)
        self._kinds = list(kinds)

    def read(self, index: int) -> bytes:
        """The object's first view."""
        return read_file(self.path(index, f"{self._complete(index)[0]}.png"))

    def posed_views(self, index: int, rng: np.random.Generator, count: int) -> list[tuple[bytes, np.ndarray]]:
        views = self._complete(index)
        if len(views) < count:
            raise CorruptRecord(f"{len(views)} view(s), and {count} are needed")
        # By sorting random numbers, whose bits are the same in every version of NumPy.
        chosen = [views[i] for i in np.argsort(rng.random(len(views)), kind="stable")[:count]]
        return [(read_file(self.path(index, f"{view}.png")), self._matrix(index, f"{view}.npy")) for view in chosen]

    def fingerprint(self) -> str:
        """Of the names of objects and views."""
        kinds = [[sorted(part) for part in views] for views in self._kinds]
        return digest(f"{name} {kinds[kind]}" for name, kind in zip(self.names, self._kind, strict=True))

    def _complete(self, index: int) -> list[str]:
        """The views. Raises CorruptRecord if one lacks its image or its matrix."""
        images, matrices = self._kinds[self._kind[index]]
        alone = [f"{v}.png has no {v}.npy" for v in images - matrices]
        alone += [f"{v}.npy has no {v}.png" for v in matrices - images]
        if alone:
            raise CorruptRecord("; ".join(sorted(alone)[:3]))
        return sorted(images)

    def _matrix(self, index: int, name: str) -> np.ndarray:
        if os.path.getsize(self.path(index, name)) > _MAX_MATRIX_BYTES:
            raise CorruptRecord(f"{name} is too large for a 3x4 matrix")
        try:
            return check_matrix(read_npy(read_file(self.path(index, name))))
        except ValueError as error:
            raise CorruptRecord(f"{name}: {error}") from error


def _views_in(folder: pathlib.Path) -> _Views:
    with os.scandir(folder) as entries:
        found = [match.groups() for entry in entries if (match := _VIEW.fullmatch(entry.name))]
    return tuple(frozenset(number for number, ending in found if ending == kind) for kind in ("png", "npy"))


def _what_is_there(root: pathlib.Path, folders: list[str], listed: list[tuple[str, _Views]]) -> str:
    if not folders:
        return f"there are no folders in {root}"
    if not listed:
        example, folder = min(os.listdir(root / folders[0]), default="nothing"), printable(folders[0])
        return f"folder {folder} holds {printable(example)}, and none of {len(folders)} has numbered views"
    name, (images, matrices) = listed[0]
    return f"folder {printable(name)} has {len(images)} numbered images, {len(matrices)} matrices, and no pair"
