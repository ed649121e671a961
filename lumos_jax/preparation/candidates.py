"""Reads the candidates of an input and measures them: rows of preparation/scan_rows.py."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from lumos_jax import fileio
from lumos_jax.data.decode import UndecodableImage
from lumos_jax.preparation import images, scan_rows
from lumos_jax.preparation.criteria import score_reason
from lumos_jax.preparation.readers import READERS, Candidate, Input
from lumos_jax.preparation.settings import Criteria, Prepare

Lookup = Callable[[Candidate], Mapping[str, Any]]


def _no_scores(_: Candidate) -> Mapping[str, Any]:
    return {}


class Scanned(NamedTuple):
    """An input's rows, its number of candidates, and the seconds that measuring them took."""

    rows: list[dict[str, Any]]
    read: int
    seconds: float


def scan_input(
    settings: Prepare, given: Input, skip: Collection[int] = (), part: range | None = None, lookup: Lookup = _no_scores
) -> Scanned:
    """Reads an input from its beginning to its end.

    skip: rows of images that kill their worker. part: only these rows are measured. lookup: scores that are not in the input.
    Raises DamagedInput, OSError; ValueError: the input changed since it was planned.
    """
    return fileio.with_retries(functools.partial(_scan_once, settings, given, skip, part, lookup))


def _scan_once(settings: Prepare, given: Input, skip: Collection[int], part: range | None, lookup: Lookup) -> Scanned:
    reader = READERS[given.kind]
    if reader.etag(given) != given.etag:
        raise ValueError(f"input {given.path} changed since it was planned: plan again, with another --out")
    found, read, seconds = [], 0, 0.0
    for candidate in reader.read(given):
        read += 1
        if part is None or candidate.row in part:
            began = time.perf_counter()
            candidate.add(lookup(candidate))
            row = measure(candidate, settings.criteria, settings.sample, candidate.row in skip)
            seconds += time.perf_counter() - began
            if row is not None:
                found.append((candidate, row))
        candidate.data = None
    for candidate, _ in found:
        candidate.add(lookup(candidate))  # by a url that follows the image in the file
    complete = [_with_fields(candidate, row, given, settings.criteria) for candidate, row in found]
    return Scanned(complete, read, seconds)


def measure(candidate: Candidate, criteria: Criteria, sample: float, crashes: bool) -> dict[str, Any] | None:
    """Measures the image of a candidate; None if it is not in the sample."""
    data = candidate.data
    sha256 = hashlib.sha256(data).digest()
    if int.from_bytes(sha256[:8], "big") >= sample * 2**64:
        return None
    row = {"sha256": sha256, "bytes": len(data)}
    reason = scan_rows.CRASH if crashes else score_reason(criteria, candidate.scores)
    if reason:
        return row | {"reason": reason}
    try:
        return row | vars(images.measure(data))
    except UndecodableImage:
        return row | {"reason": scan_rows.UNDECODABLE}


def _with_fields(candidate: Candidate, row: dict[str, Any], given: Input, criteria: Criteria) -> dict[str, Any]:
    """Adds the fields of the candidate to its row, once the input has been read."""
    names = ("row", "key", "url", "offset", "caption", "detailed", "caption_offset", "caption_size", "caption_kind")
    row |= {name: getattr(candidate, name) for name in names} | candidate.scores
    row |= {name: row[name].encode(errors="replace").decode() for name in ("key", "url", "caption", "detailed")}
    if not row.get("reason"):
        row["reason"] = score_reason(criteria, candidate.scores)  # scores that follow the image in the file
    return row | {"input": given.number}
