"""Files that a task of `write` leaves: the table of its records, the list of its shards, and arrays to be joined at the end.

DIR/records/<build>-v<version>/<task>.parquet   one row a record, in order: record, input, row, key, url, sha256, phash,
                                                    phash_valid, bytes; for tombstones and verification
DIR/records/<build>-v<version>/<task>.json      shards and number of records; written last, when the task is done
DIR/records/<build>-v<version>/<task>.npz       arrays of (records,), concatenated into DIR/sizes.npy and DIR/index/ at the end
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lumos_jax.data import storage
from lumos_jax.data.manifest import Shard
from lumos_jax.preparation import files

COLUMNS = ("input", "row", "key", "url", "sha256", "phash", "phash_valid", "bytes")


@dataclasses.dataclass(frozen=True)
class Part:
    """A task's result: its records, and its shards. tombstones: version of those that `compact` left out."""

    records: int
    shards: tuple[Shard, ...]
    tombstones: int = 0


def build(selected: str, write: Any) -> str:
    """A name of what is written of a selection with these settings (settings.Write)."""
    content = json.dumps([selected, dataclasses.asdict(write)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def directory(out: str, build: str, version: int = 1) -> str:
    return storage.join(out, "records", f"{build}-v{version}")


def shard_directory(build: str, version: int = 1) -> str:
    """Relative to the prepared set. Each build has its own, so that what is read stays until the manifest names another."""
    return f"data/{build}-v{version}"


def name(folder: str, task: int, ending: str) -> str:
    return storage.join(folder, f"{task:06d}.{ending}")


def read_part(folder: str, task: int) -> Part | None:
    """What a finished task made; None if it has not finished."""

    def parse(tree: Any) -> Part:
        shards = (Shard(**one | {"lineage": tuple(one["lineage"])}) for one in tree["shards"])
        return Part(**tree | {"shards": tuple(shards)})

    return files.read_json(name(folder, task, "json"), parse, "remove it and write again")


def sizes(rows: Any) -> np.ndarray:
    """uint16 (N, 2), height and width of rows of a scan."""
    return np.minimum(np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], 1), 65535).astype(np.uint16)


def write_part(
    folder: str,
    task: int,
    first: int,
    rows: Any,
    arrays: Mapping[str, np.ndarray],
    shards: Sequence[Shard],
    tombstones: int = 0,
) -> Part:
    """Writes a task's record table, arrays and, at last, what it made.

    first: the number of its first record. rows: pyarrow.Table with COLUMNS, in the order of the records. tombstones: of Part.
    """
    import pyarrow as pa

    numbers = pa.array(np.arange(first, first + len(rows), dtype=np.uint64))
    files.write_parquet(name(folder, task, "parquet"), rows.select(list(COLUMNS)).add_column(0, "record", numbers))
    files.write_npz(name(folder, task, "npz"), arrays)
    part = Part(len(rows), tuple(shards), tombstones)
    files.write_json(name(folder, task, "json"), dataclasses.asdict(part))
    return part


def read_records(folder: str, task: int, columns: Sequence[str]) -> Any:
    """Columns of a task's record table as a pyarrow.Table."""
    return files.read_parquet(name(folder, task, "parquet"), _remedy(folder, task), columns)


def _remedy(folder: str, task: int) -> str:
    return f"remove {name(folder, task, 'json')} and write again"


def count_tasks(folder: str) -> int:
    """Number of finished tasks."""
    try:
        return len(storage.list_files(folder, "*.json"))
    except FileNotFoundError:
        return 0


def tasks(folder: str, records: int) -> range:
    """Numbers of the tasks. Raises ValueError: their tables do not hold so many records."""
    parts = [read_part(folder, task) for task in range(count_tasks(folder))]
    held = sum(part.records for part in parts if part)
    if None in parts or held != records:
        raise ValueError(f"the tables in {folder} hold {held:,} of {records:,} records: write again")
    return range(len(parts))


def read_arrays(folder: str, task: int) -> dict[str, np.ndarray]:
    return files.read_npz(name(folder, task, "npz"), _remedy(folder, task))
