"""Writes the selected records as a prepared data set (data/manifest.py): independent tasks, then one end.

`tasks` numbers them, `run_task` runs one in any process, any number of times, and `finish` joins what they wrote and writes the
manifest. Bytes depend on the scan, the selection and config.write alone. What an earlier selection wrote stays readable until
the new manifest takes its place, and after that can be removed.
"""

from __future__ import annotations

from collections.abc import Callable

from lumos_jax.data import manifest as manifests
from lumos_jax.data import storage
from lumos_jax.preparation import files, publish, record_files, selection, write_arrayrecord, write_index
from lumos_jax.preparation import plan as plans
from lumos_jax.preparation.settings import Prepare, from_dict, to_dict

_FILE = "write.json"


def tasks(out: str, settings: Prepare) -> list[int]:
    """Numbers for `run_task`, which writes the current selection with these settings: DIR/write.json keeps both.
    Raises ValueError: nothing is selected, no record is, or the selection is of another plan or of other settings."""
    plan, selected = plans.read(out), selection.read(out)
    selection.check(out, plan.digest, selected, settings)
    if not selected.kept:
        raise ValueError(f"the selection in {out} keeps none of {selected.rows:,} records: see its report")
    files.write_json(storage.join(out, _FILE), {"selection": selected.digest, "settings": to_dict(settings)})
    return _tasks(out, plan, selected, settings)


def run_task(out: str, number: int) -> None:
    """Writes one task, unless it is finished. Raises ValueError: an input has changed, or cannot be indexed."""
    plan, selected, settings = _read(out)
    write_one = write_index.write_task if settings.write.layout == "index" else write_arrayrecord.write_group
    write_one(out, plan, selected, settings.write, number)


def finished(out: str) -> int:
    """Number of tasks that are written."""
    _, selected, settings = _read(out)
    return record_files.count_tasks(record_files.directory(out, record_files.build(selected.digest, settings.write)))


def finish(out: str, say: Callable[[str], None] = print) -> manifests.Manifest:
    """Joins what the tasks wrote and writes the manifest; earlier requests for tombstones apply again.
    Raises ValueError: a task is not written."""
    plan, selected, settings = _read(out)
    build = record_files.build(selected.digest, settings.write)
    folder = record_files.directory(out, build)
    parts = [record_files.read_part(folder, task) for task in _tasks(out, plan, selected, settings)]
    if None in parts:
        raise ValueError(
            f"{parts.count(None)} of {len(parts)} tasks are not written, as {parts.index(None)}: write again"
        )
    captions = bool(selection.inputs(out, selected.digest)[:, 2].any())
    if settings.write.layout == "index":
        captions = any(record_files.read_arrays(folder, task)["caption_kinds"].any() for task in range(len(parts)))
    made = publish.publish(out, manifests.Manifest(
        plan=plan.digest, build=build, layout=settings.write.layout, records=selected.kept, captions=captions,
        inputs=tuple(manifests.Input(one.path, one.bytes, one.etag, one.source) for one in plan.inputs),
        shards=tuple(shard for part in parts for shard in part.shards), settings=to_dict(settings),
        sources=selected.sources, evaluation_sets=selected.evaluation_sets, failed_inputs=selected.failed_inputs,
    ))  # fmt: skip
    say(
        f"written     {made.records:,} records in {len(made.shards):,} shards, {made.tombstones.count:,} with a tombstone"
    )
    return made


def _read(out: str) -> tuple[plans.Plan, selection.Selection, Prepare]:
    path = storage.join(out, _FILE)
    found = files.read_json(path, lambda t: (t["selection"], from_dict(t["settings"])), "remove it and write again")
    if not found:
        raise ValueError(f"{path} is missing: run python -m lumos_jax.prepare write --out={out} again")
    return plans.read(out), selection.read(out, found[0]), found[1]


def _tasks(out: str, plan: plans.Plan, selected: selection.Selection, settings: Prepare) -> list[int]:
    if settings.write.layout == "index":
        return list(range(len(plan.tasks)))
    return list(range(len(write_arrayrecord.groups(selection.inputs(out, selected.digest), settings.write).inputs)))
