"""The report of a preparation, DIR/report/index.html: what was kept and rejected, why, and what other thresholds would do.

Counts are exact. Histograms, thresholds and contact sheets come from scan files drawn at random, up to _ROWS records, so that a
report takes minutes at any size. Which records are shown is decided by a hash of their content, not by the engine.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from lumos_jax.data import storage
from lumos_jax.preparation import criteria, forecast, histograms, page, plan, scan, scan_rows, selection, settings
from lumos_jax.preparation.page import Group, Picture, Sheet
from lumos_jax.preparation.readers import READERS, DamagedInput

_ROWS = 1_000_000  # of the scan, that are read
_SHOWN, _GROUPS, _MEMBERS = 30, 12, 6  # pictures of a sheet, groups of each kind of duplicates, members of a group
_SIDE = 192  # pixels, of a thumbnail
_SEED = 0
_DUPLICATES = (criteria.EXACT, criteria.NEAR, criteria.SEMANTIC)


def write(out: str, wanted: settings.Prepare, say: Callable[[str], None]) -> str:
    """Write the page about the current selection and return its path.

    Args:
      out: a directory with a plan, a scan and a selection.
      wanted: settings; those that decide what is kept must be the selection's.
      say: called with lines of progress.

    Raises:
      ValueError: nothing is selected yet, or by other settings. OSError: storage.
    """
    made, chosen = plan.read(out), selection.read(out)
    selection.check(out, made.digest, chosen, wanted)
    sample = _Rows.sample(out, made, chosen)
    say(f"report      {len(sample.table):,} of {chosen.rows:,} records are looked at")
    thumbnails = _Thumbnails(out, made)
    sheets = _sheets(sample, chosen, thumbnails)
    groups = _groups(out, chosen, thumbnails)
    thumbnails.write(say)
    scale = chosen.rows / max(len(sample.table), 1)
    looked_at = f"{len(sample.table):,} records of {len(sample.tasks)} scan files"
    few = "" if scale == 1 else f"Of {looked_at} drawn at random, scaled to all."
    done = scan.finish(out, wanted)
    content = page.Page(
        title=f"Preparation of {out}",
        facts=_facts(out, chosen),
        sources={name: {page.KEPT: one.kept, **one.reasons} for name, one in chosen.sources.items()},
        histograms=histograms.histograms(sample.table, chosen.reasons, wanted.criteria, made.settings.criteria, scale),
        basis=few,
        sheets=sheets,
        groups=groups,
        problems=_problems(chosen, done),
        timings=_timings(made, done),
        forecast=_forecast(made, done, selection.inputs(out, chosen.digest), wanted),
        settings=json.dumps(settings.to_dict(wanted), indent=2),
    )
    path = storage.join(out, "report", "index.html")
    storage.write_whole(path, page.render(content).encode())
    return path


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of some scan files. codes: (N,) of the selection's reasons."""

    tasks: list[int]
    table: Any
    codes: np.ndarray

    @classmethod
    def sample(cls, out: str, made: plan.Plan, chosen: selection.Selection) -> _Rows:
        """Whole scan files in a seeded order, until there are _ROWS rows."""
        import pyarrow

        tables, tasks, codes, rows = [], [], [], 0
        for task in map(int, np.random.default_rng(_SEED).permutation(len(made.tasks))):
            if rows and rows + len(tables[-1]) > _ROWS:
                break
            tables.append(scan_rows.read(out, task))
            codes.append(selection.reasons(out, chosen.digest, task))
            tasks.append(task)
            rows += len(tables[-1])
        return cls(tasks, pyarrow.concat_tables(tables).combine_chunks(), np.concatenate(codes))


