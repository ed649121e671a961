"""Rendered objects in the layout of the Objaverse renders of Zero-1-to-3: <object>/000.png, 000.npy, 001.png, 001.npy ...

Any number of views; pictures RGBA (laid on white by their alpha) or RGB, matrices 3x4 world-to-camera in NumPy's format.
"""

from __future__ import annotations

import io
import os
import pathlib
import re

import numpy as np

from lumos_jax.data.cameras import check_matrix
from lumos_jax.data.decode import UndecodableImage
from lumos_jax.data.sources import Names, digest, printable

LAYOUT = "<object>/000.png + 000.npy, 001.png + 001.npy ..., one folder an object"
_VIEW = re.compile(r"([0-9]+)\.(png|npy)")
_MAX_MATRIX_BYTES = 4096


class ObjaverseSource:
    """Every folder in a directory that holds numbered views is a record, by sorted name; links are followed.

    All folders are listed when the source is opened, nothing in them is read. An object with too few views, or with a picture
    without its matrix or the other way round, is a corrupt record. Other files, and folders without views, are left out.

    Raises:
      ValueError: no such directory, not readable, or another layout.
    """

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
        if not any(pictures & matrices for _, (pictures, matrices) in listed):
            raise ValueError(
                f"config.data.path={path!r} has another layout than {LAYOUT}: {_what_is_there(self.root, folders, listed)}"
            )
        self.names = Names(name for name, _ in listed)
        # Most objects have the same views: each set of them is kept once.
        kinds: dict[tuple[frozenset[str], frozenset[str]], int] = {}
        self._kind = np.array([kinds.setdefault(views, len(kinds)) for _, views in listed], np.int32)
        self._kinds = list(kinds)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The object's first view."""
        return self._bytes(index, f"{self._complete(index)[0]}.png")

    def posed_views(self, index: int, draw: np.random.Generator, count: int) -> list[tuple[bytes, np.ndarray]]:
        """`count` different views, drawn: (encoded picture, world-to-camera matrix (3, 4) float64).

        Raises:
          UndecodableImage or OSError: fewer views than that, a missing file, or one that holds no such matrix.
        """
        views = self._complete(index)
        if len(views) < count:
            raise UndecodableImage(f"{len(views)} view(s), and {count} are needed")
        # By sorting random numbers, whose bits are the same in every version of NumPy.
        chosen = [views[i] for i in np.argsort(draw.random(len(views)), kind="stable")[:count]]
        return [(self._bytes(index, f"{view}.png"), self._matrix(index, f"{view}.npy")) for view in chosen]

    def describe(self, index: int) -> str:
        return printable(os.path.join(self.root, self.names[index]))

    def fingerprint(self) -> str:
        """Of the names of objects and views."""
        return digest(
            f"{name} {[sorted(part) for part in self._kinds[kind]]}"
            for name, kind in zip(self.names, self._kind, strict=True)
        )

    def _complete(self, index: int) -> list[str]:
        pictures, matrices = self._kinds[self._kind[index]]
        alone = sorted([f"{v}.png has no {v}.npy" for v in pictures - matrices]
                       + [f"{v}.npy has no {v}.png" for v in matrices - pictures])  # fmt: skip
        if alone:
            raise UndecodableImage("; ".join(alone[:3]))
        return sorted(pictures)

    def _bytes(self, index: int, name: str) -> bytes:
        with open(os.path.join(self.root, self.names[index], name), "rb") as file:
            return file.read()

    def _matrix(self, index: int, name: str) -> np.ndarray:
        path = os.path.join(self.root, self.names[index], name)
        if os.path.getsize(path) > _MAX_MATRIX_BYTES:
            raise UndecodableImage(f"{name} is too large for a 3x4 matrix")
        try:
            matrix = np.lib.format.read_array(io.BytesIO(self._bytes(index, name)), allow_pickle=False)
        except (ValueError, EOFError, SyntaxError, TypeError) as error:
            raise UndecodableImage(f"{name} is no NumPy array: {error}") from error
        try:
            return check_matrix(matrix)
        except ValueError as error:
            raise UndecodableImage(f"{name}: {error}") from error


def _views_in(folder: pathlib.Path) -> tuple[frozenset[str], frozenset[str]]:
    """The numbers, as they are written, of which there are pictures, and of which there are matrices."""
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
    name, (pictures, matrices) = listed[0]
    return f"folder {printable(name)} has {len(pictures)} numbered pictures, {len(matrices)} matrices, and no pair"
