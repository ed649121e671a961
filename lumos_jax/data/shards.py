"""Sources that keep many records in one file: ArrayRecord shards, and data sets of TensorFlow Datasets.

A record of a shard is either the bytes of an image file (as `write_arrayrecord` stores them) or a serialised tf.train.Example
whose feature `image/encoded`, `image` or another one with an image's bytes holds them; its captions are in `caption`, `text`
or `txt`, and `caption/detailed`, `caption_detailed` or `detailed`. TensorFlow is not loaded: the few
fields of an Example that matter are read from the protocol buffer's wire format here.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import glob
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lumos_jax.data import captions
from lumos_jax.data.sources import digest, is_image, printable

_IMAGE_FEATURES = (b"image/encoded", b"image", b"jpg", b"jpeg", b"png", b"webp")


class OpenedLater:
    """ArrayRecord shards `paths` that are opened when first read, and by each process for itself."""

    paths: list[str]

    @functools.cached_property
    def _records(self):
        from array_record.python import array_record_data_source

        return array_record_data_source.ArrayRecordDataSource(self.paths)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_records"}


class ArrayRecordSource(OpenedLater):
    """ArrayRecord shards in a directory, or a glob of them, or one file; shards are ordered by name.

    Raises:
      ValueError: no shards there, or one that is truncated or something else.
    """

    def __init__(self, path: str):
        given = pathlib.Path(path).expanduser().absolute()
        if given.is_dir():
            paths = sorted(str(p) for p in given.iterdir() if _is_shard(p.name))
        else:
            paths = sorted(p for p in glob.glob(str(given), recursive=True) if os.path.isfile(p))
        if not paths:
            raise ValueError(
                f"config.data.path={path!r}: no ArrayRecord shards there (a directory is searched for *.arrayrecord and "
                "*.array_record*; a file or a glob may have any name)"
            )
        self.paths = paths
        counts = [count_records(p) for p in paths]
        if not sum(counts):
            raise ValueError(f"config.data.path={path!r}: the {len(paths)} ArrayRecord shards there hold no records")
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> bytes:
        try:
            record = self._records[index]
        except (ValueError, RuntimeError, IndexError) as error:
            raise OSError(f"shard damaged: {error}") from error
        return record if is_image(record) else image_of_example(record) or record

    def captions(self, index: int) -> tuple[str, str]:
        try:
            found = captions_of_example(self._records[index])
        except (ValueError, RuntimeError, IndexError) as error:
            raise OSError(f"shard damaged: {error}") from error
        if found is None:
            raise OSError("no caption: it is no tf.train.Example with a feature caption, text or txt")
        return found

    def describe(self, index: int) -> str:
        shard = bisect.bisect_right(self._ends, index)
        return f"{printable(self.paths[shard])}#{index - (self._ends[shard - 1] if shard else 0)}"

    def fingerprint(self) -> str:
        return digest(
            (os.path.basename(p), os.path.getsize(p), end) for p, end in zip(self.paths, self._ends, strict=True)
        )


def _is_shard(name: str) -> bool:
    return not name.startswith(".") and (name.endswith(".arrayrecord") or ".array_record" in name)


def count_records(path: str) -> int:
    """Records in a shard; this reads its index, which stands at the end, and so finds a truncated one.

    Raises:
      ValueError: no such shard, or it is truncated or something else.
    """
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(path)
        with contextlib.closing(reader):
            return reader.num_records()
    except (ValueError, RuntimeError, OSError, IndexError) as error:
        raise ValueError(
            f"{printable(path)} cannot be read as ArrayRecord: truncated, or something else ({error}). "
            "Fetch or write this shard again, or take it away"
        ) from error


def write_arrayrecord(path: str | os.PathLike, records: Iterable[bytes], *, compress: bool = True) -> int:
    """Writes records (for training, each the bytes of an image file) as one ArrayRecord shard; returns how many.

    The shard appears under its name when it is whole, so that an interrupted writer leaves no truncated one.

    Raises:
      OSError: it cannot be written; a full disk.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = f"{os.fspath(path)}.partial"
    # One record a group: records are read in random order, and a group is decompressed as a whole.
    writer, count = ArrayRecordWriter(partial, "group_size:1" if compress else "group_size:1,uncompressed"), 0
    try:
        for record in records:
            _on_disk(writer.write, record)
            count += 1
        _on_disk(writer.close)
    except BaseException:
        with contextlib.suppress(OSError):
            _on_disk(writer.close)
        os.unlink(partial)
        raise
    os.replace(partial, path)
    return count