def _sheets(sample: _Rows, chosen: selection.Selection, thumbnails: _Thumbnails) -> list[Sheet]:
    """What was kept, then each reason, the most frequent first. Duplicates are shown as groups."""
    counts = {page.KEPT: chosen.kept} | _reason_counts(chosen)
    names = sorted(counts, key=lambda name: (name != page.KEPT, -counts[name]))
    # The content decides, so that the same records are shown whatever task they are in.
    places = np.array([int.from_bytes(digest[:8], "big") for digest in sample.table["sha256"].to_pylist()], np.uint64)
    sheets = []
    for name in names:
        code = 0 if name == page.KEPT else chosen.reasons.index(name)
        found = np.flatnonzero(sample.codes == code)
        if name in _DUPLICATES or not len(found):
            continue
        shown = found[np.argsort(places[found], kind="stable")[:_SHOWN]]
        entries = sample.table.take(shown)
        measured = histograms.values(entries, name) if name in histograms.NAMES else None
        pictures = []
        for i, entry in enumerate(entries.to_pylist()):
            note = _size(entry) if measured is None else f"{name} {page.number(float(measured[i]))}"
            pictures.append(thumbnails.picture(entry, note))
        sheets.append(Sheet(name, counts[name], pictures))
    return sheets


def _groups(out: str, chosen: selection.Selection, thumbnails: _Thumbnails) -> list[Group]:
    """Groups drawn at random, of each kind of duplicates: the record that was kept, and those dropped for it."""
    members = selection.groups(out, chosen.digest, _ROWS).to_pylist()
    by_keeper: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for member in members:
        if member["keeper_row"] >= 0:
            by_keeper.setdefault((member["reason"], member["keeper_task"], member["keeper_row"]), []).append(member)
    rng, drawn = np.random.default_rng(_SEED), []
    for reason, number in zip((criteria.NEAR, criteria.SEMANTIC, criteria.EXACT), (_GROUPS, _GROUPS, 3), strict=True):
        keys = sorted(key for key in by_keeper if key[0] == reason)
        drawn += [keys[i] for i in sorted(rng.permutation(len(keys))[:number])]
    wanted = {key[1:] for key in drawn}
    wanted |= {(member["task"], member["row"]) for key in drawn for member in by_keeper[key][:_MEMBERS]}
    entries = {}
    for task in sorted({task for task, _ in wanted}):
        places = sorted(row for one, row in wanted if one == task)
        for row, entry in zip(places, scan_rows.read(out, task).take(places).to_pylist(), strict=True):
            entries[task, row] = entry
    groups = []
    for key in drawn:
        shown = by_keeper[key][:_MEMBERS]
        pictures = []
        for member in shown:
            entry = entries[member["task"], member["row"]]
            pictures.append(thumbnails.picture(entry, _size(entry) + _bits(member["distance"])))
        keeper = entries[key[1:]]
        groups.append(Group(_words(key[0]), thumbnails.picture(keeper, f"kept, {_size(keeper)}"), pictures))
    return groups


def _bits(distance: int) -> str:
    return f", {distance} bits" if distance > 0 else ", same hash" if distance == 0 else ""


def _words(reason: str) -> str:
    return reason.replace("_", " ")


def _size(entry: dict[str, Any]) -> str:
    if entry["height"]:
        return f"{entry['width']} x {entry['height']}"
    return f"{entry['bytes']:,} bytes"


