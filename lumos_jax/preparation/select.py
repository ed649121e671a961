"""Selects rows of a scan: criteria, evaluation sets, duplicates and caps. Reads rows only; no image is read or decoded again.

    screen     each chunk of scan files: criteria and evaluation sets; remaining rows are partitioned by hash prefix
    collapse   each partition: equal files, then equal perceptual hashes; the best row of each group remains
    drop_near  hamming.py over all remaining perceptual hashes, then duplicates.keepers
    semantic   semantic.py, where features are given
    cap        of each source with max_records, the records of the lowest hash of (seed, sha256)
    finish     each chunk: kept rows, reasons, counts, groups

Of duplicates the row of the source with the highest priority is kept, then the largest area, the highest aesthetic score, the
lowest identity (task, row). Steps run in several processes; the result does not depend on chunks, partitions and processes.

Memory: a process holds a chunk (ROWS_OF_CHUNK rows) or a partition (43 bytes a row and as much again to sort it), 0.7 GB at
most; the first process all pairs of near hashes, 90 bytes each. Files in the scratch directory: 43 bytes a row, 32 for
each different perceptual hash, 8 more for each while tables are made, 6 a row for decisions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lumos_jax.data import storage
from lumos_jax.data.manifest import EvaluationSet, SourceCounts
from lumos_jax.preparation import (
    criteria,
    decontamination,
    engines,
    files,
    images,
    scan,
    select_steps,
    selection,
    semantic,
)
from lumos_jax.preparation import plan as plans
from lumos_jax.preparation.settings import Prepare

ROWS_OF_CHUNK = 2_000_000
ROWS_OF_PARTITION = 4_000_000


def run(out: str, settings: Prepare, workers: int = 1, say: Callable[[str], None] = print) -> selection.Selection:
    """Selects rows of the scan in `out`, and makes that the current selection. One that was made before is taken again.

    workers: processes.
    Raises ValueError: the scan is not finished, a criterion is looser than the scan's, an evaluation set cannot be read, or
    another process is selecting.
    """
    plan = plans.read(out)
    if changed := plans.frozen_changes(plan.settings, settings):
        raise ValueError(plans.refusal(out, changed))
    files.lock(out)
    scanned = scan.finish(out, settings)
    sets = _evaluation_sets(out, settings, say)
    decisive = selection.decisive(settings)
    content = [plan.digest, decisive, [one.sha256 for one in scanned], [dataclasses.asdict(one) for one, _ in sets]]
    if settings.duplicates.embeddings:
        content.append(semantic.identity(settings.duplicates))
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    with contextlib.suppress(ValueError):
        done = selection.read(out, digest)
        selection.make_current(out, done)
        say(f"selected before: {done.kept:,} of {done.rows:,} records")
        return done
    with _scratch(out, digest) as scratch, engines.processes(workers) as step:
        job = _job(out, scratch, digest, settings, plan, scanned)
        hashes = decontamination.merged(one for _, one in sets)
        np.savez(job.file("evaluation.npz"), phash=hashes.phash, sha256=hashes.sha256)
        left = sum(step(select_steps.screen, [(job, number) for number in range(len(job.chunks))]))
        say(f"criteria    {left:,} of {job.starts[-1]:,} records left")
        dropped = sum(step(select_steps.collapse, [(job, number) for number in range(1 << job.bits)]))
        say(f"duplicates  {dropped:,} equal files and equal perceptual hashes")
        if settings.duplicates.phash_distance > 0:
            say(f"near        {select_steps.drop_near(job, step):,} within {settings.duplicates.phash_distance} bits")
        if settings.duplicates.embeddings:
            say(f"semantic    {semantic.drop(job, step):,} with a cosine of {settings.duplicates.min_cosine} or more")
        select_steps.cap(job, step)
        made = _finish(job, step, plan, decisive, [one for one, _ in sets])
        made = dataclasses.replace(made, failed_inputs=tuple(one for task in scanned for one in task.failed))
    selection.write(out, made)
    say(f"kept        {made.kept:,} of {made.rows:,} records")
    return selection.read(out, digest)


def _evaluation_sets(
    out: str, settings: Prepare, say: Callable[[str], None]
) -> list[tuple[EvaluationSet, decontamination.EvaluationHashes]]:
    sets = []
    for path in settings.decontamination.sets:
        try:
            hashes = decontamination.read(path, _phash_of, storage.join(out, "evaluation"))
        except FileNotFoundError:
            raise ValueError(f"config.decontamination.sets: {path} is not there") from None
        count = max(len(hashes.phash), len(hashes.sha256))
        if not count:
            raise ValueError(f"config.decontamination.sets: {path} holds no hashes")
        say(f"evaluation  {path}: {count:,} images")
        sets.append((EvaluationSet(path, hashes.digest(), count), hashes))
    return sets


def _phash_of(content: bytes) -> int | None:
    measured = images.measure(content)
    return measured.phash if measured.phash_valid else None


@contextlib.contextmanager
def _scratch(out: str, digest: str) -> Iterator[str]:
    """A local directory, empty; what a killed process left in that of a local `out` is removed."""
    if storage.is_remote(out):
        with tempfile.TemporaryDirectory(prefix="lumos_jax_select_") as scratch:
            yield scratch
        return
    scratch = pathlib.Path(selection.path(out, digest), "scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield os.fspath(scratch)
    finally:
        shutil.rmtree(scratch)


def _job(
    out: str, scratch: str, digest: str, settings: Prepare, plan: Any, scanned: Sequence[scan.Done]
) -> select_steps.Job:
    starts = np.cumsum([0, *(one.rows for one in scanned)])
    if starts[-1] >= 2**32 - 1:
        raise ValueError(
            f"{starts[-1]:,} rows are too many for one selection: prepare the sources in several directories"
        )
    own = {reason for one in scanned for reason in one.reasons} - {""} - set(criteria.REASONS)
    labels = [source.label for source in settings.sources]
    ranked = sorted({source.priority for source in settings.sources}, reverse=True)
    partitions = settings.duplicates.partitions or -(-int(starts[-1]) // ROWS_OF_PARTITION)
    job = select_steps.Job(
        out, scratch, digest, settings, ("", *sorted(own), *criteria.REASONS), starts, _chunks(starts),
        max(1, partitions - 1).bit_length(), tuple(labels),
        np.array([ranked.index(source.priority) for source in settings.sources], np.uint64),
        np.array([labels.index(one.source) for one in plan.inputs], np.uint16),
    )  # fmt: skip
    for name, kind in (("reasons", np.uint8), ("distance", np.uint8), ("keeper", np.uint32)):
        files.new_array(job.file(f"{name}.npy"), kind, int(starts[-1]))
    return job


def _chunks(starts: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Tasks that are read together."""
    chunks, begun = [], 0
    for task in range(len(starts) - 1):
        if not chunks or starts[task + 1] - begun > ROWS_OF_CHUNK:
            chunks.append([])
            begun = starts[task]
        chunks[-1].append(task)
    return tuple(map(tuple, chunks))


