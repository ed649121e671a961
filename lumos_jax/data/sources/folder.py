"""A folder of image files, with captions beside them or in one file, and classes by sub-folder."""

from __future__ import annotations

import bisect
import functools
import os
from typing import BinaryIO

from absl import logging

from lumos_jax.data import files
from lumos_jax.data.base import Captions, CorruptRecord, Data, HasCaptions, HasLabels, digest, printable, register
from lumos_jax.data.captions import decode_text, read_jsonl

_CAPTIONS = "captions.jsonl"


@register("folder")
class FolderSource(files.FilesSource, HasCaptions, HasLabels):
    """Every image file below a directory, links followed, by sorted relative name.

    A file with an image's ending is a record, whatever it holds: should it not decode, it is a corrupt record. Of files with
    other endings or none, those are records that begin as an image does; the others (labels, captions) are left out, and
    one line in the log says how many. Names that begin with a dot are left out.

    Captions: `captions.jsonl` in the directory, a line {"file": ..., "caption": ..., "detailed": ...} an image ("detailed"
    may be absent); where there is none, a.txt and, if it is there, a.detailed.txt beside a.jpg. With `captioned` they are
    read too, and count as content.
    Raises ValueError: no such directory, not readable, or no images in it; captions.jsonl is damaged.
    """

    def __init__(self, path: str, captioned: bool = False):
        self.root, self._captioned, self._captions = files.directory(path), captioned, None
        found, others = [], []
        for name in files.files_below(self.root):
            (found if _looks_like_image(name) else others).append(os.path.relpath(name, self.root))
        if captioned:
            others = [name for name in others if os.path.splitext(name)[1] != ".txt" and name != _CAPTIONS]
        example = printable(min(others, default=""))
        if not found:
            kinds = f"its {len(others)} files are of other kinds, as {example}" if others else "it is empty"
            raise ValueError(
                f"config.data.path={path!r} holds no images: {kinds}. JPEG, PNG, WebP, GIF, BMP and TIFF files are read, "
                "from folders within it too"
            )
        if others:
            logging.warning("%s: %d files are no images and are left out, as %s", self.root, len(others), example)
        self.names = files.Names(sorted(found))
        if captioned and (self.root / _CAPTIONS).exists():
            self._captions = read_jsonl(self.root / _CAPTIONS)

    @classmethod
    def open(cls, data: Data) -> FolderSource:
        return cls(data.path, data.sample_type == "captioned")

    def captions(self, index: int) -> Captions:
        if self._captions is not None:
            if self.names[index] not in self._captions:
                raise CorruptRecord(f"{_CAPTIONS} has no line for it")
            return self._captions[self.names[index]]
        paths = self._caption_files(index)
        there = set(filter(os.path.exists, paths))
        if not there:
            name, root = os.path.basename(paths[0]), printable(self.root)
            raise CorruptRecord(f"there is no {name} beside it, and no {_CAPTIONS} in {root}")
        return tuple(decode_text(files.read_file(path)) if path in there else "" for path in paths)

    def _caption_files(self, index: int) -> tuple[str, str]:
        stem = os.path.splitext(self.path(index))[0]
        return f"{stem}.txt", f"{stem}.detailed.txt"

    def read(self, index: int) -> bytes:
        return files.read_file(self.path(index))

    def open_image(self, index: int) -> BinaryIO:
        return files.open_regular(self.path(index))

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The folders below the directory, sorted; an image deeper down belongs to the one that it is in or under."""
        return tuple(sorted({self._class_of(index) for index in range(len(self))}))

    def label(self, index: int) -> int:
        return bisect.bisect_left(self.classes, self._class_of(index))

    def _class_of(self, index: int) -> str:
        folder, slash, _ = self.names[index].partition(os.sep)
        if not slash:
            raise ValueError(f"{self.describe(index)} is in no folder of a class: labels are the names of folders")
        return folder

    def fingerprint(self) -> str:
        content: list = [(name, files.file_size(self.root / name)) for name in self.names]
        if self._captions is not None:
            content.append(sorted(self._captions.items()))
        elif self._captioned:
            content += [tuple(map(files.file_size, self._caption_files(index))) for index in range(len(self))]
        return digest(content)


def _looks_like_image(name: str) -> bool:
    if os.path.splitext(name)[1].lower() in files.IMAGE_ENDINGS:
        return True
    try:
        with files.open_regular(name) as file:
            return files.is_image(file.read(12))
    except OSError:
        return False
