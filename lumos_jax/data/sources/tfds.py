"""Data sets of TensorFlow Datasets that are prepared as ArrayRecord; reading them needs no TensorFlow."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lumos_jax.data.base import Captions, CorruptRecord, Data, HasCaptions, HasLabels, Source, digest, register
from lumos_jax.data.captions import DETAILED_NAMES, RAW_NAMES, decode_text, one_line
from lumos_jax.data.shards import Shards

_RAW = (*RAW_NAMES, "captions")  # the last a sequence, as of coco_captions


@register("tfds")
class TfdsSource(Source, HasCaptions, HasLabels):
    """Any image data set of TensorFlow Datasets; images stay encoded.

    Nothing is downloaded here: data sets can be large, so preparing one is a command of its own, which the error names.

    Raises:
      ValueError: no such data set or split, no image in it, or not prepared for random access.
    """

    needs = "tfds.name"

    def __init__(self, name: str, split: str, data_dir: str, captioned: bool = False):
        self.name, self.split, self.data_dir = name, split, os.path.expanduser(data_dir) or None
        self._length = len(self._set.shards)
        if not self._length:
            raise ValueError(f"config.data.tfds.name={name!r}, split={split!r}: no records")
        if captioned and self._set.texts == (None, None):
            raise ValueError(
                f"config.data.sample_type=captioned: {name} has no feature {', '.join(_RAW)} or detailed; "
                f"it has {', '.join(sorted(self._set.info.features))}"
            )

    @classmethod
    def open(cls, data: Data) -> TfdsSource:
        return cls(data.tfds.name, data.tfds.split, data.path, data.sample_type == "captioned")

    @functools.cached_property
    def _set(self) -> _OpenSet:
        return _OpenSet(self.name, self.split, self.data_dir)

    def __getstate__(self):  # a worker process opens the data set for itself
        return {name: value for name, value in self.__dict__.items() if name != "_set"}

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> bytes | np.ndarray:
        return self._set.record(index)[self._set.image]

    def captions(self, index: int) -> Captions:
        """Of a feature with several texts, the first."""
        record = self._set.record(index)
        return tuple("" if name is None else _first_text(record[name]) for name in self._set.texts)

    @property
    def classes(self) -> tuple[str, ...]:
        features = self._set.info.features
        if self._set.label is None:
            raise ValueError(f"config.data.tfds.name={self.name!r} has no class label; it has {', '.join(features)}")
        return tuple(features[self._set.label].names)

    def label(self, index: int) -> int:
        return int(self._set.record(index)[self._set.label])

    def describe(self, index: int) -> str:
        return f"{self.name}/{self.split}#{index}"

    def fingerprint(self) -> str:
        return digest([self._set.info.full_name, self.split, self._length])


class _OpenSet:
    """A data set that is open: `info`, `shards`, and which features are the `image`, the `label` (or None) and the `texts`."""

    def __init__(self, name: str, split: str, data_dir: str | None):
        import tensorflow_datasets as tfds  # seconds to import, and only this source needs it

        what = f"config.data.tfds.name={name!r}, split={split!r}"
        where = data_dir or tfds.core.constants.DATA_DIR
        # Not TFDS's own command line, which needs Apache Beam even where the data set does not.
        prepare = (
            f"""python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir={where!r}, """
            """file_format='array_record').download_and_prepare()\" (needs TensorFlow: pip install '.[tensorflow]')"""
        )
        try:
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        except (tfds.core.DatasetNotFoundError, AssertionError, ImportError) as error:
            raise ValueError(
                f"{what}: TFDS has no such data set, nor is one prepared in {where} ({_first_line(error)})"
            ) from error
        except ValueError as error:  # it is there, in another file format
            raise ValueError(
                f"{what} in {where} cannot be read at random: {_first_line(error)}. Prepare it as ArrayRecord in another "
                f"directory, and set config.data.path to that: {prepare.replace(where, 'DIRECTORY')}"
            ) from error
        self.info = builder.info
        features, splits = self.info.features, self.info.splits
        if not splits:
            size = self.info.download_size
            download = f" (it downloads {size})" if size else ""
            raise ValueError(f"{what} is not prepared in {where}. Prepare it once{download} with: {prepare}")
        images = [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
        if not images:
            raise ValueError(f"{what}: this data set has no image; it has {', '.join(features)}")
        self.image = "image" if "image" in images else images[0]
        labels = [key for key, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)]
        self.label = "label" if "label" in labels else next(iter(labels), None)
        self.texts = tuple(next((name for name in kind if name in features), None) for kind in (_RAW, DETAILED_NAMES))
        self._decoders = {
            key: tfds.decode.SkipDecoding() for key in images
        }  # images stay encoded, masks among them too
        try:
            pieces = splits[split].file_instructions
        except (ValueError, KeyError, AssertionError, NotImplementedError, OSError) as error:
            raise ValueError(
                f"{what} cannot be read at random: {_first_line(error)} (splits: {', '.join(splits)}; a split can be "
                "sliced, as train[:90%])"
            ) from error
        # Not TFDS's own reader, which keeps every shard open.
        paths = [os.fspath(piece.filename) for piece in pieces]
        self.shards = Shards(paths, [piece.take for piece in pieces], [piece.skip for piece in pieces])

    def record(self, index: int) -> Mapping[str, Any]:
        return self.info.features.deserialize_example_np(self.shards[index], decoders=self._decoders)


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
