"""What `write` hands from its tasks to its end: record tables, and the files of a task.

DIR/records/<build>-v<version>/<task>.parquet   one row a record, in order: record, input, row, key, url, sha256, phash,
                                                    phash_valid, bytes; what tombstones and verification look up
DIR/records/<build>-v<version>/<task>.json      the shards of the task, and its records; written last: the task is done
DIR/records/<build>-v<version>/<task>.npz       arrays of (records,), joined into DIR/sizes.npy and DIR/index/ at the end
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lumos_jax.data import storage
from lumos_jax.data.manifest import Shard

PARTIAL = ".partial-"  # beginning of the names of files that are being written
COLUMNS = ("input", "row", "key", "url", "sha256", "phash", "phash_valid", "bytes")


@dataclasses.dataclass(frozen=True)
class Part:
    """A task's result: its records, and its shards."""

    records: int
    shards: tuple[Shard, ...]


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
    try:
        tree = json.loads(storage.read(name(folder, task, "json")))
    except FileNotFoundError:
        return None
    return Part(tree["records"], tuple(Shard(**one | {"lineage": tuple(one["lineage"])}) for one in tree["shards"]))


def sizes(rows: Any) -> np.ndarray:
    """uint16 (N, 2), height and width of rows of a scan."""
    return np.minimum(np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], 1), 65535).astype(np.uint16)


def write_part(
    folder: str, task: int, first: int, rows: Any, arrays: Mapping[str, np.ndarray], shards: Sequence[Shard]
) -> Part:
    """Writes a task's record table, arrays and, at last, what it made.

    first: the number of its first record. rows: pyarrow.Table with COLUMNS, in the order of the records.
    """
    import pyarrow as pa
    import pyarrow.parquet

    numbers = pa.array(np.arange(first, first + len(rows), dtype=np.uint64))
    file = io.BytesIO()
    pa.parquet.write_table(rows.select(list(COLUMNS)).add_column(0, "record", numbers), file)
    storage.write_whole(name(folder, task, "parquet"), file.getvalue())
    file = io.BytesIO()
    np.savez(file, **arrays)
    storage.write_whole(name(folder, task, "npz"), file.getvalue())
    part = Part(len(rows), tuple(shards))
    storage.write_whole(name(folder, task, "json"), (json.dumps(dataclasses.asdict(part), indent=2) + "\n").encode())
    return part


def read_records(folder: str, task: int, columns: Sequence[str]) -> Any:
    """Columns of a task's record table as a pyarrow.Table."""
    import pyarrow.parquet

    with storage.open_read(name(folder, task, "parquet")) as file:
        return pyarrow.parquet.read_table(file, columns=list(columns), use_threads=False)


def count_tasks(folder: str) -> int:
    return len(storage.list_files(folder, "*.json"))


def read_arrays(folder: str, task: int) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(storage.read(name(folder, task, "npz")))) as arrays:
        return dict(arrays)


def write_array(path: str, parts: Iterable[np.ndarray], kind: Any, shape: tuple[int, ...]) -> None:
    """Joins arrays into one .npy file, which appears whole; what is in memory is a part."""
    with temporary(path) as file:
        joined = np.lib.format.open_memmap(file, "w+", kind, shape) if shape[0] else np.zeros(shape, kind)
        first = 0
        for part in parts:
            joined[first : first + len(part)] = part
            first += len(part)
        assert first == shape[0]
        if shape[0]:
            joined.flush()
        else:
            np.save(file, joined)


@contextlib.contextmanager
def temporary(path: str) -> Iterator[str]:
    """A unique file name on this machine. What is written there gets the name `path` at the end, by a rename or as one upload;
    if it fails, nothing is left."""
    with contextlib.ExitStack() as stack:
        if storage.is_remote(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lumos_jax_write_"))
        else:
            folder = os.path.dirname(os.path.abspath(path))
            os.makedirs(folder, exist_ok=True)
        partial = pathlib.Path(folder, f"{PARTIAL}{uuid.uuid4().hex}.npy")
        try:
            yield os.fspath(partial)
            if storage.is_remote(path):
                storage.write_whole(path, partial)
            else:
                with open(partial, "rb+") as file:
                    os.fsync(file.fileno())
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def remove_leftovers(folder: str) -> None:
    """Removes what killed processes left in a local directory; none may be at work there."""
    for path in [] if storage.is_remote(folder) else pathlib.Path(folder).glob(f"{PARTIAL}*"):
        path.unlink(missing_ok=True)
