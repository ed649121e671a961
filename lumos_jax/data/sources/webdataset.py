"""WebDataset shards: .tar files in which the files of a record share their name up to the first dot.

    0001.jpg  0001.txt  0001.json  0002.jpg  0002.txt ...

A .tar has no table of contents, so that its headers are read once, and where the images and captions lie is kept (`tar_index`);
after that any record is one read at a known place, from a disk or a URL. What is compressed as a whole (.tar.gz) has no such
places.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from absl import logging

from lumos_jax import fileio
from lumos_jax.data import base, storage, tar_index
from lumos_jax.data.base import Captions, CorruptRecord, Data, Fetched, HasCaptions, Source, locate, printable, register
from lumos_jax.data.captions import captions_of_json, decode_text
from lumos_jax.data.listing import find_shards, shards_digest, survey
from lumos_jax.data.tar_index import DETAILED, IMAGE, JSON, RAW, Table

_Place = tuple[str, int, int]  # path, offset, size


@register("webdataset")
class TarSource(Source, HasCaptions):
    """Records of .tar shards, in the order of the shards' names and of the images in them.

    A record is an image (`a.jpg`, or another ending of an image); its captions are `a.txt` and `a.detailed.txt`, or fields
    `caption` (`text`, `txt`) and `detailed` (`caption_detailed`) of `a.json`, the text files first. A name with dots in it
    (`1.5 km.jpg`) is a record of its own unless what stands before its first dot is one (`a.mask.png` belongs to `a.jpg`). Of a
    name that stands twice, the last counts, as for tar. Files of other endings are left out, and records without an image too.

    kept: directory for the places, under the shard's path, size and version; None: nowhere.
    max_failed: share of the shards that may be truncated or something else, and are left out.
    Raises ValueError: no shards there, one that is missing, too many that cannot be read, or no images in them.
    """

    needs = "path"

    def __init__(self, path: str, kept: pathlib.Path | None = None, max_failed: float = 0.0):
        self._entries, self._kept = find_shards(path, ".tar", "*.tar"), kept
        self._own: dict[int, Table] = {}  # without a directory for them
        tar_index.make_all(self._entries, kept)

        def look(number: int) -> tuple[int, int, dict[str, int], Table | None]:
            table = self._table(number)
            return len(table.places), table.sample, table.left_out, table if kept is None else None

        found = survey(look, range(len(self._entries)), "indices of .tar shards", max_failed)
        counts, self._samples, left_out, tables = zip(*(one or (0, 0, {}, None) for one in found), strict=True)
        self._own = {number: table for number, table in enumerate(tables) if table is not None}
        for reason, number in sorted(sum(map(collections.Counter, left_out), collections.Counter()).items()):
            logging.warning("%s: %d %s", path, number, reason)
        self._ends = list(itertools.accumulate(counts))
        self.remote = storage.is_remote(self._entries[0].path)
        if not len(self):
            raise ValueError(f"config.data.path={path!r}: the {len(found)} .tar shards there hold no images")
        self._fetched: Mapping[_Place, bytes | OSError] = {}

    @classmethod
    def open(cls, data: Data) -> TarSource:
        return cls(data.path, fileio.cache_directory("tars"), data.max_failed_shards)

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> bytes:
        return self._bytes(index, IMAGE)

    def captions(self, index: int) -> Captions:
        files = (self._bytes(index, RAW), self._bytes(index, DETAILED))
        texts = [None if file is None else decode_text(file) for file in files]
        if None in texts and (file := self._bytes(index, JSON)) is not None:
            told = captions_of_json(file)
            texts = [other if text is None else text for text, other in zip(texts, told, strict=True)]
        if texts == [None, None]:
            raise CorruptRecord("no caption: there is no .txt of its name, and no .json with a field caption")
        return tuple(text or "" for text in texts)

    def fetch(self, images: Sequence[int], captions: Sequence[int] = ()) -> Fetched:
        wanted = [self._place(index, IMAGE) for index in images]
        wanted += itertools.chain.from_iterable(map(self._caption_places, captions))
        found = copy.copy(self)
        found._fetched = dict(zip(wanted, storage.read_many(wanted), strict=True))
        return base.fetched(found, images, captions)

    def describe(self, index: int) -> str:
        path, offset, _ = self._place(index, IMAGE)
        name = f"byte {offset}"
        with contextlib.suppress(OSError, ValueError):
            name = name if storage.is_remote(path) else printable(tar_index.member_name(path, offset))
        return f"{printable(path)}#{name}"

    def fingerprint(self) -> str:
        return shards_digest(self._entries, self._ends, self._samples)

    def _table(self, shard: int) -> Table:
        return self._own.get(shard) or tar_index.index_of(self._entries[shard], self._kept)

    def _place(self, index: int, column: int) -> _Place | None:
        shard, number = locate(self._ends, index)
        place = self._table(shard).place(number, column)
        return None if place is None else (self._entries[shard].path, *place)

    def _caption_places(self, index: int) -> Iterator[_Place]:
        raw, detailed = (self._place(index, column) for column in (RAW, DETAILED))
        other = self._place(index, JSON) if None in (raw, detailed) else None
        return filter(None, (raw, detailed, other))

    def _bytes(self, index: int, column: int) -> bytes | None:
        place = self._place(index, column)
        return None if place is None else storage.read_fetched(place, self._fetched)
