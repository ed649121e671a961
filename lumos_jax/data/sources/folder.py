"""A folder of image files, with captions beside them or in one file, and classes by sub-folder."""

from __future__ import annotations

import bisect
import copy
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from absl import logging

from lumos_jax import fileio
from lumos_jax.data import files, storage
from lumos_jax.data.base import (
    Captions,
    CorruptRecord,
    Data,
    Fetched,
    HasCaptions,
    HasLabels,
    digest,
    fetched,
    printable,
    register,
)
from lumos_jax.data.captions import decode_text, read_jsonl
from lumos_jax.data.listing import content_sample
from lumos_jax.data.storage import Entry

_CAPTIONS = "captions.jsonl"
_SAMPLED = 1024  # images of which the fingerprint covers some bytes


@register("folder")
class FolderSource(files.FilesSource, HasCaptions, HasLabels):
    """Every image file below a directory, links followed, or below a URL, by sorted relative name.

    A file with an image's ending is a record, whatever it holds: should it not decode, it is a corrupt record. Of files with
    other endings or none, those are records that begin as an image does (of a URL, none are looked into); the others (labels,
    captions) are left out, and one line in the log says how many. Names that begin with a dot are left out.

    Captions: `captions.jsonl` in the directory, a line {"file": ..., "caption": ..., "detailed": ...} an image ("detailed"
    may be absent); where there is none, a.txt and, if it is there, a.detailed.txt beside a.jpg. With `captioned` they are
    read too, and count as content.
    Raises ValueError: no such directory, not readable, or no images in it; captions.jsonl is damaged.
    """

    def __init__(self, path: str, captioned: bool = False):
        self._captioned, self._captions, self.remote = captioned, None, storage.is_remote(path)
        found, others, texts = _listed(path)
        self.root = path.rstrip("/") if self.remote else files.directory(path)
        has_jsonl = _CAPTIONS in others
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
        names = sorted(found)
        self.names = files.Names(names)
        self._sizes = np.array([found[name] for name in names], np.int64) if self.remote else None
        self._texts = [_text_sizes(name, texts) for name in names] if captioned and self.remote else []
        if captioned and has_jsonl:
            self._captions = read_jsonl(storage.join(os.fspath(self.root), _CAPTIONS))
        self._fetched: Mapping[str, bytes | OSError] = {}

    @classmethod
    def open(cls, data: Data) -> FolderSource:
        return cls(data.path, data.sample_type == "captioned")

    def captions(self, index: int) -> Captions:
        if self._captions is not None:
            if self.names[index] not in self._captions:
                raise CorruptRecord(f"{_CAPTIONS} has no line for it")
            return self._captions[self.names[index]]
        paths = self._caption_files(index)
        texts = [self._content(path, optional=True) for path in paths]
        if texts == [None, None]:
            name, root = os.path.basename(paths[0]), printable(self.root)
            raise CorruptRecord(f"there is no {name} beside it, and no {_CAPTIONS} in {root}")
        return tuple("" if text is None else decode_text(text) for text in texts)

    def _caption_files(self, index: int) -> tuple[str, str]:
        stem = os.path.splitext(self.path(index))[0]
        return f"{stem}.txt", f"{stem}.detailed.txt"

    def read(self, index: int) -> bytes:
        return self._content(self.path(index))

    def open_image(self, index: int) -> BinaryIO:
        return storage.open_read(self.path(index))

    def fetch(self, images: Sequence[int], captions: Sequence[int] = ()) -> Fetched:
        wanted = [self.path(index) for index in images]
        if self._captions is None:
            wanted += itertools.chain.from_iterable(map(self._caption_files, captions))
        found = copy.copy(self)
        found._fetched = dict(zip(wanted, storage.read_many([(path, 0, None) for path in wanted]), strict=True))
        return fetched(found, images, captions)

    def _content(self, path: str, optional: bool = False) -> bytes | None:
        """What the file holds. optional: None where there is no file."""
        try:
            data = self._fetched.get(path)
            if data is None:
                return storage.read(path) if self.remote else files.read_file(path)
            if isinstance(data, OSError):
                raise data
            return data
        except FileNotFoundError:
            if optional:
                return None
            raise

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
        content: list = [(name, self._size(index)) for index, name in enumerate(self.names)]
        if self._captions is not None:
            content.append(sorted(self._captions.items()))
        elif self._captioned and self.remote:
            content += self._texts
        elif self._captioned:
            content += [tuple(map(files.file_size, self._caption_files(index))) for index in range(len(self))]
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), _SAMPLED)).astype(int)).tolist()
        return f"{digest(content)}-{digest(storage.in_parallel(self._sample, chosen))}"

    def _size(self, index: int) -> int:
        return files.file_size(self.path(index)) if self._sizes is None else int(self._sizes[index])

    def _sample(self, index: int) -> int:
        try:
            return content_sample(Entry(self.path(index), self._size(index), ""))
        except OSError:
            return -1  # a link to nowhere


def _listed(path: str) -> tuple[dict[str, int], list[str], dict[str, int]]:
    """Of what is below a directory or URL: the names of images, with their sizes if it is a URL; the names of other files; and
    names and sizes of texts, if it is a URL."""
    if not storage.is_remote(path):
        root = files.directory(path)
        names = {name: _looks_like_image(name) for name in files.files_below(root)}
        images, others = (
            [os.path.relpath(name, root) for name in names if names[name] == kind] for kind in (True, False)
        )
        return dict.fromkeys(images, -1), others, {}
    try:
        entries = storage.list_files(path, "**/*")
    except OSError as error:
        raise fileio.failure(error, f"config.data.path={path!r} cannot be listed: {error.strerror}") from error
    sizes = {entry.path[len(path.rstrip("/")) + 1 :]: entry.size for entry in entries}
    images = {name: size for name, size in sizes.items() if files.has_image_ending(name)}
    texts = {name: size for name, size in sizes.items() if name.endswith(".txt")}
    return images, [name for name in sizes if name not in images], texts


def _text_sizes(name: str, texts: Mapping[str, int]) -> tuple[int, int]:
    """Of an image's two caption files: bytes, or -1."""
    stem = os.path.splitext(name)[0]
    return texts.get(f"{stem}.txt", -1), texts.get(f"{stem}.detailed.txt", -1)


def _looks_like_image(name: str) -> bool:
    if files.has_image_ending(name):
        return True
    try:
        with files.open_regular(name) as file:
            return files.is_image(file.read(12))
    except OSError:
        return False
