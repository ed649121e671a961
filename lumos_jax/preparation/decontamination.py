"""Evaluation sets, and the rows that show an image of one: the same file (sha256), or a perceptual hash within a distance.

A set is a folder of images, or a file of hashes: .npy of (N,) uint64 perceptual hashes, or text with one hash at the start of
each line, 16 hexadecimal digits of a perceptual hash (as str(imagehash.phash(image)) writes it) or 64 of a sha256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lumos_jax.data import CorruptRecord, storage
from lumos_jax.data.base import digest
from lumos_jax.data.files import has_image_ending
from lumos_jax.preparation import files, hamming

_LOOK_UP, _COMPARE = 2e-8, 1.4e-9  # seconds to look a row up in a table, and to compare it with an evaluation image
_TABLE_BITS = 23  # of a table in memory, at most
_BLOCK = 1 << 15


@dataclasses.dataclass(frozen=True)
class EvaluationHashes:
    """phash: (N,) uint64, ascending, all different. sha256: (M, 2) uint64, the first 16 bytes of each, ascending."""

    phash: np.ndarray
    sha256: np.ndarray

    def digest(self) -> str:
        return hashlib.sha256(
            self.phash.astype("<u8").tobytes() + b"|" + self.sha256.astype("<u8").tobytes()
        ).hexdigest()


def leading(sha256: np.ndarray) -> np.ndarray:
    """(N, 32) uint8 -> (N, 2) uint64, the first 16 bytes as two big-endian numbers."""
    return np.ascontiguousarray(sha256[:, :16]).view(">u8").astype(np.uint64)


def sha256_of(table: Any) -> np.ndarray:
    """(N, 32) uint8, a view of the column sha256 of a pyarrow.Table."""
    column = table["sha256"].combine_chunks()
    return np.frombuffer(column.buffers()[1], np.uint8)[32 * column.offset :][: 32 * len(table)].reshape(-1, 32)


def merged(sets: Iterable[EvaluationHashes]) -> EvaluationHashes:
    sets = list(sets)
    phash = np.unique(np.concatenate([np.zeros(0, np.uint64), *(one.phash for one in sets)]))
    return EvaluationHashes(
        phash, np.unique(np.concatenate([np.zeros((0, 2), np.uint64), *(one.sha256 for one in sets)]), axis=0)
    )


def read(path: str, hash_image: Callable[[bytes], int | None], kept: str) -> EvaluationHashes:
    """The hashes of an evaluation set. Those of a folder are cached in the directory `kept` until its files change.

    hash_image: the perceptual hash of an encoded image, None for one without content. Raises CorruptRecord.
    Raises ValueError: no set is there, or a line or an image cannot be read.
    """
    if path.endswith(".npy"):
        values = files.read_npy(path, "give another evaluation set, or write it again")
        if values.dtype != np.uint64 or values.ndim != 1:
            raise ValueError(f"{path} holds {values.dtype} {values.shape}, and perceptual hashes are uint64 (N,)")
        return merged([EvaluationHashes(values, np.zeros((0, 2), np.uint64))])
    if path.endswith(".txt"):
        return _of_lines(path, storage.read(path).decode(errors="replace").splitlines())
    found = [one for one in storage.list_files(path, "**/*") if has_image_ending(one.path)]
    if not found:
        raise ValueError(
            f"evaluation set {path}: no images there; give a folder of images, or a .npy or .txt of hashes"
        )
    name = storage.join(kept, f"{digest([path, *found])}.npz")
    if not storage.exists(name):
        files.write_npz(name, dataclasses.asdict(_of_images(path, found, hash_image)))
    return EvaluationHashes(**files.read_npz(name, "remove it and select again"))


def _of_lines(path: str, lines: Sequence[str]) -> EvaluationHashes:
    perceptual, digests = [], []
    for number, line in enumerate(lines, start=1):
        digits = (line.split() or [""])[0].lower()
        if not digits or digits.startswith("#"):
            continue
        if not re.fullmatch("[0-9a-f]{16}|[0-9a-f]{64}", digits):
            raise ValueError(f"{path}, line {number}: {digits[:80]!r} is no hash of 16 or 64 hexadecimal digits")
        (perceptual if len(digits) == 16 else digests).append(digits)
    sha256 = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
    return merged([EvaluationHashes(np.array([int(d, 16) for d in perceptual], np.uint64), leading(sha256))])


def _of_images(
    path: str, found: Sequence[storage.Entry], hash_image: Callable[[bytes], int | None]
) -> EvaluationHashes:
    perceptual, digests = [], []
    for entry in found:
        content = storage.read(entry.path)
        digests.append(hashlib.sha256(content).digest())
        try:
            perceptual.append(hash_image(content))
        except CorruptRecord as error:
            raise ValueError(f"evaluation set {path}: {entry.path} cannot be decoded ({error}); remove it") from error
    sha256 = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    known = [value for value in perceptual if value is not None]
    return merged([EvaluationHashes(np.array(known, np.uint64), leading(sha256))])


class Matcher:
    """Finds rows that are in an evaluation set, by tables (duplicates.py) or, where that costs less, by comparing with all."""

    def __init__(self, hashes: EvaluationHashes, distance: int):
        self._hashes, self._distance, self._tables = hashes, distance, []
        costs = {0: _COMPARE * len(hashes.phash)}
        for equal in (1, 2, 3):
            bits = 64 * equal // (distance + equal)
            if bits < _TABLE_BITS:
                each = _LOOK_UP + 10 * _COMPARE * len(hashes.phash) / 2**bits
                costs[equal] = math.comb(distance + equal, equal) * each
        equal = min(costs, key=lambda one: (costs[one], one))
        for table in hamming.table_set(distance, equal) if equal else []:
            words = np.sort(hamming.rearranged(hashes.phash, table))
            there = np.zeros(1 << table.bits, bool)
            there[words >> np.uint64(64 - table.bits)] = True
            self._tables.append((table, words, there))

    def __call__(self, phash: np.ndarray, valid: np.ndarray, sha256: np.ndarray) -> np.ndarray:
        """(N,) bool. phash (N,) uint64; valid (N,) bool: whether it means anything; sha256 (N, 2) as of `leading`."""
        known, result = self._hashes.sha256, np.zeros(len(phash), bool)
        if len(known):
            # The second half is looked up among those that agree in the first, which hardly ever happens by chance.
            for row in np.flatnonzero(np.isin(sha256[:, 0], known[:, 0])):
                result[row] = (known == sha256[row]).all(1).any()
        rows = np.flatnonzero(valid & ~result)
        if len(self._hashes.phash):
            close = self._by_tables if self._tables else self._one_by_one
            result[rows] = close(np.ascontiguousarray(phash[rows]))
        return result

    def _one_by_one(self, phash: np.ndarray) -> np.ndarray:
        result = np.zeros(len(phash), bool)
        for first in range(0, len(phash), _BLOCK):
            some = phash[first : first + _BLOCK]
            for value in self._hashes.phash:
                result[first : first + _BLOCK] |= np.bitwise_count(some ^ value) <= self._distance
        return result

    def _by_tables(self, phash: np.ndarray) -> np.ndarray:
        result = np.zeros(len(phash), bool)
        for table, words, there in self._tables:
            looked_up = hamming.rearranged(phash, table)
            rest = np.uint64(64 - table.bits)
            rows = np.flatnonzero(there[looked_up >> rest] & ~result)
            wanted = looked_up[rows]
            place = np.searchsorted(words, wanted >> rest << rest)
            last = np.searchsorted(words, wanted | np.uint64((1 << int(rest)) - 1), side="right")
            while len(rows):
                close = np.bitwise_count(words[place] ^ wanted) <= self._distance
                result[rows[close]] = True
                place += 1
                left = ~close & (place < last)
                rows, wanted, place, last = rows[left], wanted[left], place[left], last[left]
        return result
