"""What `select` writes: which rows of a scan are kept, and why the others are not.

DIR/select/current.json                    {"digest": ...} of the selection that `write` and the report take
DIR/select/<digest>/reasons-<task>.npy     uint8 (rows of the task's scan file,): place in Selection.reasons, 0: kept
DIR/select/<digest>/kept-<task>.npy        uint32, the rows that are kept, ascending
DIR/select/<digest>/inputs.npy             int64 (inputs, 3): records kept of each input, bytes of their images, captioned ones
DIR/select/<digest>/groups.parquet         one row for each duplicate: (task, row), (keeper_task, keeper_row), reason, distance
                                           in bits of the perceptual hash (-1: was not compared)
DIR/select/<digest>/selection.json         the rest; written last
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lumos_jax.data import storage
from lumos_jax.data.manifest import EvaluationSet, SourceCounts

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


def read(out: str, digest: str = "") -> Selection:
    """The selection of that digest, by default the current one. Raises ValueError: there is none."""
    try:
        if not digest:
            digest = json.loads(storage.read(storage.join(out, "select", "current.json")))["digest"]
        tree = json.loads(storage.read(path(out, digest, "selection.json")))
    except FileNotFoundError as error:
        raise ValueError(f"nothing is selected in {out}: python -m lumos_jax.prepare select --out={out}") from error
    if tree["format"] != FORMAT:
        raise ValueError(
            f"{out} has a selection of format {tree['format']}, and this version reads {FORMAT}: select again"
        )
    tree["sources"] = {name: SourceCounts(**one) for name, one in tree["sources"].items()}
    tree["evaluation_sets"] = tuple(EvaluationSet(**one) for one in tree["evaluation_sets"])
    tree["failed_inputs"] = tuple(tree["failed_inputs"])
    return Selection(**tree | {"reasons": tuple(tree["reasons"])})


def write(out: str, selection: Selection) -> None:
    """Write selection.json and make the selection the current one."""
    tree = json.dumps(dataclasses.asdict(selection), indent=2) + "\n"
    storage.write_whole(path(out, selection.digest, "selection.json"), tree.encode())
    make_current(out, selection)


def make_current(out: str, selection: Selection) -> None:
    tree = json.dumps({"digest": selection.digest}) + "\n"
    storage.write_whole(storage.join(out, "select", "current.json"), tree.encode())


def kept(out: str, digest: str, task: int) -> np.ndarray:
    """uint32, the rows of a task's scan file that are kept, ascending."""
    return _array(path(out, digest, f"kept-{task:06d}.npy"))


def reasons(out: str, digest: str, task: int) -> np.ndarray:
    """uint8 (rows of the task's scan file,), codes of Selection.reasons."""
    return _array(path(out, digest, f"reasons-{task:06d}.npy"))


def inputs(out: str, digest: str) -> np.ndarray:
    """int64 (inputs, 3): records kept of each input, bytes of their images, and how many have a caption."""
    return _array(path(out, digest, "inputs.npy"))


def _array(name: str) -> np.ndarray:
    return np.load(io.BytesIO(storage.read(name)))


def array_bytes(array: np.ndarray) -> bytes:
    """The .npy file of an array."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
