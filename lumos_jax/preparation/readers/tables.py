"""Readers of parquet files with images, and of files of records: ArrayRecord and TFRecord, also those of TFDS."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

from lumos_jax.data import storage
from lumos_jax.data.base import CorruptRecord
from lumos_jax.data.files import is_image
from lumos_jax.data.shards import read_all
from lumos_jax.data.sources.arrayrecord import byte_features, image_of_example
from lumos_jax.preparation.readers import base
from lumos_jax.preparation.readers.base import Candidate, DamagedInput, Input

_ROWS = 32  # of a parquet file that are in memory at a time
_LONGEST_RECORD = 1 << 30  # bytes


@base.register("parquet")
class ParquetReader(base.Reader):
    """A column of struct<bytes, path> (the feature Image of Hugging Face data sets) or of bytes; captions, url and scores in
    columns of the usual names."""

    patterns = ("**/*.parquet",)

    def read(self, given: Input) -> Iterator[Candidate]:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            with storage.open_read(given.path) as file:
                opened = parquet.ParquetFile(file)
                image = _image_column(opened.schema_arrow)
                names = [name for name in opened.schema_arrow.names if name.lower() in base.COLUMNS]
                row = 0
                for batch in opened.iter_batches(_ROWS, columns=[image, *names], use_threads=False):
                    for fields in batch.to_pylist():
                        held = fields.pop(image)
                        held = held if isinstance(held, dict) else {"bytes": held}
                        key = os.path.splitext(held.get("path") or str(row))[0]
                        candidate = Candidate(row, key, held.get("bytes") or b"")
                        candidate.add(fields)
                        yield candidate
                        row += 1
        except pa.ArrowException as error:
            raise DamagedInput(f"no parquet file, or a damaged one ({error})") from error


def _image_column(schema: Any) -> str:
    """The column with encoded images. Raises DamagedInput: there is none."""
    import pyarrow as pa

    for field in schema:
        kind = field.type
        inner = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        if "bytes" in inner or ((pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) and not inner):
            return field.name
    raise DamagedInput(f"no column of struct<bytes, path> or bytes; it has {', '.join(schema.names)}")


@base.register("arrayrecord", "tfds")
class RecordsReader(base.Reader):
    """Records that are image files or tf.train.Example, as data/sources/arrayrecord.py reads them; of TFDS the files of a
    prepared data set, in ArrayRecord or TFRecord format. Needs neither TFDS nor TensorFlow."""

    patterns = ("**/*.array_record*", "**/*.arrayrecord", "**/*.tfrecord*")

    def read(self, given: Input) -> Iterator[Candidate]:
        array_record = ".tfrecord" not in os.path.basename(given.path)
        stem = os.path.basename(given.path)
        try:
            records = read_all(storage.local_copy(given.path)) if array_record else _tfrecord(given.path)
            for row, record in enumerate(records):
                offset = row if array_record else -1
                if is_image(record):
                    yield Candidate(row, f"{stem}#{row}", record, offset)
                    continue
                features = byte_features(record)
                candidate = Candidate(row, f"{stem}#{row}", image_of_example(record) or record, offset)
                candidate.add(
                    {name: base.text_of(value) for name, value in features.items() if name.lower() in base.COLUMNS}
                )
                yield candidate
        except (CorruptRecord, ValueError) as error:
            raise DamagedInput(str(error)) from error


def _tfrecord(path: str) -> Iterator[bytes]:
    """Records of a TFRecord file: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    with base.open_sequential(path) as file:
        while head := file.read(12):
            size = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else _LONGEST_RECORD
            if size >= _LONGEST_RECORD:
                raise DamagedInput("truncated, or no TFRecord file")
            record = file.read(size)
            if len(record) < size or len(file.read(4)) < 4:
                raise DamagedInput("truncated, or no TFRecord file")
            yield record
