"""Layout index: where the kept records lie in the original files, 12 bytes a record, 25 with captions; no image is copied."""

from __future__ import annotations

from typing import Any

import numpy as np

from lumos_jax.data import storage
from lumos_jax.data.manifest import INDEX, Manifest, Shard
from lumos_jax.preparation import files, record_files, scan_rows, selection
from lumos_jax.preparation.settings import Write

ARRAYS = {
    "offsets": ("offset", np.uint64), "lengths": ("bytes", np.uint32), "caption_offsets": ("caption_offset", np.uint64),
    "caption_lengths": ("caption_size", np.uint32), "caption_kinds": ("caption_kind", np.uint8),
}  # fmt: skip


def write_task(out: str, plan: Any, selected: selection.Selection, write: Write, task: int) -> record_files.Part:
    """Writes the index of the records of a task of the scan, in its order; skips one that is whole.
    Raises ValueError: an input whose images cannot be read alone."""
    folder = record_files.directory(out, record_files.build(selected.digest, write))
    if done := record_files.read_part(folder, task):
        return done
    columns = [*record_files.COLUMNS, "offset", "height", "width", "caption_offset", "caption_size", "caption_kind"]
    rows = scan_rows.read(out, task, columns).take(selection.kept(out, selected.digest, task))
    inputs, kept = rows["input"].to_numpy(), selection.inputs(out, selected.digest)
    if len(alone := np.flatnonzero(rows["offset"].to_numpy() < 0)):
        given = plan.inputs[inputs[alone[0]]]
        raise ValueError(
            f"config.write.layout=index: images of {given.path} (kind={given.kind}) cannot be read one by one where they are: "
            "write them without --index-only (layout=arrayrecord)"
        )
    arrays = {name: np.maximum(rows[column].to_numpy(), 0).astype(kind) for name, (column, kind) in ARRAYS.items()}
    arrays["sizes"] = record_files.sizes(rows)
    numbers, counts = np.unique(inputs, return_counts=True)
    made = [_shard(plan.inputs[number], int(count)) for number, count in zip(numbers, counts, strict=True)]
    first = sum(int(kept[list(inputs), 0].sum()) for inputs in plan.tasks[:task])
    return record_files.write_part(folder, task, first, rows, arrays, made)


def _shard(given: Any, records: int) -> Shard:
    kind = "tar" if given.path.endswith(".tar") else "arrayrecord"
    return Shard(given.path, kind, records, given.bytes, None, (given.number,))


def names(manifest: Manifest) -> list[str]:
    """The arrays in DIR/index/."""
    return [name for name in ARRAYS if manifest.captions or not name.startswith("caption")]


def write_arrays(out: str, folder: str, tasks: range, manifest: Manifest) -> None:
    """Writes DIR/index/ from the arrays of the tasks."""
    for name in names(manifest):
        joined = (record_files.read_arrays(folder, task)[name] for task in tasks)
        files.write_concatenated(storage.join(out, INDEX, f"{name}.npy"), joined, ARRAYS[name][1], (manifest.records,))
