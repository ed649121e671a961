"""Takes records out of a prepared data set by url, key, sha256 or perceptual hash, without changing the order of the others.

    DIR/taken_out.parquet   what was asked for: kind, value, distance, version. Kept, so that a data set that is written again
                            or compacted leaves out the same
    DIR/tombstones.npy      uint64, numbers of the records that this finds, ascending

A record with a tombstone keeps its number and has weight 0. `version` in the manifest counts the requests.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lumos_jax.data import manifest as manifests
from lumos_jax.data import storage
from lumos_jax.preparation import decontamination, layout, selection

REQUESTS = "taken_out.parquet"
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
    if kind not in KINDS:
        raise ValueError(f"records are taken out by {', '.join(KINDS)}, not by {kind!r}")
    if distance and kind != "phash":
        raise ValueError(f"a distance of {distance} bits goes with phash, not with {kind}")
    wanted = sorted({_value(kind, value) for value in values} - {""})
    if not wanted:
        raise ValueError(f"no {kind} is given to take out")
    import pyarrow as pa

    before = _requests(out)
    version = 1 + max(before["version"].to_pylist(), default=0)
    count = len(wanted)
    new = {"kind": [kind] * count, "value": wanted, "distance": [distance] * count, "version": [version] * count}
    _save(out, pa.concat_tables([before, pa.table(new, schema=before.schema)]))
    made = write_numbers(out, layout.directory(out, manifest.build, manifest.version))
    say(f"tombstones  {made.count - manifest.tombstones.count:,} more, {made.count:,} in all (version {made.version})")
    manifest = dataclasses.replace(manifest, tombstones=made)
    manifests.write_manifest(out, manifest)
    return manifest


def read_values(path: str) -> list[str]:
    """The lines of a text file, without empty ones."""
    lines = storage.read(path).decode().splitlines()
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
    import pyarrow.parquet

    path = storage.join(out, REQUESTS)
    if storage.exists(path):
        with storage.open_read(path) as file:
            return pa.parquet.read_table(file)
    fields = {"kind": pa.string(), "value": pa.string(), "distance": pa.int32(), "version": pa.int32()}
    return pa.schema(list(fields.items())).empty_table()


def _save(out: str, requests: Any) -> None:
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(requests, file)
    storage.write_whole(storage.join(out, REQUESTS), file.getvalue())


def write_numbers(out: str, folder: str) -> manifests.Tombstones:
    """Finds all records that were asked for in the record tables of a folder, and writes tombstones.npy."""
    requests = _requests(out)
    version = max(requests["version"].to_pylist(), default=0)
    path = storage.join(out, manifests.TOMBSTONES)
    found = np.zeros(0, np.uint64)
    if version:
        finder = _Finder(requests)
        found = np.sort(np.concatenate([finder(folder, task) for task in range(layout.count_tasks(folder))]))
        storage.write_whole(path, selection.array_bytes(found))
    elif storage.exists(path):
        storage.remove(path)
    return manifests.Tombstones(version, len(found))


def numbers(out: str) -> np.ndarray:
    """uint64, the numbers of the records that have a tombstone, ascending."""
    path = storage.join(out, manifests.TOMBSTONES)
    return np.load(io.BytesIO(storage.read(path))) if storage.exists(path) else np.zeros(0, np.uint64)


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
        rows = layout.read_records(folder, task, ["record", *self._columns, *hashes])
        found = np.zeros(len(rows), bool)
        for kind in self._columns:
            found |= pyarrow.compute.is_in(rows[kind], value_set=self._texts[kind]).to_numpy()
        for matcher in self._matchers:
            valid = rows["phash_valid"].to_numpy()
            found |= matcher(rows["phash"].to_numpy(), valid, np.zeros((len(rows), 2), np.uint64))
        return rows["record"].to_numpy()[found]
