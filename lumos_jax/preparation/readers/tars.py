"""Readers of .tar files: img2dataset, plain WebDataset shards, SA-1B, JourneyDB's .tgz and ImageNet's class archives.

A file is read once, from its beginning to its end. The files of a record share their name up to the ending and usually follow
each other; what comes later is added to the record all the same. The rules for names are those of data/sources/webdataset.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from lumos_jax.data import storage, tar_headers
from lumos_jax.data.base import CorruptRecord
from lumos_jax.data.captions import decode_text
from lumos_jax.data.files import IMAGE_ENDINGS
from lumos_jax.preparation.readers import base
from lumos_jax.preparation.readers.base import Candidate, DamagedInput, Input
from lumos_jax.preparation.scan_rows import JSON, NO_CAPTION, TEXT
from lumos_jax.preparation.settings import Source

_TEXTS = (".detailed.txt", ".txt", ".json")
_LONGEST_TEXT = 1 << 20  # bytes; masks of SA-1B are longer, and no captions
_SPAN, _GAP = 4 << 20, 1 << 19  # bytes of images that are read at once, and of what may lie between two of them


class Member(NamedTuple):
    """A regular file in a .tar: its name, where its bytes begin in the file, and their number."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO, begin: int = 0, end: int | None = None) -> Iterator[Member]:
    """The regular files of a .tar, which may lie within another one. The file's place is behind a member's header when it is
    yielded. Raises DamagedInput: no .tar, a compressed or a truncated one."""
    try:
        for member in tar_headers.walk(lambda offset, size: (file.seek(offset), file.read(size))[1], begin, end):
            if member[2] >= 0:
                file.seek(member[1])
                yield Member(*member)
    except ValueError as error:
        raise DamagedInput(f"no .tar, or a compressed, damaged or truncated one: {error}") from error


def split_name(name: str) -> tuple[str, str]:
    """(stem, known ending in lower case): "a.b.JPG" -> ("a.b", ".jpg"); ("", "") for files of other kinds."""
    folder, base_name = os.path.split(name.removeprefix("./"))
    lower = base_name.lower()
    known = next((ending for ending in _TEXTS if lower.endswith(ending)), os.path.splitext(lower)[1])
    if base_name.startswith(".") or (known not in _TEXTS and known not in IMAGE_ENDINGS):
        return "", ""
    return os.path.join(folder, base_name[: -len(known)]), known


class _Grouping:
    """Joins the files of records while they pass. An image waits for the files that follow it; a second image of the same
    stem before its first dot (a.mask.png behind a.jpg) belongs to that record and is left out."""

    def __init__(self, seekable: bool):
        self.seekable = seekable
        self.found: dict[str, Candidate] = {}
        self.early: dict[str, list] = {}
        self.waiting: Candidate | None = None
        self.rows = 0

    def image(self, stem: str, member: Member, data: bytes) -> Iterator[Candidate]:
        """Takes an image, and yields the one before."""
        folder, name = os.path.split(stem)
        if "." in name and os.path.join(folder, name.partition(".")[0]) in self.found:
            return
        if self.waiting:
            yield self.waiting
        candidate = Candidate(self.rows, stem, data, member.offset if self.seekable else -1)
        self.rows += 1
        self.found[stem] = self.waiting = candidate  # of a name that stands twice, each is a record
        for known, place, text in self.early.pop(stem, ()):
            self.text(stem, known, place, text)

    def text(self, stem: str, known: str, member: Member, data: bytes) -> None:
        candidate = self.found.get(stem)
        if candidate is None:
            self.early.setdefault(stem, []).append((known, member, data))
            return
        if known == ".json":
            had = bool(candidate.caption)
            candidate.add(base.parse_json(data))
            if candidate.caption and not had:
                self._place(candidate, JSON, member)
            return
        try:
            text = decode_text(data)
        except CorruptRecord:
            return
        if known == ".txt":
            candidate.caption = text
            self._place(candidate, TEXT if text else NO_CAPTION, member)
        else:
            candidate.detailed = text

    def _place(self, candidate: Candidate, kind: int, member: Member) -> None:
        candidate.caption_kind = kind if self.seekable else NO_CAPTION
        if candidate.caption_kind:
            candidate.caption_offset, candidate.caption_size = member.offset, member.size


