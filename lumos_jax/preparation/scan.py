"""Scan: every candidate is read, decoded and measured once. One task reads some input files and writes one file of rows.

    DIR/scan/000012.parquet   the rows (preparation/scan_rows.py)
    DIR/scan/000012.json      number and digest of the rows, counts by reason, inputs that failed; written last, when done
    DIR/scan/attempts/        a file for each attempt that is under way; those of killed workers stay

The rows are a function of the plan alone: neither the engine nor the number of workers nor retries change a byte. Scores are
compared first, and what they reject is not decoded. A task whose workers were killed three times looks for the images that do
it, in processes of its own (preparation/quarantine.py); their reason is "crash".
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lumos_jax import fileio
from lumos_jax.data import storage
from lumos_jax.data.decode import ignore_pillow_warnings
from lumos_jax.preparation import candidates, files, joins, plan, quarantine, scan_rows
from lumos_jax.preparation.readers import DamagedInput
from lumos_jax.preparation.settings import Prepare

KILLS = 3  # of a task's workers, after which its images are tried apart


@dataclasses.dataclass(frozen=True)
class Done:
    """What DIR/scan/<task>.json says.

    Attributes:
      read: candidates; with `sample`, more than rows.
      reasons: rows by reason, "" for decoded ones.
      failed: inputs that cannot be read, "path" and "problem".
      seconds: of the task; decode_seconds: of measuring its images, which a sample has fewer of.
      plan: digest of the plan.
    """

    rows: int
    read: int
    sha256: str
    reasons: Mapping[str, int]
    bytes: int
    failed: Sequence[Mapping[str, str]]
    seconds: float
    decode_seconds: float
    plan: str = ""


def tasks(made: plan.Plan) -> range:
    return range(len(made.tasks))


def done(out: str, number: int, plan_digest: str) -> Done | None:
    """What a finished task found; None for one that is not finished. Raises ValueError: its file is damaged, or is of
    another plan."""
    path = _summary(out, number)
    found = files.read_json(path, lambda tree: Done(**tree), "remove it and scan again")
    if found and found.plan != plan_digest:
        folder = storage.join(out, scan_rows.FOLDER)
        raise ValueError(f"{path} is of another plan: remove {folder} and scan again, or give another --out")
    return found


def finished(out: str) -> int:
    """Number of finished tasks."""
    with contextlib.suppress(FileNotFoundError):
        return len(storage.list_files(storage.join(out, scan_rows.FOLDER), "*.json"))
    return 0


def run_task(out: str, number: int) -> None:
    """Scans the inputs of a task, unless it is done. Raises OSError: storage fails; ValueError: an input changed."""
    made, began = plan.read(out), time.monotonic()
    if done(out, number, made.digest) and storage.exists(scan_rows.path(out, number)):
        return
    ignore_pillow_warnings()
    with _attempt(out, number) as killed:
        found, read, failed, decoding = [], 0, [], 0.0
        for given in (made.inputs[i] for i in made.tasks[number]):
            lookup = joins.lookup(out, made.sources[given.source])
            try:
                crashing = quarantine.crashing(out, given.number) if killed >= KILLS else ()
                scanned = candidates.scan_input(made.settings, given, crashing, lookup=lookup)
            except (DamagedInput, OSError) as error:
                if isinstance(error, OSError) and not _is_damage(error):
                    raise
                failed.append({"path": given.path, "problem": str(error)})
                continue
            found += scanned.rows
            read += scanned.read
            decoding += scanned.seconds
        more = {"read": read, "failed": failed, "decode_seconds": round(decoding, 3), "plan": made.digest}
        _write(out, number, found, more, began)


def _is_damage(error: OSError) -> bool:
    """Whether an input is gone or not readable, rather than storage at fault."""
    return error.errno is None or fileio.failure(error, "").__class__ is ValueError


def _write(out: str, number: int, found: list[dict[str, Any]], more: dict[str, Any], began: float) -> None:
    content = files.write_parquet(scan_rows.path(out, number), scan_rows.table(found), compression="zstd")
    reasons = collections.Counter(row["reason"] for row in found)
    size = sum(row["bytes"] for row in found)
    digest, seconds = hashlib.sha256(content).hexdigest(), round(time.monotonic() - began, 3)
    counts = {"reasons": dict(sorted(reasons.items())), "bytes": size}
    summary = Done(rows=len(found), sha256=digest, seconds=seconds, **counts, **more)
    files.write_json(_summary(out, number), dataclasses.asdict(summary))


def _summary(out: str, number: int) -> str:
    return storage.join(out, scan_rows.FOLDER, f"{number:06d}.json")


@contextlib.contextmanager
def _attempt(out: str, number: int) -> Iterator[int]:
    """Marks an attempt while it is under way; yields how many earlier ones were killed."""
    folder = storage.join(out, scan_rows.FOLDER, "attempts")
    marks = f"{number:06d}-*"
    try:
        left = storage.list_files(folder, marks)
    except FileNotFoundError:
        left = []
    own = storage.join(folder, f"{number:06d}-{uuid.uuid4().hex}")
    storage.write_whole(own, b"")
    try:
        yield len(left)
    except BaseException:
        storage.remove(own)
        raise
    for mark in (own, *(entry.path for entry in left)):
        with contextlib.suppress(FileNotFoundError):
            storage.remove(mark)


def finish(out: str, settings: Prepare | None = None) -> list[Done]:
    """What all tasks found.

    settings: whose max_failed_shards counts; default: the plan's.
    Raises ValueError: some are not done or of another plan, or more inputs failed than are allowed.
    """
    made = plan.read(out)
    allowed = (settings or made.settings).max_failed_shards
    found = [done(out, number, made.digest) for number in tasks(made)]
    if missing := [number for number, one in enumerate(found) if one is None]:
        raise ValueError(
            f"{len(missing)} of {len(found)} tasks of the scan are not done, as {missing[0]}: run scan again"
        )
    failed = [one for summary in found for one in summary.failed]
    if len(failed) > allowed * len(made.inputs):
        raise ValueError(
            f"{len(failed)} of {len(made.inputs)} input files cannot be read, more than config.max_failed_shards="
            f"{allowed} allows; the first is {failed[0]['path']}: {failed[0]['problem']}. "
            "Fetch them again and plan with another --out, or raise max_failed_shards"
        )
    return found


def describe(found: Sequence[Done]) -> Iterator[str]:
    """Lines about a whole scan."""
    reasons = sum((collections.Counter(one.reasons) for one in found), collections.Counter())
    total, hours = sum(reasons.values()), sum(one.seconds for one in found) / 3600
    yield f"scanned {total:,} of {sum(one.read for one in found):,} images in {hours:,.2f} core-hours"
    for reason, count in reasons.most_common():
        yield f"  {count:>12,}  {count / total:7.2%}  {reason or 'decoded'}"
    for one in (failed for summary in found for failed in summary.failed):
        yield f"  cannot be read: {one['path']}: {one['problem']}"
