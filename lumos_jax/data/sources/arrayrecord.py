"""ArrayRecord shards of image files or of tf.train.Example.

A record is either the bytes of an image file (as `write_arrayrecord` stores them) or a serialized tf.train.Example whose
feature `image/encoded`, `image` or another one with an image's bytes holds them; its captions are in `caption`, `text` or
`txt`, and `caption/detailed`, `caption_detailed` or `detailed`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from lumos_jax.data.base import Captions, CorruptRecord, Data, HasCaptions, Source, register
from lumos_jax.data.captions import DETAILED_NAMES, RAW_NAMES, decode_text
from lumos_jax.data.files import find_shards, is_image, shards_digest
from lumos_jax.data.shards import Shards, count_records

_IMAGE_FEATURES = ("image/encoded", "image", "jpg", "jpeg", "png", "webp")


@register("arrayrecord")
class ArrayRecordSource(Source, HasCaptions):
    """ArrayRecord shards in a directory, or a glob of them, or one file; shards are ordered by name.

    Raises:
      ValueError: no shards there, or one that is truncated or something else.
    """

    needs = "path"

    def __init__(self, path: str):
        paths = find_shards(path, lambda name: name.endswith(".arrayrecord") or ".array_record" in name)
        if not paths:
            raise ValueError(
                f"config.data.path={path!r}: no ArrayRecord shards there (a directory is searched for *.arrayrecord and "
                "*.array_record*; a file or a glob may have any name)"
            )
        self._shards = Shards(paths, [count_records(p) for p in paths])
        if not len(self):
            raise ValueError(f"config.data.path={path!r}: the {len(paths)} ArrayRecord shards there hold no records")

    @classmethod
    def open(cls, data: Data) -> ArrayRecordSource:
        return cls(data.path)

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, index: int) -> bytes:
        record = self._shards[index]
        return record if is_image(record) else image_of_example(record) or record

    def captions(self, index: int) -> Captions:
        features = byte_features(self._shards[index])
        found = [next((features[n] for n in names if n in features), None) for names in (RAW_NAMES, DETAILED_NAMES)]
        if found == [None, None]:
            raise CorruptRecord("no caption: it is no tf.train.Example with a feature caption, text or txt")
        return tuple(decode_text(text or b"") for text in found)

    def describe(self, index: int) -> str:
        return self._shards.describe(index)

    def fingerprint(self) -> str:
        return shards_digest(self._shards.paths, self._shards.ends)


@functools.cache
def _example_type() -> type[message.Message]:
    """tf.train.Example, as far as features of bytes go: the wire format is the same.

    Names of features are bytes here, and entries of the map a list, so that neither odd bytes nor their order matter.
    """
    file = descriptor_pb2.FileDescriptorProto(name="lumos_jax/example.proto", package="lumos_jax", syntax="proto2")
    bytes_, inner = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES, descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
    one, many = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL, descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
    for name, fields in {
        "BytesList": [("value", 1, many, bytes_, None)],
        "Feature": [("bytes_list", 1, one, inner, "BytesList")],
        "Entry": [("key", 1, one, bytes_, None), ("value", 2, one, inner, "Feature")],
        "Features": [("feature", 1, many, inner, "Entry")],
        "Example": [("features", 1, one, inner, "Features")],
    }.items():
        described = file.message_type.add(name=name)
        for field, number, label, kind, of in fields:
            described.field.add(
                name=field, number=number, label=label, type=kind, type_name=f".lumos_jax.{of}" if of else None
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("lumos_jax.Example"))


def byte_features(record: bytes) -> Mapping[str, bytes]:
    """Name -> first value of the features that hold bytes in a serialized tf.train.Example; {} if it is none."""
    try:
        entries = _example_type().FromString(record).features.feature
    except message.DecodeError:
        return {}
    return {
        entry.key.decode(errors="replace"): entry.value.bytes_list.value[0]
        for entry in entries
        if entry.value.bytes_list.value
    }


def image_of_example(record: bytes) -> bytes | None:
    """The encoded image in a serialized tf.train.Example, or None if this is none or has none."""
    features = byte_features(record)
    for name in _IMAGE_FEATURES:
        if name in features:
            return features[name]
    return next((value for _, value in sorted(features.items()) if is_image(value)), None)
