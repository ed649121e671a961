"""Writes the selected records as a prepared data set (data/manifest.py): tasks that know nothing of each other, then the end.

`tasks` numbers them, `run_task` does one in any process, once or again, and `finish` joins what they wrote and writes the
manifest. Bytes depend on the scan, the selection and config.write alone. What an earlier selection wrote stays readable until
the new manifest takes its place, and after that can be removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from lumos_jax.data import manifest as manifests
from lumos_jax.data import storage
from lumos_jax.preparation import compacted, indexed, layout, publish, selection
from lumos_jax.preparation import plan as plans
from lumos_jax.preparation.settings import Prepare, from_dict, to_dict

_FILE = "write.json"


def tasks(out: str, settings: Prepare) -> list[int]:
    """Numbers for `run_task`, which writes the current selection with these settings: DIR/write.json keeps both.
    Raises ValueError: nothing is selected, or no record is."""
    plan, selected = plans.read(out), selection.read(out)
    if selected.plan != plan.digest:
        raise ValueError(f"the selection in {out} is of another plan: select again")
    if not selected.kept:
        raise ValueError(f"the selection in {out} keeps none of {selected.rows:,} records: see its report")
    tree = {"selection": selected.digest, "settings": to_dict(settings)}
    content = (json.dumps(tree, indent=1) + "\n").encode()
    path = storage.join(out, _FILE)
    if not storage.exists(path) or storage.read(path) != content:
        storage.write_whole(path, content)
    return _tasks(out, selected, settings)


def run_task(out: str, number: int) -> None:
    """Writes one task; one that is whole is left as it is. Raises ValueError: an input has changed, or cannot be indexed."""
    plan, selected, settings = _read(out)
    write_one = indexed.write_task if settings.write.layout == "index" else compacted.write_group
    write_one(out, plan, selected, settings.write, number)


def finished(out: str) -> int:
    """Number of tasks that are written."""
    _, selected, settings = _read(out)
    try:
        return layout.count_tasks(layout.directory(out, layout.build(selected.digest, settings.write)))
    except FileNotFoundError:
        return 0


def finish(out: str, say: Callable[[str], None] = print) -> manifests.Manifest:
    """Joins what the tasks wrote and writes the manifest; what was taken out before has its tombstones again.
    Raises ValueError: a task is not written."""
    plan, selected, settings = _read(out)
    build = layout.build(selected.digest, settings.write)
    folder = layout.directory(out, build)
    parts = [layout.read_part(folder, task) for task in _tasks(out, selected, settings)]
    if None in parts:
        raise ValueError(
            f"{parts.count(None)} of {len(parts)} tasks are not written, as {parts.index(None)}: write again"
        )
    captions = bool(selection.inputs(out, selected.digest)[:, 2].any())
    if settings.write.layout == "index":
        captions = any(layout.read_arrays(folder, task)["caption_kinds"].any() for task in range(len(parts)))
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
    try:
        tree = json.loads(storage.read(storage.join(out, _FILE)))
    except FileNotFoundError:
        raise ValueError(
            f"{out} has no {_FILE}: python -m lumos_jax.prepare write --out={out} begins with it"
        ) from None
    return plans.read(out), selection.read(out, tree["selection"]), from_dict(tree["settings"])


def _tasks(out: str, selected: selection.Selection, settings: Prepare) -> list[int]:
    if settings.write.layout == "index":
        return list(range(len(plans.read(out).tasks)))
    return list(range(len(compacted.groups(selection.inputs(out, selected.digest), settings.write).inputs)))
