"""A folder of image files, with captions beside them or in one file, and classes by sub-folder."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import BinaryIO

from absl import logging

from lumos_jax.data import captions as captions_
from lumos_jax.data.base import (
    Captions,
    CorruptRecord,
    Data,
    HasCaptions,
    HasLabels,
    Source,
    digest,
    printable,
    register,
)
from lumos_jax.data.files import IMAGE_ENDINGS, Names, file_size, files_below, is_image, open_regular, read_file

_CAPTIONS = "captions.jsonl"


@register("folder")
class FolderSource(Source, HasCaptions, HasLabels):
    """Every image file below a directory, links followed, by sorted relative name.

    A file with an image's ending is a record, whatever it holds: should it not decode, it is a corrupt record. Of files with
    other endings or none, those are records that begin as an image does; the others (labels, captions) are left out, and
    one line in the log says how many. Names that begin with a dot are left out.

    Captions: `captions.jsonl` in the directory, a line {"file": ..., "caption": ..., "detailed": ...} an image ("detailed" may
    be absent); where there is none, a.txt and, if it is there, a.detailed.txt beside a.jpg.

    Args:
      path: the directory.
      captioned: captions are read too, and count as content.

    Raises:
      ValueError: no such directory, not readable, or no images in it; captions.jsonl is damaged.
    """

    needs = "path"

    def __init__(self, path: str, captioned: bool = False):
        self.root = pathlib.Path(path).expanduser().absolute()
        if not self.root.is_dir():
            raise ValueError(f"config.data.path={path!r} is not a directory")
        found, others = [], []
        for name in files_below(self.root):
            relative = os.path.relpath(name, self.root)
            (found if _looks_like_image(name) else others).append(relative)
        self._captioned, self._captions = captioned, None
        if captioned:
            others = [name for name in others if os.path.splitext(name)[1] != ".txt" and name != _CAPTIONS]
        if not found:
            there = (
                f"its {len(others)} files are of other kinds, as {printable(min(others))}" if others else "it is empty"
            )
            raise ValueError(
                f"config.data.path={path!r} holds no images: {there}. JPEG, PNG, WebP, GIF, BMP and TIFF files are read, "
                "from folders within it too"
            )
        if others:
            example = printable(min(others))
            logging.warning("%s: %d files are no images and are left out, as %s", self.root, len(others), example)
        self.names = Names(sorted(found))
        if captioned and (self.root / _CAPTIONS).exists():
            self._captions = captions_.read_jsonl(self.root / _CAPTIONS)

    @classmethod
    def open(cls, data: Data) -> FolderSource:
        return cls(data.path, data.sample_type == "captioned")

    def __len__(self) -> int:
        return len(self.names)

    def captions(self, index: int) -> Captions:
        name = self.names[index]
        if self._captions is not None:
            if name not in self._captions:
                raise CorruptRecord(f"{_CAPTIONS} has no line for it")
            return self._captions[name]
        raw, detailed = self._caption_files(name)
        if not raw.exists() and not detailed.exists():
            raise CorruptRecord(f"there is no {raw.name} beside it, and no {_CAPTIONS} in {printable(self.root)}")
        return tuple(captions_.decode_text(read_file(path)) if path.exists() else "" for path in (raw, detailed))

    def _caption_files(self, name: str) -> tuple[pathlib.Path, pathlib.Path]:
        stem = self.root / os.path.splitext(name)[0]
        return stem.with_name(f"{stem.name}.txt"), stem.with_name(f"{stem.name}.detailed.txt")

    def read(self, index: int) -> bytes:
        return read_file(self._path(index))

    def open_image(self, index: int) -> BinaryIO:
        return open_regular(self._path(index))

    def _path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The folders below the directory, sorted; an image deeper down belongs to the one that it is in or under."""
        return tuple(sorted({self._class_of(index) for index in range(len(self))}))

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def label(self, index: int) -> int:
        return self._numbers[self._class_of(index)]

    def _class_of(self, index: int) -> str:
        folder, slash, _ = self.names[index].partition(os.sep)
        if not slash:
            raise ValueError(f"{self.describe(index)} is in no folder of a class: labels are the names of folders")
        return folder

    def describe(self, index: int) -> str:
        return printable(self._path(index))

    def fingerprint(self) -> str:
        images = ((name, file_size(self.root / name)) for name in self.names)
        if not self._captioned:
            return digest(images)
        if self._captions is not None:
            return digest([*images, sorted(self._captions.items())])
        return digest([*images, *(tuple(map(file_size, self._caption_files(name))) for name in self.names)])


def _looks_like_image(name: str) -> bool:
    if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS:
        return True
    try:
        with open_regular(name) as file:
            return is_image(file.read(12))
    except OSError:
        return False
