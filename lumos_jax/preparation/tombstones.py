"""Tombstones: takes records out of a prepared data set by url, key, sha256 or pHash; the others keep their order.

    DIR/taken_out.parquet   requests: kind, value, distance, version; they apply again when the set is written or compacted
    DIR/tombstones.npy      uint64, numbers of the records that match a request, ascending

A record with a tombstone keeps its number and has weight 0. `version` in the manifest counts the requests.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lumos_jax.data import manifest as manifests
from lumos_jax.data import storage
from lumos_jax.preparation import decontamination, files, record_files

REQUESTS = "taken_out.parquet"
MAX_DISTANCE = 16  # bits; unrelated images are closer than that by chance
KINDS = {"url": None, "key": None, "sha256": 64, "phash": 16}  # hexadecimal digits


def add(
    out: str, kind: str, values: Sequence[str], say: Callable[[str], None] = print, *, distance: int = 0
) -> manifests.Manifest:
    """Gives a tombstone to every record that has one of the values; one request at a time.

    Args:
      kind: url, key, sha256 (64 hexadecimal digits) or phash (16 of them).
      distance: kind=phash: bits in which a record's hash may differ.
    Raises ValueError: another kind, a value that is no hash, or nothing is written in `out`.
    """
    manifest = manifests.read_manifest(out)
    files.lock(out)
    if kind not in KINDS:
        raise ValueError(f"records are taken out by {', '.join(KINDS)}, not by {kind!r}")
    if distance and kind != "phash":
        raise ValueError(f"a distance of {distance} bits goes with phash, not with {kind}")
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"a distance of {distance} bits must be from 0 to {MAX_DISTANCE}")
    wanted = sorted({_value(kind, value) for value in values} - {""})
    if not wanted:
        raise ValueError(f"no {kind} is given to take out")
    import pyarrow as pa

    folder = record_files.directory(out, manifest.build, manifest.version)
    tasks, before = record_files.tasks(folder, manifest.records), _requests(out)
    version = 1 + max(before["version"].to_pylist(), default=0)
    count = len(wanted)
    new = {"kind": [kind] * count, "value": wanted, "distance": [distance] * count, "version": [version] * count}
    requests = pa.concat_tables([before, pa.table(new, schema=before.schema)])
    files.write_parquet(storage.join(out, REQUESTS), requests)
    made = write_numbers(out, folder, tasks)
    more = made.count - manifest.tombstones.count
    say(f"tombstones  {more:,} more, {made.count:,} in all (version {made.version})")
    if not more:
        say(f"no other record matches ({count:,} values given); the request applies again when the set is written anew")
    manifest = dataclasses.replace(manifest, tombstones=made)
    manifests.write_manifest(out, manifest)
    return manifest


def read_values(path: str) -> list[str]:
    """The lines of a UTF-8 text file, without empty ones. Raises ValueError: there is no such file, or it is no text."""
    try:
        lines = storage.read(path).decode("utf-8-sig").splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ValueError(f"--file={path} must be a UTF-8 text file with a value a line: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _value(kind: str, text: str) -> str:
    digits = KINDS[kind]
    if digits is None:
        return text
    if not re.fullmatch(f"[0-9a-fA-F]{{{digits}}}", text.strip()):
        raise ValueError(f"{text[:80]!r} is no {kind}: {digits} hexadecimal digits")
    return text.strip().lower()


def _requests(out: str) -> Any:
    import pyarrow as pa

    path = storage.join(out, REQUESTS)
    if storage.exists(path):
        return files.read_parquet(path, "restore it: it holds every request that was made")
    fields = {"kind": pa.string(), "value": pa.string(), "distance": pa.int32(), "version": pa.int32()}
    return pa.schema(list(fields.items())).empty_table()


def write_numbers(out: str, folder: str, tasks: range) -> manifests.Tombstones:
    """Finds the records of all requests in the record tables of a folder, and writes tombstones.npy."""
    requests = _requests(out)
    version = max(requests["version"].to_pylist(), default=0)
    path = storage.join(out, manifests.TOMBSTONES)
    found = np.zeros(0, np.uint64)
    if version:
        finder = _Finder(requests)
        found = np.sort(np.concatenate([finder(folder, task) for task in tasks]))
        files.write_npy(path, found)
    elif storage.exists(path):
        storage.remove(path)
    return manifests.Tombstones(version, len(found))


def numbers(out: str) -> np.ndarray:
    """uint64, the numbers of the records that have a tombstone, ascending."""
    path = storage.join(out, manifests.TOMBSTONES)
    if not storage.exists(path):
        return np.zeros(0, np.uint64)
    return files.read_npy(path, "run tombstone or write again")


class _Finder:
    """The numbers of the records of a task that match any request."""

    def __init__(self, requests: Any):
        import pyarrow as pa

        rows = requests.to_pylist()
        self._texts = {k: pa.array([r["value"] for r in rows if r["kind"] == k], pa.string()) for k in ("url", "key")}
        digests = [bytes.fromhex(r["value"]) for r in rows if r["kind"] == "sha256"]
        self._texts["sha256"] = pa.array(digests, pa.binary(32))
        self._matchers = []
        for distance in sorted({r["distance"] for r in rows if r["kind"] == "phash"}):
            hashes = [int(r["value"], 16) for r in rows if r["kind"] == "phash" and r["distance"] == distance]
            known = decontamination.EvaluationHashes(
                np.unique(np.array(hashes, np.uint64)), np.zeros((0, 2), np.uint64)
            )
            self._matchers.append(decontamination.Matcher(known, distance))
        self._columns = [kind for kind, values in self._texts.items() if len(values)]

    def __call__(self, folder: str, task: int) -> np.ndarray:
        import pyarrow.compute

        hashes = ["phash", "phash_valid"] if self._matchers else []
        rows = record_files.read_records(folder, task, ["record", *self._columns, *hashes])
        found = np.zeros(len(rows), bool)
        for kind in self._columns:
            found |= pyarrow.compute.is_in(rows[kind], value_set=self._texts[kind]).to_numpy()
        for matcher in self._matchers:
            valid = rows["phash_valid"].to_numpy()
            found |= matcher(rows["phash"].to_numpy(), valid, np.zeros((len(rows), 2), np.uint64))
        return rows["record"].to_numpy()[found]
