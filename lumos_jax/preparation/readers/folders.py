"""Readers of image files in folders, and of ImageNet in either form."""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator

from lumos_jax.data import storage
from lumos_jax.data.base import digest
from lumos_jax.data.captions import read_jsonl
from lumos_jax.data.files import has_image_ending
from lumos_jax.preparation.readers import base, tars
from lumos_jax.preparation.readers.base import Candidate, DamagedInput, Input
from lumos_jax.preparation.settings import Source

_CAPTIONS = "captions.jsonl"


@base.register("folder")
class FolderReader(base.Reader):
    """Files with an image's ending; an input is a slice of the sorted files of one directory. Captions as in
    data/sources/folder.py: captions.jsonl in the source's directory, or a.txt and a.detailed.txt beside a.jpg. Keys are
    directory/name."""

    patterns = ("**/*",)

    def list(self, source: Source, task_bytes: int) -> list[Input]:
        found = base.list_entries(source, self.patterns)
        captions = storage.join(source.path, _CAPTIONS)
        captions = captions if any(entry.path == os.path.abspath(captions) for entry in found) else None
        images = [entry for entry in found if has_image_ending(entry.path)]
        if not images:
            raise ValueError(f"source {source.label}: no images below {source.path!r}")
        inputs = []
        images.sort(key=lambda entry: os.path.split(entry.path))
        for directory, files in itertools.groupby(images, key=lambda entry: os.path.dirname(entry.path)):
            for part in _slices(files, task_bytes):
                names = os.path.basename(part[0].path), os.path.basename(part[-1].path)
                size = sum(entry.size for entry in part)
                number = len(inputs)
                inputs.append(
                    Input(number, source.label, source.kind, directory, size, _etag(part), captions, part=names)
                )
        return inputs

    def etag(self, given: Input) -> str:
        return _etag(_files(given)[0])

    def read(self, given: Input) -> Iterator[Candidate]:
        entries, there = _files(given)
        folder = os.path.basename(given.path)
        for row, entry in enumerate(entries):
            stem = os.path.splitext(os.path.basename(entry.path))[0]
            candidate = Candidate(row, f"{folder}/{stem}", storage.read(entry.path))
            if given.metadata:
                name = os.path.relpath(entry.path, os.path.dirname(given.metadata))
                candidate.caption, candidate.detailed = _captions(given.metadata).get(name, ("", ""))
            else:
                for field, ending in (("caption", ".txt"), ("detailed", ".detailed.txt")):
                    if f"{stem}{ending}" in there:
                        setattr(
                            candidate, field, base.text_of(storage.read(storage.join(given.path, f"{stem}{ending}")))
                        )
            yield candidate


@base.register("imagenet")
class ImageNetReader(base.Reader):
    """Class archives (n01440764.tar), the archive of those, or class folders; labels are in the keys, class/name."""

    patterns = ("**/*.tar",)

    def list(self, source: Source, task_bytes: int) -> list[Input]:
        try:
            return super().list(source, task_bytes)
        except ValueError:
            return FolderReader().list(source, task_bytes)

    def _reader(self, given: Input) -> base.Reader:
        return FolderReader() if given.part else tars.ClassTarReader()

    def etag(self, given: Input) -> str:
        return self._reader(given).etag(given)

    def read(self, given: Input) -> Iterator[Candidate]:
        return self._reader(given).read(given)

    def images(self, given, places):
        return self._reader(given).images(given, places)


def _slices(files: Iterable[storage.Entry], most: int) -> Iterator[list[storage.Entry]]:
    part, size = [], 0
    for entry in files:
        if part and size + entry.size > most:
            yield part
            part, size = [], 0
        part.append(entry)
        size += entry.size
    yield part


def _files(given: Input) -> tuple[list[storage.Entry], set[str]]:
    """The images of an input, and the names of all files beside them."""
    first, last = given.part
    entries = storage.list_files(given.path, "*")
    names = [os.path.basename(entry.path) for entry in entries]
    inside = [e for e, name in zip(entries, names, strict=True) if first <= name <= last and has_image_ending(name)]
    return inside, set(names)


def _etag(entries: Iterable[storage.Entry]) -> str:
    return digest((os.path.basename(path), size, etag) for path, size, etag in entries)


@functools.lru_cache(maxsize=1)
def _captions(path: str) -> dict:
    try:
        return read_jsonl(pathlib.Path(storage.local_copy(path)))
    except ValueError as error:
        raise DamagedInput(str(error)) from error
