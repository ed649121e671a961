"""The rows of a scan: DIR/scan/<task>.parquet, one file a task, one row a candidate, in the order of (input, row).

input, row          place: the input's number in plan.json, and the place among its images, in file order
key, url            the member's name without its ending, and where the image came from; "" where unknown. Not unique
sha256, bytes       of the encoded image
format              "JPEG", "PNG", ...; "" where it was not decoded
height, width       of the upright image; 0 where it was not decoded
offset              where the encoded image lies: byte in a .tar, record in an ArrayRecord file; -1: cannot be read alone
caption, detailed   raw and detailed caption, "" where there is none
caption_offset, caption_size, caption_kind   the caption's file within a .tar; -1, 0: none; NO_CAPTION, TEXT, JSON
phash               perceptual hash of the upright image as imagehash.phash computes it; the most significant bit is hash[0, 0]
phash_valid         False where the image has too little content for a hash to mean anything
blur, entropy, border   preparation/images.py
aesthetic, watermark, unsafe, similarity   scores of the metadata; NaN where unknown
reason              "" for an image that was decoded, or why it was not: a criterion on scores, "undecodable", "crash"
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lumos_jax.data import storage
from lumos_jax.preparation import files

FOLDER = "scan"
NO_CAPTION, TEXT, JSON = range(3)  # caption_kind
SCORES = ("aesthetic", "watermark", "unsafe", "similarity")
UNDECODABLE, CRASH = "undecodable", "crash"

# Column -> type of pyarrow, and the value of a row that has none.
_COLUMNS: dict[str, tuple[str, Any]] = {
    "input": ("int32", 0), "row": ("int32", 0), "key": ("string", ""), "url": ("string", ""), "sha256": ("sha256", bytes(32)),
    "format": ("string", ""), "bytes": ("int32", 0), "height": ("int32", 0), "width": ("int32", 0), "offset": ("int64", -1),
    "caption": ("string", ""), "detailed": ("string", ""), "caption_offset": ("int64", -1), "caption_size": ("int32", 0),
    "caption_kind": ("uint8", NO_CAPTION), "phash": ("uint64", 0), "phash_valid": ("bool", False),
    "blur": ("float32", np.nan), "entropy": ("float32", np.nan), "border": ("float32", np.nan),
    **dict.fromkeys(SCORES, ("float32", np.nan)), "reason": ("string", ""),
}  # fmt: skip
DEFAULTS = {name: default for name, (_, default) in _COLUMNS.items()}


@functools.cache
def schema() -> Any:
    """The pyarrow.Schema of a scan file."""
    import pyarrow as pa

    def kind(name: str) -> Any:
        return pa.binary(32) if name == "sha256" else pa.bool_() if name == "bool" else getattr(pa, name)()

    return pa.schema([pa.field(name, kind(type_name), nullable=False) for name, (type_name, _) in _COLUMNS.items()])


def table(rows: list[dict[str, Any]]) -> Any:
    """A pyarrow.Table of rows, which may leave out columns."""
    import pyarrow as pa

    columns = {name: [row.get(name, default) for row in rows] for name, default in DEFAULTS.items()}
    return pa.table(columns, schema=schema())


def path(out: str, task: int) -> str:
    return storage.join(out, FOLDER, f"{task:06d}.parquet")


def read(out: str, task: int, columns: Sequence[str] | None = None) -> Any:
    """A pyarrow.Table of a task's rows. Raises ValueError: its file is missing or damaged."""
    return files.read_parquet(path(out, task), f"remove {FOLDER}/{task:06d}.json and scan again", columns)
