"""ArrayRecord shards read by byte ranges, for storage where a request is dear: a shard's index is one read of its end, and
after that each group of records is one read.

An ArrayRecord file is a Riegeli/records file (google/riegeli, doc/riegeli_records_file_format.md) of one chunk a group of
records, whose last chunk but one lists where they lie and whose last block says where that list is. Block headers of 24 bytes
interrupt chunks at every 64 KiB. Their hashes (HighwayHash) are not verified here; the array_record library does so for files.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import numpy as np

from lumos_jax.data import storage

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_TAIL = 4 * _BLOCK  # bytes of a shard's end that hold the whole index, of most shards
_MAGIC = 0x71930E704FDAE05E
_SIMPLE_CHUNK = ord("r")
_COMPRESSIONS = {ord("z"): "zstandard", ord("b"): "brotli"}


class Index(NamedTuple):
    """Where the groups of a shard lie. offsets: (groups + 1,) uint64, the last is the end; group_size: records of each but the
    last one; records: of the shard."""

    offsets: np.ndarray
    group_size: int
    records: int

    def place(self, number: int) -> tuple[int, int, int]:
        """Of a record: the offset and size in bytes of its group, and its number in that."""
        if not 0 <= number < self.records:
            raise ValueError(f"no record {number} of {self.records}")
        group, within = divmod(number, self.group_size)
        begin, end = map(int, self.offsets[group : group + 2])
        return begin, end - begin, within


def read_index(path: str, size: int) -> Index:
    """The index of a shard of `size` bytes. Raises ValueError: it is truncated or something else; OSError: storage."""
    if size % _BLOCK or size < 2 * _BLOCK:
        raise ValueError(f"its {size} bytes are no whole number of blocks")
    start = max(0, size - _TAIL)
    tail = storage.read(path, start, size - start)
    if len(tail) < size - start:
        raise ValueError("it ends early")
    postscript = _numbers(records_of(tail[-_BLOCK:], size - _BLOCK)[0])
    if postscript.get(2) != _MAGIC or not 0 < postscript.get(1, 0) < size:
        raise ValueError("its end names no index")
    footer = postscript[1]
    raw = tail[footer - start : -_BLOCK] if footer >= start else storage.read(path, footer, size - _BLOCK - footer)
    about, *groups = records_of(raw, footer)
    told = _numbers(about[_varint(about, 1)[1] :])  # a message in a message
    count, records = told.get(2, 0), told.get(3, 0)
    values = _varints(b"".join(groups)) if groups else np.zeros(0, np.uint64)
    tags, values = values[0::2], values[1::2]
    offsets, sizes = values[tags == 8], values[tags == 24]
    group_size = int(sizes[0]) if len(sizes) else 1
    regular = len(offsets) == len(sizes) == count and (sizes[:-1] == group_size).all() and int(sizes.sum()) == records
    if not regular or (len(sizes) and sizes[-1] > group_size):
        raise ValueError("its index does not list its records")
    return Index(np.append(offsets, np.uint64(footer)), group_size, records)


def records_of(raw: bytes, begin: int) -> list[bytes]:
    """The records of the chunk whose bytes, from offset `begin` of the file on, are `raw`. Raises ValueError: it is damaged."""
    chunk = _without_headers(raw, begin)
    size, kind, count = (int.from_bytes(chunk[a:b], "little") for a, b in ((8, 16), (24, 25), (25, 32)))
    data = chunk[_CHUNK_HEADER : _CHUNK_HEADER + size]
    if kind != _SIMPLE_CHUNK or len(data) < size or size < 2:
        raise ValueError(f"no chunk of records (kind {kind}, {len(data)} of {size} bytes)")
    compression = data[0]
    length, at = _varint(data, 1)
    sizes = _varints(_decompress(compression, data[at : at + length]))
    values = _decompress(compression, data[at + length :])
    if len(sizes) != count or int(sizes.sum()) != len(values):
        raise ValueError("the sizes of its records are damaged")
    if count == 1:
        return [values]
    ends = np.cumsum(sizes).tolist()
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _without_headers(raw: bytes, begin: int) -> bytes:
    """Bytes of a file from `begin` on without the block headers among them."""
    first = -begin % _BLOCK  # of the next block, in raw
    parts = [raw[:first]]
    parts += [raw[at + _BLOCK_HEADER : at + _BLOCK] for at in range(first, len(raw), _BLOCK)]
    return b"".join(parts)


def _decompress(kind: int, data: bytes) -> bytes:
    if kind == 0:
        return data
    if kind not in _COMPRESSIONS:
        raise ValueError(f"compression {chr(kind)!r} is not read from URLs: write it again, uncompressed")
    size, at = _varint(data, 0)
    try:
        library = importlib.import_module(_COMPRESSIONS[kind])
    except ImportError as error:
        raise ImportError(
            f"compressed ArrayRecord shards are read from URLs with {error.name}: pip install '.[remote]'"
        ) from error
    failure = library.ZstdError if kind == ord("z") else library.error
    try:
        if kind == ord("z"):
            found = library.ZstdDecompressor().decompress(data[at:], max_output_size=size)
        else:
            found = library.decompress(data[at:])
    except failure as error:
        raise ValueError(f"damaged: {error}") from error
    if len(found) != size:
        raise ValueError(f"{len(found)} bytes in place of {size}")
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where the next begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number is damaged")


def _varints(data: bytes) -> np.ndarray:
    """All numbers of a buffer that holds nothing else: uint64."""
    array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(array < 128)
    if not len(array):
        return np.zeros(0, np.uint64)
    if not len(ends) or ends[-1] != len(array) - 1:
        raise ValueError("a number is damaged")
    starts = np.append(0, ends[:-1] + 1)
    shifts = 7 * (np.arange(len(array)) - np.repeat(starts, ends - starts + 1))
    if shifts.max() > 63:
        raise ValueError("a number is damaged")
    return np.add.reduceat((array & 127).astype(np.uint64) << shifts.astype(np.uint64), starts)


def _numbers(message: bytes) -> dict[int, int]:
    """Field -> value of a serialized message's fields that are numbers."""
    found, at = {}, 0
    while at < len(message):
        tag, at = _varint(message, at)
        value, at = _varint(message, at)
        if tag & 7 == 2:  # bytes of that length
            at += value
        elif tag & 7 == 0:
            found[tag >> 3] = value
        else:
            raise ValueError("another message")
    return found