class _Thumbnails:
    """Thumbnails of the records on the page. They are read at the end, input by input."""

    def __init__(self, out: str, made: plan.Plan):
        self._out, self._plan = out, made
        self._wanted: dict[int, dict[str, dict[str, Any]]] = {}  # input -> name -> row of the scan
        self._failed: set[str] = set()

    def picture(self, entry: dict[str, Any], note: str) -> Picture:
        source = self._plan.inputs[entry["input"]]
        name = f"images/{entry['sha256'][:8].hex()}.jpg"
        if entry["reason"] not in (scan_rows.UNDECODABLE, scan_rows.CRASH):
            self._wanted.setdefault(entry["input"], {})[name] = entry
        else:
            name = ""
        about = (f"{source.source}: {entry['key']}", entry["url"], source.path, entry["caption"][:200])
        lines = (*about, f"{entry['bytes']:,} bytes")
        return Picture(name, note, "\n".join(line for line in lines if line))

    def write(self, say: Callable[[str], None]) -> None:
        """Write the thumbnails. Those of inputs that have gone are left out: the page shows no image in their place."""
        lost = 0
        for number, wanted in sorted(self._wanted.items()):
            given, entries = self._plan.inputs[number], sorted(wanted.items(), key=lambda item: item[1]["row"])
            places = [(entry["row"], entry["offset"], entry["bytes"]) for _, entry in entries]
            try:
                for (name, _), content in zip(entries, READERS[given.kind].images(given, places), strict=True):
                    lost += not self._save(name, content)
            except (DamagedInput, OSError) as error:
                say(f"{given.path} is not shown: {error}")
        if lost:
            say(f"{lost} images of the page could not be decoded")

    def _save(self, name: str, content: bytes) -> bool:
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.draft("RGB", (_SIDE, _SIDE))
                image = ImageOps.exif_transpose(image).convert("RGB")
                image.thumbnail((_SIDE, _SIDE))
        except (OSError, ValueError, Image.DecompressionBombError):
            return False
        file = io.BytesIO()
        image.save(file, "JPEG", quality=82)
        storage.write_whole(storage.join(self._out, "report", name), file.getvalue())
        return True


def _reason_counts(chosen: selection.Selection) -> collections.Counter[str]:
    return sum((collections.Counter(source.reasons) for source in chosen.sources.values()), collections.Counter())


def _facts(out: str, chosen: selection.Selection) -> list[tuple[str, str]]:
    counts = _reason_counts(chosen)
    size = int(selection.inputs(out, chosen.digest)[:, 1].sum())
    return [
        ("candidates", f"{chosen.rows:,}"),
        ("kept", f"{chosen.kept:,}"),
        ("share kept", page.share(chosen.kept, chosen.rows)),
        ("images kept", _bytes(size)),
        ("duplicates", f"{sum(counts[reason] for reason in _DUPLICATES):,}"),
        ("evaluation images", f"{counts[criteria.CONTAMINATED]:,}"),
        ("undecodable", f"{counts[scan_rows.UNDECODABLE]:,}"),
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 3600:,.3g} h"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def _problems(chosen: selection.Selection, done: Sequence[scan.Done]) -> list[tuple[str, str, str]]:
    failed = [(one["path"], "not used", one["problem"]) for summary in done for one in summary.failed]
    crashes = {label: source.reasons.get(scan_rows.CRASH, 0) for label, source in chosen.sources.items()}
    return failed + [(label, f"{count:,} images", "crash their decoder") for label, count in crashes.items() if count]


def _timings(made: plan.Plan, done: Sequence[scan.Done]) -> list[list[str]]:
    """What the scan took, by source."""
    table = [["scan of", "tasks", "images", "bytes", "core time", "images a second and core"]]
    for label in (*made.totals, "all"):
        own = [done[task] for task, inputs in enumerate(made.tasks) if label in (made.inputs[inputs[0]].source, "all")]
        seconds, read = sum(one.seconds for one in own), sum(one.read for one in own)
        size = sum(one.bytes for one in own)
        rate = f"{read / max(seconds, 1e-3):,.0f}"
        table.append([label, f"{len(own):,}", f"{read:,}", _bytes(size), _duration(seconds), rate])
    return table


def _forecast(
    made: plan.Plan, done: Sequence[scan.Done], kept: np.ndarray, wanted: settings.Prepare
) -> list[list[str]]:
    """The table of a sample's forecast; empty where everything was prepared."""
    if made.settings.sample == made.settings.sample_inputs == 1:
        return []
    names = ("source", "input files", "to read", "candidates", "kept", "images kept", "core time of the scan")
    table = [[*names, "scan", "storage a month"]]
    for one in forecast.make(made, done, kept):
        scanning, storing = one.dollars(wanted.prices)
        counts = [f"{one.files:,.0f}", _bytes(one.read_bytes), f"{one.candidates:,.0f}", f"{one.kept:,.0f}"]
        numbers = [*counts, _bytes(one.kept_bytes)]
        table.append([one.source, *numbers, _duration(3600 * one.core_hours), f"${scanning:,.2f}", f"${storing:,.2f}"])
    return table
