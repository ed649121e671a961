"""What `python -m lumos_jax.prepare` wrote: compacted shards, or an index over the original ones. See `data.manifest`.

Opening it reads the manifest; no shard is opened to count or to measure its records. Of the arrays beside the manifest only
those numbers are read that a record needs. From a URL the arrays are copied to this machine once. A record that was given a
tombstone keeps its number and has weight 0, so that the order of the others is what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from lumos_jax.data import manifest as manifests
from lumos_jax.data import storage
from lumos_jax.data.arrays import ArrayFile
from lumos_jax.data.base import (
    Captions,
    CorruptRecord,
    Data,
    Fetched,
    HasCaptions,
    Source,
    TombstonedRecord,
    fetched,
    locate,
    printable,
    register,
)
from lumos_jax.data.captions import captions_of_json, decode_text
from lumos_jax.data.shards import Shards
from lumos_jax.data.sources.arrayrecord import Records

_TOMBSTONED = "it has a tombstone"
_NUMBERS = 1 << 32  # of records in an original shard, more than any has


@register("prepared")
class PreparedSource(Source, HasCaptions):
    """The records of the prepared data set in a directory or at a URL, in the order of the manifest.

    captioned: its captions are needed; otherwise an index is not asked where they lie.
    Raises ValueError: no manifest, no records or no captions there, or an array that does not go with the manifest; OSError.
    """

    needs = "path"

    def __init__(self, path: str, captioned: bool = False):
        manifest = manifests.read_manifest(path)
        lacks = "holds no records" if not manifest.records else ""
        if captioned and not manifest.captions:
            lacks = lacks or "has no captions, as config.data.sample_type=captioned needs"
        if lacks:
            raise ValueError(f"config.data.path={path!r}: this prepared data set {lacks}")
        paths = [one.path if manifest.layout == "index" else storage.join(path, one.path) for one in manifest.shards]
        self.remote = any(map(storage.is_remote, paths))
        self._path, self._records, self._fingerprint = path, manifest.records, manifest.digest()
        if manifest.layout == "index":
            names = ("offsets", "lengths", *("caption_offsets", "caption_lengths", "caption_kinds") * captioned)
            index = {name: self._array(manifests.INDEX, f"{name}.npy") for name in names}
            self._content: Records | _Indexed = _Indexed(paths, manifest.shards, index)
        else:
            counts, sizes = ([getattr(shard, name) for shard in manifest.shards] for name in ("records", "bytes"))
            self._content = Records(Shards(paths, counts, sizes=sizes))
        self._sizes, self._tombstones = self._array(manifests.SIZES), np.zeros(0, np.uint64)
        if manifest.tombstones.count:
            found = ArrayFile(storage.local_copy(storage.join(path, manifests.TOMBSTONES)))
            self._tombstones = found[:].astype(np.uint64)

    @classmethod
    def open(cls, data: Data) -> PreparedSource:
        return cls(data.path, data.sample_type == "captioned")

    def _array(self, *names: str) -> ArrayFile:
        file = storage.join(self._path, *names)
        try:
            found = ArrayFile(storage.local_copy(file))
            count = len(found)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"{file} is missing or damaged ({error}): run python -m lumos_jax.prepare write again"
            ) from error
        if count != self._records:
            raise ValueError(
                f"{file} has {count} entries, the manifest {self._records} records: prepare the data set again"
            )
        return found

    def __len__(self) -> int:
        return self._records

    def read(self, index: int) -> bytes:
        return self._of_live(index).read(index)

    def captions(self, index: int) -> Captions:
        return self._of_live(index).captions(index)

    def fetch(self, images: Sequence[int], captions: Sequence[int] = ()) -> Fetched:
        found = self._content.fetch(*([i for i in kind if not self._is_tombstoned(i)] for kind in (images, captions)))
        for there, kind in zip(found, (images, captions), strict=True):
            there.update((index, TombstonedRecord(_TOMBSTONED)) for index in kind if index not in there)
        return found

    def sizes(self, records: np.ndarray) -> np.ndarray:
        return self._sizes[records]

    def describe(self, index: int) -> str:
        return self._content.describe(index)

    def fingerprint(self) -> str:
        return self._fingerprint

    def _is_tombstoned(self, index: int) -> bool:
        at = int(np.searchsorted(self._tombstones, np.uint64(index)))
        return at < len(self._tombstones) and int(self._tombstones[at]) == index

    def _of_live(self, index: int) -> Records | _Indexed:
        """The content. Raises TombstonedRecord."""
        if self._is_tombstoned(index):
            raise TombstonedRecord(_TOMBSTONED)
        return self._content


class _Indexed:
    """Records that lie in original shards, between others. index: the arrays of `data.manifest`, by name."""

    def __init__(self, paths: Sequence[str], shards: Sequence[manifests.Shard], index: dict[str, ArrayFile]):
        self._paths, self._index = list(paths), index
        self._ends = np.cumsum([shard.records for shard in shards]).tolist()
        self._is_tar = [shard.kind == "tar" for shard in shards]
        self._numbered = Records(Shards(paths, [_NUMBERS] * len(paths), sizes=[shard.bytes for shard in shards]))
        self._held: dict[tuple[str, int, int], bytes | OSError] = {}

    def read(self, index: int) -> bytes:
        if not self._in_tar(index):
            return self._numbered.read(self._number(index))
        return storage.read_fetched(self._range(index), self._held)

    def captions(self, index: int) -> Captions:
        if not self._in_tar(index):
            return self._numbered.captions(self._number(index))
        kind = manifests.CAPTION_KINDS[self._index["caption_kinds"][index]]
        if not kind:
            raise CorruptRecord("no caption")
        text = storage.read_fetched(self._range(index, "caption_"), self._held)
        texts = captions_of_json(text) if kind == ".json" else (decode_text(text), "")
        if texts == (None, None):
            raise CorruptRecord("no caption: its .json has no field caption")
        return texts[0] or "", texts[1] or ""

    def fetch(self, images: Sequence[int], captions: Sequence[int] = ()) -> Fetched:
        of_tar, numbers = [], set()
        for records, prefix in ((images, ""), (captions, "caption_")):
            for index in records:
                if not self._in_tar(index):
                    numbers.add(self._number(index))
                elif not prefix or self._index["caption_kinds"][index]:
                    of_tar.append(self._range(index, prefix))
        found = copy.copy(self)
        found._numbered = Records(self._numbered.shards.ahead(numbers))
        found._held = dict(zip(of_tar, storage.read_many(of_tar), strict=True))
        return fetched(found, images, captions)

    def describe(self, index: int) -> str:
        shard, within = locate(self._ends, index)
        return f"{printable(self._paths[shard])}#{within}"

    def _in_tar(self, index: int) -> bool:
        return self._is_tar[locate(self._ends, index)[0]]

    def _range(self, index: int, prefix: str = "") -> tuple[str, int, int]:
        path = self._paths[locate(self._ends, index)[0]]
        return path, int(self._index[f"{prefix}offsets"][index]), int(self._index[f"{prefix}lengths"][index])

    def _number(self, index: int) -> int:
        return locate(self._ends, index)[0] * _NUMBERS + int(self._index["offsets"][index])
