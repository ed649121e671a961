"""Rendered objects in the layout of the Objaverse renders of Zero-1-to-3: <object>/000.png, 000.npy, 001.png, 001.npy ...

Any number of views; images RGBA (laid on white by their alpha) or RGB, matrices 3x4 world-to-camera in NumPy's format.
"""

from __future__ import annotations

import os
import pathlib
import re

import numpy as np

from lumos_jax.data.base import CorruptRecord, Data, HasViews, Source, digest, printable, register
from lumos_jax.data.cameras import check_matrix
from lumos_jax.data.files import Names, read_file, read_npy

LAYOUT = "<object>/000.png + 000.npy, 001.png + 001.npy ..., one folder an object"
_VIEW = re.compile(r"([0-9]+)\.(png|npy)")
_MAX_MATRIX_BYTES = 4096


@register("objaverse")
class ObjaverseSource(Source, HasViews):
    """Every folder in a directory that holds numbered views is a record, by sorted name; links are followed.

    All folders are listed when the source is opened, nothing in them is read. An object with too few views, or with an image
    without its matrix or the other way round, is a corrupt record. Other files, and folders without views, are left out.

    Raises:
      ValueError: no such directory, not readable, or another layout.
    """

    needs = "path"

    def __init__(self, path: str):
        self.root = pathlib.Path(path).expanduser().absolute()
        if not self.root.is_dir():
            raise ValueError(f"config.data.path={path!r} is not a directory")
        try:
            with os.scandir(self.root) as entries:
                folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
            listed = [(name, _views_in(self.root / name)) for name in folders]
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be listed: {error.strerror}") from error
        listed = [(name, views) for name, views in listed if views[0] or views[1]]
        if not any(images & matrices for _, (images, matrices) in listed):
            raise ValueError(
                f"config.data.path={path!r} has another layout than {LAYOUT}: {_what_is_there(self.root, folders, listed)}"
            )
        self.names = Names(name for name, _ in listed)
        # Most objects have the same views: each set of them is kept once.
        kinds: dict[tuple[frozenset[str], frozenset[str]], int] = {}
        self._kind = np.array([kinds.setdefault(views, len(kinds)) for _, views in listed], np.int32)
        self._kinds = list(kinds)

    @classmethod
    def open(cls, data: Data) -> ObjaverseSource:
        return cls(data.path)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The object's first view."""
        return read_file(self._path(index, f"{self._complete(index)[0]}.png"))

    def posed_views(self, index: int, rng: np.random.Generator, count: int) -> list[tuple[bytes, np.ndarray]]:
        views = self._complete(index)
        if len(views) < count:
            raise CorruptRecord(f"{len(views)} view(s), and {count} are needed")
        # By sorting random numbers, whose bits are the same in every version of NumPy.
        chosen = [views[i] for i in np.argsort(rng.random(len(views)), kind="stable")[:count]]
        return [(read_file(self._path(index, f"{view}.png")), self._matrix(index, f"{view}.npy")) for view in chosen]

    def describe(self, index: int) -> str:
        return printable(os.path.join(self.root, self.names[index]))

    def fingerprint(self) -> str:
        """Of the names of objects and views."""
        return digest(
            f"{name} {[sorted(part) for part in self._kinds[kind]]}"
            for name, kind in zip(self.names, self._kind, strict=True)
        )

    def _complete(self, index: int) -> list[str]:
        images, matrices = self._kinds[self._kind[index]]
        alone = sorted([f"{v}.png has no {v}.npy" for v in images - matrices]
                       + [f"{v}.npy has no {v}.png" for v in matrices - images])  # fmt: skip
        if alone:
            raise CorruptRecord("; ".join(alone[:3]))
        return sorted(images)

    def _path(self, index: int, name: str) -> str:
        return os.path.join(self.root, self.names[index], name)

    def _matrix(self, index: int, name: str) -> np.ndarray:
        path = self._path(index, name)
        if os.path.getsize(path) > _MAX_MATRIX_BYTES:
            raise CorruptRecord(f"{name} is too large for a 3x4 matrix")
        try:
            return check_matrix(read_npy(read_file(path)))
        except ValueError as error:
            raise CorruptRecord(f"{name}: {error}") from error


def _views_in(folder: pathlib.Path) -> tuple[frozenset[str], frozenset[str]]:
    """The numbers, as they are written, of which there are images, and of which there are matrices."""
    with os.scandir(folder) as entries:
        found = [match.groups() for entry in entries if (match := _VIEW.fullmatch(entry.name))]
    return tuple(frozenset(number for number, ending in found if ending == kind) for kind in ("png", "npy"))


def _what_is_there(root: pathlib.Path, folders: list[str], listed: list) -> str:
    if not folders:
        return f"there are no folders in {root}"
    if not listed:
        example = min((name.name for name in (root / folders[0]).iterdir()), default="nothing")
        return (
            f"folder {printable(folders[0])} holds {printable(example)}, and none of {len(folders)} has numbered views"
        )
    name, (images, matrices) = listed[0]
    return f"folder {printable(name)} has {len(images)} numbered images, {len(matrices)} matrices, and no pair"
