"""What `select` writes: which rows of a scan are kept, and why the others are not.

DIR/select/current.json                    {"digest": ...} of the selection that `write` and `report` use
DIR/select/<digest>/reasons-<task>.npy     uint8 (rows of the task's scan file,): place in Selection.reasons, 0: kept
DIR/select/<digest>/kept-<task>.npy        uint32, the rows that are kept, ascending
DIR/select/<digest>/inputs.npy             int64 (inputs, 3): records kept of each input, bytes of their images, captioned ones
DIR/select/<digest>/groups.parquet         one row for each duplicate: (task, row), (keeper_task, keeper_row), reason, distance
                                           in bits of the perceptual hash (-1: was not compared)
DIR/select/<digest>/selection.json         the rest; written last
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lumos_jax.config.fields import flatten_settings
from lumos_jax.data import storage
from lumos_jax.data.manifest import EvaluationSet, SourceCounts
from lumos_jax.preparation import files
from lumos_jax.preparation.settings import Prepare, from_dict, to_dict

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Selection:
    """digest: of the scan and of the settings that decide; plan: of the plan. settings: those that decide.
    reasons: by code. rows, kept: how many there are, and are kept. failed_inputs: those that the scan could not read."""

    digest: str
    plan: str
    settings: Mapping[str, Any]
    reasons: tuple[str, ...]
    rows: int
    kept: int
    sources: Mapping[str, SourceCounts]
    evaluation_sets: tuple[EvaluationSet, ...] = ()
    failed_inputs: tuple[Mapping[str, str], ...] = ()
    format: int = FORMAT


def path(out: str, digest: str, *names: str) -> str:
    return storage.join(out, "select", digest, *names)


def decisive(settings: Prepare) -> dict[str, Any]:
    """The settings that decide which rows are kept."""
    tree = to_dict(settings)
    kept = {name: tree[name] for name in ("criteria", "duplicates", "decontamination")}
    del kept["duplicates"]["partitions"]
    kept["sources"] = [
        {"name": one.label, "priority": one.priority, "max_records": one.max_records} for one in settings.sources
    ]
    if any(one.max_records for one in settings.sources):
        kept["seed"] = settings.write.seed
    return kept


def settings(planned: Prepare, selected: Selection) -> Prepare:
    """The plan's settings, with those of the selection."""
    tree = to_dict(planned)
    for name in ("criteria", "duplicates", "decontamination"):
        tree[name] |= selected.settings[name]
    for source, own in zip(tree["sources"], selected.settings["sources"], strict=True):
        source |= {name: own[name] for name in ("priority", "max_records")}
    tree["write"]["seed"] = selected.settings.get("seed", planned.write.seed)
    return from_dict(tree)


def check(out: str, plan: str, selected: Selection, wanted: Prepare) -> None:
    """Raises ValueError: the selection is of another plan (digest), or of other settings that decide what is kept."""
    if selected.plan != plan:
        raise ValueError(f"the selection in {out} is of another plan: select again")
    before, now = (flatten_settings(json.loads(json.dumps(tree))) for tree in (selected.settings, decisive(wanted)))
    changed = [n for n in sorted(before | now) if before.get(n) != now.get(n)]
    if changed:
        text = "; ".join(f"config.{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise ValueError(f"{out} has a selection by other settings: {text}. Run select with these, or leave them out")


def read(out: str, digest: str = "") -> Selection:
    """The selection of that digest, by default the current one. Raises ValueError: there is none, or it is damaged."""
    remedy = "remove it and select again"
    if not digest:
        digest = files.read_json(_current(out), lambda tree: tree["digest"], remedy) or "none"
    found = files.read_json(path(out, digest, "selection.json"), _parse, remedy)
    if found is None:
        raise ValueError(f"nothing is selected in {out}: run python -m lumos_jax.prepare select --out={out} first")
    return found


def _parse(tree: dict[str, Any]) -> Selection:
    if tree["format"] != FORMAT:
        raise ValueError(f"format {tree['format']}, and this version reads {FORMAT}")
    tree["sources"] = {name: SourceCounts(**one) for name, one in tree["sources"].items()}
    tree["evaluation_sets"] = tuple(EvaluationSet(**one) for one in tree["evaluation_sets"])
    tree["failed_inputs"] = tuple(tree["failed_inputs"])
    return Selection(**tree | {"reasons": tuple(tree["reasons"])})


def write(out: str, selection: Selection) -> None:
    """Write selection.json and make the selection the current one."""
    files.write_json(path(out, selection.digest, "selection.json"), dataclasses.asdict(selection))
    make_current(out, selection)


def make_current(out: str, selection: Selection) -> None:
    storage.write_whole(_current(out), (json.dumps({"digest": selection.digest}) + "\n").encode())


def _current(out: str) -> str:
    return storage.join(out, "select", "current.json")


def kept(out: str, digest: str, task: int) -> np.ndarray:
    """uint32, the rows of a task's scan file that are kept, ascending."""
    return files.read_npy(path(out, digest, f"kept-{task:06d}.npy"), _remedy(out, digest))


def reasons(out: str, digest: str, task: int) -> np.ndarray:
    """uint8 (rows of the task's scan file,), codes of Selection.reasons."""
    return files.read_npy(path(out, digest, f"reasons-{task:06d}.npy"), _remedy(out, digest))


def inputs(out: str, digest: str) -> np.ndarray:
    """int64 (inputs, 3): records kept of each input, bytes of their images, and how many have a caption."""
    return files.read_npy(path(out, digest, "inputs.npy"), _remedy(out, digest))


def groups(out: str, digest: str, limit: int) -> Any:
    """Rows of groups.parquet as a pyarrow.Table: all, or those of tasks drawn at random until there are `limit`."""
    from pyarrow import parquet

    name = path(out, digest, "groups.parquet")
    with files.readable(name, _remedy(out, digest)), storage.open_read(name) as file:
        opened, chosen, rows = parquet.ParquetFile(file), [], 0
        for number in np.random.default_rng(0).permutation(opened.num_row_groups).tolist():
            if rows < limit:
                chosen.append(number)
                rows += opened.metadata.row_group(number).num_rows
        return opened.read_row_groups(sorted(chosen), use_threads=False)


def _remedy(out: str, digest: str) -> str:
    return f"remove {path(out, digest)} and select again"
