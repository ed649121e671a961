"""A scan made of given rows, as if `plan` and `scan` had read files of them."""

import dataclasses
import hashlib
import io
import json
import pathlib

import numpy as np
from pyarrow import parquet

from lumos_jax.preparation import plan, scan, scan_rows
from lumos_jax.preparation.settings import Prepare, Source


def silent(_: str) -> None:
    pass


def settings(root: pathlib.Path, *names: str, **fields) -> Prepare:
    """Sources of .tar files below root/<name>, each file a task."""
    sources = tuple(Source(kind="tars", path=str(root / name), name=name) for name in names)
    return Prepare(sources=sources, task_bytes=1, **fields)


def write(root: pathlib.Path, wanted: Prepare, tasks: list[tuple[str, list[dict]]]) -> str:
    """A directory with a plan and a finished scan; tasks: (source, its rows), those of a source together."""
    for number, (name, _) in enumerate(tasks):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{number:03d}.tar").write_bytes(b"-")
    out = str(root / "out")
    made = plan.make(out, wanted, silent)
    (root / "out" / "scan").mkdir()
    for number, (_, given) in enumerate(tasks):
        table = scan_rows.table(
            [{"input": number, "row": i, "url": f"u{number}-{i}", **row} for i, row in enumerate(given)]
        )
        file = io.BytesIO()
        parquet.write_table(table, file)
        pathlib.Path(scan_rows.path(out, number)).write_bytes(file.getvalue())
        reasons = {row.get("reason", ""): 0 for row in given}
        digest = hashlib.sha256(file.getvalue()).hexdigest()
        done = scan.Done(len(given), len(given), digest, reasons, 0, (), 0.0, 0.0, made.digest)
        (root / "out" / "scan" / f"{number:06d}.json").write_text(json.dumps(dataclasses.asdict(done)))
    return out


def random_row(rng: np.random.Generator, **fields) -> dict:
    """A row that satisfies all criteria."""
    return {
        "sha256": rng.bytes(32), "bytes": 1000, "height": int(rng.integers(256, 300)), "width": int(rng.integers(256, 300)),
        "phash": int(rng.integers(0, 2**64, dtype=np.uint64)), "phash_valid": True, "blur": 10.0, "entropy": 5.0,
        "border": 0.0, "offset": 0, "format": "JPEG", **fields,
    }  # fmt: skip