class TarReader(base.Reader):
    patterns = ("**/*.tar",)
    nested = False  # whether a .tar within the .tar is read
    texts = True

    def read(self, given: Input) -> Iterator[Candidate]:
        known = self.known(given) if given.metadata else {}
        try:
            with self.open(given.path) as file:
                for candidate in self._candidates(file, given):
                    if fields := known.get(candidate.key):
                        candidate.add(fields)
                    yield candidate
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DamagedInput(f"damaged or truncated ({error})") from error

    def open(self, path: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return base.open_sequential(path)

    def known(self, given: Input) -> dict[str, dict]:
        """key -> fields of the parquet file that img2dataset writes beside a shard."""
        table = base.read_table(given.metadata)
        rows = table.to_pylist() if "key" in table.column_names else []
        return {str(row.pop("key")): row for row in rows}

    def _candidates(self, file: BinaryIO, given: Input) -> Iterator[Candidate]:
        groups = _Grouping(not isinstance(file, gzip.GzipFile))
        prefix = os.path.splitext(os.path.basename(given.path))[0] if self.nested else ""
        for member in self._members(file, prefix):
            stem, known = split_name(member.name)
            if not known or (known in _TEXTS and not (self.texts and member.size <= _LONGEST_TEXT)):
                continue
            data = file.read(member.size)
            if len(data) < member.size:
                raise DamagedInput(f"truncated within {member.name}")
            if known in _TEXTS:
                groups.text(stem, known, member, data)
            else:
                yield from groups.image(stem, member, data)
        if groups.waiting:
            yield groups.waiting

    def _members(self, file: BinaryIO, prefix: str) -> Iterator[Member]:
        for member in members(file):
            if self.nested and member.name.endswith(".tar"):
                inner = os.path.splitext(os.path.basename(member.name))[0]
                for found in members(file, member.offset, member.offset + member.size):
                    yield found._replace(name=f"{inner}/{os.path.basename(found.name)}")
            elif self.nested:
                yield member._replace(name=f"{prefix}/{os.path.basename(member.name)}")
            else:
                yield member

    def images(self, given, places):
        if any(offset < 0 for _, offset, _ in places):
            yield from super().images(given, places)
            return
        for near in _spans(places):
            start, end = near[0][1], near[-1][1] + near[-1][2]
            data = memoryview(storage.read(given.path, start, end - start))
            if len(data) < end - start:
                raise DamagedInput("it is shorter now")
            for _, offset, size in near:
                yield bytes(data[offset - start : offset - start + size])


def _spans(places: Sequence[tuple[int, int, int]]) -> Iterator[Sequence[tuple[int, int, int]]]:
    """Images that one read fetches: of about _SPAN bytes, with no wide gap between them."""
    first = 0
    for i in range(1, len(places) + 1):
        if i < len(places):
            (_, before, size), (_, offset, more) = places[i - 1 : i + 1]
            if 0 <= offset - before - size <= _GAP and offset + more - places[first][1] <= _SPAN:
                continue
        yield places[first:i]
        first = i


@base.register("img2dataset", "tars", "scenes")
class WebDatasetReader(TarReader):
    """A parquet file of the shard's name beside it has the url, the caption and scores by `key` (img2dataset)."""

    def list(self, source: Source, task_bytes: int) -> list[Input]:
        inputs = super().list(source, task_bytes)
        # A file or a glob of shards names the tables by their ending; below a directory they are looked for.
        names = f"{source.path.removesuffix('.tar')}.parquet" if source.path.endswith(".tar") else source.path
        try:
            tables = {entry.path for entry in storage.list_files(names, "**/*.parquet")}
        except (FileNotFoundError, NotADirectoryError):
            tables = set()
        beside = [given.path.removesuffix(".tar") + ".parquet" for given in inputs]
        return [
            dataclasses.replace(given, metadata=table) if table in tables else given
            for given, table in zip(inputs, beside, strict=True)
        ]


@base.register("sa1b")
class Sa1bReader(TarReader):
    """sa_000000.tar with sa_N.jpg and masks in sa_N.json, which are left out."""

    patterns, texts = ("**/sa_*.tar",), False


class ClassTarReader(TarReader):
    """A class's .tar (n01440764.tar), or the .tar of those; keys are class/name."""

    nested, texts = True, False


@base.register("journeydb")
class JourneyReader(TarReader):
    """imgs/000.tgz, and the lines of .jsonl files that belong to it: img_path, prompt (the raw caption), and the caption of
    Task2 (the detailed one). The .jsonl is read once for each archive, of which there are some 200."""

    patterns, texts = ("**/*.tgz",), False

    def list(self, source: Source, task_bytes: int) -> list[Input]:
        metadata = source.metadata or source.path
        return [dataclasses.replace(given, metadata=metadata) for given in super().list(source, task_bytes)]

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        with base.open_sequential(path) as file, gzip.GzipFile(fileobj=file) as unpacked:
            yield unpacked

    def known(self, given: Input) -> dict[str, dict]:
        archive = os.path.basename(given.path).removesuffix(".tgz")
        needles, found = (f"/{archive}/".encode(), f'"{archive}/'.encode()), {}
        for entry in storage.list_files(given.metadata, "**/*.jsonl"):
            with base.open_sequential(entry.path) as file:
                for line in file:
                    if needles[0] in line or needles[1] in line:
                        fields = base.parse_json(line)
                        task = fields.get("Task2")
                        detailed = task.get("Caption") if isinstance(task, dict) else None
                        name = split_name(str(fields.get("img_path")))[0]
                        found[name] = {"prompt": fields.get("prompt"), "detailed": detailed}
        return found