def _on_disk(call: Callable, *arguments) -> None:
    try:
        call(*arguments)
    except RuntimeError as error:  # ArrayRecord's, of a full disk too
        raise OSError(str(error)) from error


def image_of_example(record: bytes) -> bytes | None:
    """The encoded image in a serialised tf.train.Example, or None if this is none or has none."""
    try:
        features = dict(_byte_features(record))
    except (ValueError, IndexError):
        return None
    for name in _IMAGE_FEATURES:
        if name in features:
            return features[name]
    return next((value for _, value in sorted(features.items()) if is_image(value)), None)


def captions_of_example(record: bytes) -> tuple[str, str] | None:
    """(raw, detailed) captions in a serialised tf.train.Example, or None if this is none or has neither."""
    try:
        features = dict(_byte_features(record))
    except (ValueError, IndexError):
        return None
    found = [
        next((features[name.encode()] for name in names if name.encode() in features), None)
        for names in (captions.RAW_NAMES, captions.DETAILED_NAMES)
    ]
    if found == [None, None]:
        return None
    raw, detailed = (" ".join((text or b"").decode("utf-8", errors="replace").split()) for text in found)
    return raw, detailed


def _byte_features(example: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, first value) of the features that hold bytes: Example.features.feature[name].bytes_list.value[0]."""
    for features in _fields(example, 1):
        for entry in _fields(features, 1):
            names, values = list(_fields(entry, 1)), list(_fields(entry, 2))
            lists = [found for value in values for found in _fields(value, 1)]
            first = next((value for found in lists for value in _fields(found, 1)), None)
            if names and first is not None:
                yield names[0], first


def _fields(message: bytes, number: int) -> Iterator[bytes]:
    """The length-delimited fields of that number in a protocol buffer message.

    Raises:
      ValueError or IndexError: these bytes are no message.
    """
    place, view = 0, memoryview(message)
    while place < len(view):
        tag, place = _varint(view, place)
        kind = tag & 7
        if kind == 0:
            _, place = _varint(view, place)
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        elif kind == 2:
            length, place = _varint(view, place)
            if place + length > len(view):
                raise ValueError("a field is longer than its message")
            if tag >> 3 == number:
                yield bytes(view[place : place + length])
            place += length
        else:
            raise ValueError(f"wire type {kind}")


def _varint(view: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = view[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number is too long")


_OF_RECORDS = ("_records", "_key", "_label", "_classes", "_texts")  # of a TfdsSource, found whenever it is opened
_TFDS_RAW = (*captions.RAW_NAMES, "captions")  # the last a sequence, as of coco_captions


def _first_text(value: Any) -> str:
    """A text, or the first of several, or of entries {"text": ...}."""
    if isinstance(value, Mapping):
        value = value.get("text", ())
    if isinstance(value, (list, tuple, np.ndarray)):
        return _first_text(value[0]) if len(value) else ""
    if not isinstance(value, (str, bytes)):
        raise OSError(f"its caption is no text but {type(value).__name__}")
    return " ".join((value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value).split())


class TfdsSource:
    """Any image data set of TensorFlow Datasets, through its random-access data source; images stay encoded.

    Nothing is downloaded here: data sets can be large, so preparing one is a command of its own, which the error names.

    Raises:
      ValueError: no such data set or split, no image in it, or not prepared for random access.
    """

    def __init__(self, name: str, split: str, data_dir: str, captioned: bool = False):
        self.name, self.split, self.data_dir = name, split, os.path.expanduser(data_dir) or None
        self._length = len(self._records)
        if not self._length:
            raise ValueError(f"config.data.name={name!r}, split={split!r}: no records")
        if captioned and self._texts == (None, None):
            features = ", ".join(sorted(self._records.dataset_info.features))
            raise ValueError(
                f"config.data.sample_type=captioned: {name} has no feature {', '.join(_TFDS_RAW)} or detailed; it has "
                f"{features}"
            )

    @functools.cached_property
    def _records(self):
        import tensorflow_datasets as tfds

        what = f"config.data.name={self.name!r}, split={self.split!r}"
        where = self.data_dir or tfds.core.constants.DATA_DIR
        # Not TFDS's own command line, which needs Apache Beam even where the data set does not.
        prepare = (
            f"""python -c "import tensorflow_datasets as tfds; tfds.builder({self.name!r}, data_dir={where!r}, """
            """file_format='array_record').download_and_prepare()\""""
        )
        try:
            builder = tfds.builder(self.name, data_dir=self.data_dir, file_format="array_record")
        except (tfds.core.DatasetNotFoundError, AssertionError, ImportError) as error:
            raise ValueError(
                f"{what}: TFDS has no such data set, nor is one prepared in {where} ({_first_line(error)})"
            ) from error
        except ValueError as error:  # it is there, in another file format
            raise ValueError(
                f"{what} in {where} cannot be read at random: {_first_line(error)}. Prepare it as ArrayRecord in another "
                f"directory, and set config.data.path to that: {prepare.replace(where, 'DIRECTORY')}"
            ) from error
        if not builder.info.splits:
            size = builder.info.download_size
            download = f" (it downloads {size})" if size else ""
            raise ValueError(f"{what} is not prepared in {where}. Prepare it once{download} with: {prepare}")
        images = [key for key, kind in builder.info.features.items() if isinstance(kind, tfds.features.Image)]
        if not images:
            raise ValueError(f"{what}: this data set has no image; it has {', '.join(builder.info.features)}")
        self._key = "image" if "image" in images else images[0]
        labels = {
            key: kind for key, kind in builder.info.features.items() if isinstance(kind, tfds.features.ClassLabel)
        }
        self._label = "label" if "label" in labels else next(iter(labels), None)
        self._classes = tuple(labels[self._label].names) if labels else ()
        names = (_TFDS_RAW, captions.DETAILED_NAMES)
        self._texts = tuple(next((name for name in kind if name in builder.info.features), None) for kind in names)
        decoders = {key: tfds.decode.SkipDecoding() for key in images}  # pictures stay encoded, masks among them too
        try:
            return builder.as_data_source(split=self.split, decoders=decoders)
        except (ValueError, KeyError, AssertionError, NotImplementedError, OSError) as error:
            raise ValueError(
                f"{what} cannot be read at random: {_first_line(error)} (splits: {', '.join(builder.info.splits)}; a split can "
                "be sliced, as train[:90%])"
            ) from error

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in _OF_RECORDS}

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> bytes | np.ndarray:
        records = self._records  # first: it finds out which feature is the image
        try:
            return records[index][self._key]
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            raise OSError(f"shard damaged: {error}") from error

    def captions(self, index: int) -> captions.Captions:
        """Of a feature with several texts, the first."""
        records = self._records
        try:
            record = records[index]
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            raise OSError(f"shard damaged: {error}") from error
        return tuple("" if name is None else _first_text(record[name]) for name in self._texts)

    @property
    def classes(self) -> tuple[str, ...]:
        features = self._records.dataset_info.features
        if self._label is None:
            raise ValueError(f"config.data.name={self.name!r} has no class label; it has {', '.join(features)}")
        return self._classes

    def label(self, index: int) -> int:
        records = self._records
        try:
            return int(records[index][self._label])
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            raise OSError(f"shard damaged: {error}") from error

    def describe(self, index: int) -> str:
        return f"{self.name}/{self.split}#{index}"

    def fingerprint(self) -> str:
        info = self._records.dataset_info
        return digest([info.full_name, self.split, self._length])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