def _finish(
    job: select_steps.Job,
    step: engines.Run,
    plan: plans.Plan,
    decisive: Mapping[str, Any],
    sets: Sequence[EvaluationSet],
) -> selection.Selection:
    """Writes the files of all tasks and groups.parquet."""
    import pyarrow.parquet

    results = list(step(select_steps.finish, [(job, chunk) for chunk in range(len(job.chunks))]))
    counts, inputs = (sum(parts) for parts in zip(*results, strict=True))
    names = [job.file(f"groups-{chunk:06d}.parquet") for chunk in range(len(job.chunks))]
    with (
        storage.replacing(selection.path(job.out, job.digest, "groups.parquet")) as partial,
        pyarrow.parquet.ParquetWriter(partial, pyarrow.parquet.read_schema(names[0])) as file,
    ):
        for chunk in map(pyarrow.parquet.ParquetFile, names):
            for number in range(chunk.num_row_groups):
                file.write_table(chunk.read_row_group(number))
    files.write_npy(selection.path(job.out, job.digest, "inputs.npy"), inputs)
    sources = {
        label: SourceCounts(
            int(row.sum()), int(row[0]),
            {name: int(count) for name, count in zip(job.reasons[1:], row[1:], strict=True) if count},
        ) for label, row in zip(job.sources, counts, strict=True)
    }  # fmt: skip
    return selection.Selection(
        job.digest, plan.digest, decisive, job.reasons, int(counts.sum()), int(counts[:, 0].sum()), sources, tuple(sets)
    )
