"""The shards of a data set: found by directory, glob or URL, counted, and known again by their content.

What is found out about a shard is kept below $LUMOS_JAX_CACHE, so that a restart opens none.
"""

from __future__ import annotations

import collections
import glob
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from absl import logging

from lumos_jax import fileio, progress
from lumos_jax.data import storage
from lumos_jax.data.base import digest, printable
from lumos_jax.data.files import Arrays, made_once
from lumos_jax.data.storage import Entry

_NUMBERED = re.compile(r"(\d+)-of-(\d+)")
_SAMPLE = 1 << 14  # bytes, at the beginning and in the middle of a shard
_THREADS = 16  # that mostly wait for storage
T = TypeVar("T")


def find_shards(path: str, kind: str, *patterns: str) -> list[Entry]:
    """The shards in a directory, those that a glob finds, or one file, by path.

    What is no file (a folder of a shard's name, a named pipe) is left out, and its number logged.
    Raises ValueError: none there, or 00002-of-00005 is missing in a directory; OSError: storage fails.
    """
    given = path if storage.is_remote(path) else os.path.abspath(os.path.expanduser(path))
    try:
        found = storage.list_files(given, *patterns)
    except OSError as error:
        raise fileio.failure(error, f"config.data.path={path!r} cannot be listed: {error.strerror or error}") from error
    if not storage.is_remote(given):
        named = [os.path.join(glob.escape(given), pattern) for pattern in patterns] if os.path.isdir(given) else [given]
        others = {
            p for name in named for p in glob.glob(name, recursive=True) if os.path.exists(p) and not os.path.isfile(p)
        }
        if others:
            logging.warning("%s: %d are no files and are left out, as %s", given, len(others), printable(min(others)))
    if not found:
        searched = f"a directory is searched for {' and '.join(patterns)}; a file or a glob may have any name"
        raise ValueError(f"config.data.path={path!r}: no {kind} shards there ({searched})")
    if [entry.path for entry in found] != [given] and not re.search(r"[*?\[]", path):
        _check_complete(path, [entry.path for entry in found])
    return found


def _check_complete(path: str, names: Sequence[str]) -> None:
    """Raises ValueError: of the shards ...-of-00005 some are missing."""
    numbers: dict[tuple[str, str, str], set[int]] = collections.defaultdict(set)
    for name in names:
        if match := _NUMBERED.search(name.rpartition("/")[2]):
            folder = name[: len(name) - len(name.rpartition("/")[2])]
            base = name[len(folder) :]
            numbers[folder + base[: match.start()], match[2], base[match.end() :]].add(int(match[1]))
    for (before, total, after), there in sorted(numbers.items()):
        missing = [number for number in range(int(total)) if number not in there][:3]
        if missing and int(total) < 10**7:
            example = printable(f"{before}{missing[0]:0{len(total)}}-of-{total}{after}")
            raise ValueError(
                f"config.data.path={path!r}: {int(total) - len(there)} of {int(total)} shards are missing, as {example}. "
                f"Fetch them, or give a glob to train on those that are there"
            )


def counted(
    entries: Sequence[Entry], kind: str, count: Callable[[Entry], int], max_failed: float, kept: pathlib.Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Records of each shard (N,) int64, 0 of one that cannot be read, and a hash of a sample of its content (N,) uint64.

    count: raises ValueError for a shard that is truncated or something else. Of such up to the share `max_failed` are named in
    the log and left out. kept: where what was found is kept.
    Raises ValueError: more of them; OSError: storage fails.
    """
    name = digest([_SAMPLE, *entries])
    file = kept and kept / f"{name}.npz"
    all_read = True

    def look() -> Arrays:
        nonlocal all_read
        found = survey(lambda entry: (count(entry), content_sample(entry)), entries, f"{kind} shards", max_failed)
        all_read = None not in found
        counts, samples = zip(*(one or (0, 0) for one in found), strict=True)
        return {"counts": np.array(counts, np.int64), "samples": np.array(samples, np.uint64)}

    found = made_once(file, ("counts", "samples"), look)
    if file and not all_read:  # those that failed are looked at again at the next start
        file.unlink(missing_ok=True)
    return found["counts"], found["samples"]


def survey(look: Callable[[Any], T], shards: Sequence[Any], title: str, max_failed: float) -> list[T | None]:
    """What `look` gives for each shard; None where it raises ValueError, for a shard that cannot be read. Up to the share
    `max_failed` of such are named in the log. Raises ValueError: more of them."""
    failed: list[str] = []

    def one(shard: Any) -> T | None:
        try:
            return look(shard)
        except ValueError as error:
            failed.append(str(error))
            return None

    found = progress.in_threads(one, shards, _THREADS, title, unit="shard")
    if len(failed) > int(max_failed * len(shards)):
        of = f" ({len(failed)} such shards of {len(shards)}; config.data.max_failed_shards={max_failed})"
        raise ValueError(min(failed) + of * (len(shards) > 1))
    for problem in sorted(failed):
        logging.warning("a shard is left out: %s", problem)
    return found


def content_sample(entry: Entry) -> int:
    """A hash of some of the shard's bytes, at places that its size decides. Raises OSError."""
    starts = [0] if entry.size <= 2 * _SAMPLE else [0, entry.size // 2]
    size = min(entry.size, 2 * _SAMPLE) if len(starts) == 1 else _SAMPLE
    parts = [storage.read(entry.path, start, size) for start in starts]
    return int(digest(part.hex() for part in parts), 16)


def shards_digest(entries: Sequence[Entry], ends: Iterable[int], samples: Iterable[int]) -> str:
    """A hash of shards by their names, sizes and numbers of records, and behind a dash one of a sample of their content."""
    names = digest(
        (entry.path.rpartition("/")[2], entry.size, int(end)) for entry, end in zip(entries, ends, strict=True)
    )
    return f"{names}-{digest(map(int, samples))}"
