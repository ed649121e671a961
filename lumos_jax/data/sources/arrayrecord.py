"""ArrayRecord shards of image files or of tf.train.Example.

A record is either the bytes of an image file (as `write_arrayrecord` stores them) or a serialized tf.train.Example whose
feature `image/encoded`, `image` or another one with an image's bytes holds them; its captions are in `caption`, `text` or
`txt`, and `caption/detailed`, `caption_detailed` or `detailed`.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping

from google.protobuf import empty_pb2, message, unknown_fields

from lumos_jax import fileio
from lumos_jax.data import storage
from lumos_jax.data.base import Captions, CorruptRecord, Data, HasCaptions, Source, register
from lumos_jax.data.captions import DETAILED_NAMES, RAW_NAMES, decode_text
from lumos_jax.data.files import is_image
from lumos_jax.data.listing import counted, find_shards, shards_digest
from lumos_jax.data.shards import InShards, Shards, count_records
from lumos_jax.data.storage import Entry

_IMAGE_FEATURES = ("image/encoded", "image", "jpg", "jpeg", "png", "webp")


class Records(InShards, HasCaptions):
    """The images and captions in shards."""

    def __init__(self, shards: Shards):
        self.shards = shards

    def read(self, index: int) -> bytes:
        record = self.record(index)
        return record if is_image(record) else image_of_example(record) or record

    def captions(self, index: int) -> Captions:
        features = byte_features(self.record(index))
        found = [next((features[n] for n in names if n in features), None) for names in (RAW_NAMES, DETAILED_NAMES)]
        if found == [None, None]:
            raise CorruptRecord("no caption: it is no tf.train.Example with a feature caption, text or txt")
        return tuple(decode_text(text or b"") for text in found)


@register("arrayrecord")
class ArrayRecordSource(Records, Source):
    """ArrayRecord shards in a directory, or a glob of them, or one file, on disk or behind a URL; ordered by name.

    max_failed: share of the shards that may be truncated or something else, and are left out.
    kept: directory for what is known of the shards, under their paths, sizes and versions; None: nowhere.
    Raises ValueError: no shards there, one that is missing, or too many that cannot be read.
    """

    needs = "path"

    def __init__(self, path: str, max_failed: float = 0.0, kept: pathlib.Path | None = None):
        self._entries = find_shards(path, "ArrayRecord", "*.arrayrecord", "*.array_record*")
        paths, _, _ = zip(*self._entries, strict=True)

        def count(entry: Entry) -> int:
            return count_records(entry.path, entry.size)

        counts, self._samples = counted(self._entries, "ArrayRecord", count, max_failed, kept)
        super().__init__(Shards(paths, counts, sizes=[entry.size for entry in self._entries]))
        self.remote = storage.is_remote(paths[0])
        if not len(self):
            raise ValueError(f"config.data.path={path!r}: the {len(paths)} ArrayRecord shards there hold no records")

    @classmethod
    def open(cls, data: Data) -> ArrayRecordSource:
        return cls(data.path, data.max_failed_shards, fileio.cache_directory("shards"))

    def fingerprint(self) -> str:
        return shards_digest(self._entries, self.shards.ends, self._samples)


def _contents(data: bytes, number: int) -> list[bytes]:
    """What the fields of that number hold in a serialized message, of those that hold bytes."""
    fields = unknown_fields.UnknownFieldSet(empty_pb2.Empty.FromString(data))
    return [field.data for field in fields if field.field_number == number and isinstance(field.data, bytes)]


def byte_features(record: bytes) -> Mapping[str, bytes]:
    """Name -> first value of the features that hold bytes in a serialized tf.train.Example; {} if it is none."""
    found = {}
    try:  # an Example is a list of features, each an entry of a name and a list of bytes (or of numbers)
        for entry in (entry for features in _contents(record, 1) for entry in _contents(features, 1)):
            lists = [part for feature in _contents(entry, 2) for part in _contents(feature, 1)]
            values = [value for part in lists for value in _contents(part, 1)]
            if values:
                found[b"".join(_contents(entry, 1)[-1:]).decode(errors="replace")] = values[0]
    except message.DecodeError:
        return {}
    return found


def image_of_example(record: bytes) -> bytes | None:
    """The encoded image in a serialized tf.train.Example, or None if this is none or has none."""
    features = byte_features(record)
    named = (features[name] for name in _IMAGE_FEATURES if name in features)
    others = (value for _, value in sorted(features.items()) if is_image(value))
    return next(itertools.chain(named, others), None)
