"""Data sets of TensorFlow Datasets that are prepared as ArrayRecord; reading them needs no TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lumos_jax.data import storage
from lumos_jax.data.base import Captions, CorruptRecord, Data, HasCaptions, HasLabels, Source, digest, register
from lumos_jax.data.captions import DETAILED_NAMES, RAW_NAMES, decode_text, one_line
from lumos_jax.data.shards import InShards, Shards

_RAW = (*RAW_NAMES, "captions")  # the last a sequence, as of coco_captions


@register("tfds")
class TfdsSource(InShards, Source, HasCaptions, HasLabels):
    """Any image data set of TensorFlow Datasets; images stay encoded.

    Nothing is downloaded here: data sets can be large, so preparing one is a command of its own, which the error names.
    Raises ValueError: no such data set or split, no image in it, or not prepared for random access.
    """

    needs = "tfds.name"

    def __init__(self, name: str, split: str, data_dir: str, captioned: bool = False):
        import tensorflow_datasets as tfds  # seconds to import, and only this source needs it

        self.name, self.split, what = name, split, f"config.data.tfds.name={name!r}, split={split!r}"
        info, self.shards = _open(tfds, name, split, os.path.expanduser(data_dir) or None, what)
        self.remote = any(map(storage.is_remote, self.shards.paths))
        self._full_name, self._features = info.full_name, info.features
        features = info.features
        if not len(self):
            raise ValueError(f"{what}: no records")

        def named(kind: type, usual: str) -> list[str]:
            """The features of that kind, the one with the usual name first."""
            return sorted((key for key in features if isinstance(features[key], kind)), key=usual.__ne__)

        images = named(tfds.features.Image, "image")
        if not images:
            raise ValueError(f"{what}: this data set has no image; it has {', '.join(features)}")
        self._image, self._label = images[0], next(iter(named(tfds.features.ClassLabel, "label")), None)
        self._texts = tuple(next((n for n in names if n in features), None) for names in (_RAW, DETAILED_NAMES))
        self._decoders = dict.fromkeys(images, tfds.decode.SkipDecoding())  # images stay encoded, masks among them too
        if captioned and self._texts == (None, None):
            raise ValueError(
                f"config.data.sample_type=captioned: {name} has no feature {', '.join(_RAW)} or detailed; "
                f"it has {', '.join(sorted(features))}"
            )

    @classmethod
    def open(cls, data: Data) -> TfdsSource:
        return cls(data.tfds.name, data.tfds.split, data.path, data.sample_type == "captioned")

    def _record(self, index: int) -> Mapping[str, Any]:
        return self._features.deserialize_example_np(self.record(index), decoders=self._decoders)

    def read(self, index: int) -> bytes | np.ndarray:
        return self._record(index)[self._image]

    def captions(self, index: int) -> Captions:
        """Of a feature with several texts, the first."""
        record = self._record(index)
        return tuple("" if name is None else _first_text(record[name]) for name in self._texts)

    @property
    def classes(self) -> tuple[str, ...]:
        if self._label is None:
            there = ", ".join(self._features)
            raise ValueError(f"config.data.tfds.name={self.name!r} has no class label; it has {there}")
        return tuple(self._features[self._label].names)

    def label(self, index: int) -> int:
        return int(self._record(index)[self._label])

    def describe(self, index: int) -> str:
        return f"{self.name}/{self.split}#{index}"

    def fingerprint(self) -> str:
        return digest([self._full_name, self.split, len(self)])


def _open(tfds: Any, name: str, split: str, data_dir: str | None, what: str) -> tuple[Any, Shards]:
    """A data set's info and records. Raises ValueError, as TfdsSource."""
    where = data_dir or tfds.core.constants.DATA_DIR
    # Not TFDS's own command line, which needs Apache Beam even where the data set does not.
    prepare = (
        f"""python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir={where!r}, """
        """file_format='array_record').download_and_prepare()\" (needs TensorFlow: pip install '.[tensorflow]')"""
    )
    try:
        info = tfds.builder(name, data_dir=data_dir, file_format="array_record").info
    except (tfds.core.DatasetNotFoundError, AssertionError, ImportError) as error:
        reason = _first_line(error)
        raise ValueError(f"{what}: TFDS has no such data set, nor is one prepared in {where} ({reason})") from error
    except ValueError as error:  # it is there, in another file format
        raise ValueError(
            f"{what} in {where} cannot be read at random: {_first_line(error)}. Prepare it as ArrayRecord in another "
            f"directory, and set config.data.path to that: {prepare.replace(where, 'DIRECTORY')}"
        ) from error
    if not info.splits:
        download = f" (it downloads {info.download_size})" if info.download_size else ""
        raise ValueError(f"{what} is not prepared in {where}. Prepare it once{download} with: {prepare}")
    try:
        pieces = info.splits[split].file_instructions
    except (ValueError, KeyError, AssertionError, NotImplementedError, OSError) as error:
        reason, splits = _first_line(error), ", ".join(info.splits)
        hint = f"(splits: {splits}; a split can be sliced, as train[:90%])"
        raise ValueError(f"{what} cannot be read at random: {reason} {hint}") from error
    # Not TFDS's own reader, which keeps every shard open.
    paths = [os.fspath(piece.filename) for piece in pieces]
    return info, Shards(paths, [piece.take for piece in pieces], [piece.skip for piece in pieces])


def _first_text(value: Any) -> str:
    """A text, or the first of several, or of entries {"text": ...}."""
    if isinstance(value, Mapping):
        value = value.get("text", ())
    if isinstance(value, (list, tuple, np.ndarray)):
        return _first_text(value[0]) if len(value) else ""
    if not isinstance(value, (str, bytes)):
        raise CorruptRecord(f"its caption is no text but {type(value).__name__}")
    return decode_text(value) if isinstance(value, bytes) else one_line(value)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
