"""Tables, verdicts and plots of the results, written into the sections of a page: from the JSON files alone, without runs."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Mapping, Sequence

from benchmarks.study import plots
from benchmarks.study.results import (
    Interval,
    Result,
    difference,
    interval,
    lower_is_better,
    scores_of,
    title_of,
    verdict,
)
from benchmarks.study.runs import Study
from benchmarks.study.spec import Cell, Claim, Figure, Panel, Run
from lumos_jax import fileio

Values = Mapping[int, float]  # by seed
LOSS = "held_out_loss"  # in a result's curve


class Reader:
    """Values of cells over seeds."""

    def __init__(self, study: Study, seeds: Sequence[int]):
        self.study, self.seeds = study, seeds
        self._read: dict[tuple[Run, int], Result | None] = {}

    def result(self, run: Run, seed: int) -> Result | None:
        """Of today's settings."""
        if (run, seed) not in self._read:
            self._read[run, seed] = self.study.result(run, seed)
        return self._read[run, seed]

    def values(self, cell: Cell, score: str) -> Values:
        """Of samples of finished runs, by seed."""
        made = {}
        for seed in self.seeds:
            result = self.result(cell.run, seed)
            for evaluation in self.study.evaluations(cell.run, cell.guidance):
                entry = self.study.scored(result, evaluation)
                if entry is not None and score in (scores := scores_of(entry)):
                    made[seed] = scores[score]
        return made

    def points(self, cell: Cell, score: str) -> dict[int, Values]:
        """Training step -> what was measured of held-out records, by seed."""
        points: dict[int, dict[int, float]] = {}
        for seed in self.seeds:
            result = self.result(cell.run, seed)
            for step, measured in result["curve"].items() if result else ():
                if score in measured:
                    points.setdefault(int(step), {})[seed] = measured[score]
        return dict(sorted(points.items()))

    def curve(self, cell: Cell, score: str) -> dict[int, Interval]:
        """Over training steps."""
        return {step: interval(list(values.values())) for step, values in self.points(cell, score).items()}

    def columns(self, panel: Panel) -> list[str]:
        """Scores that any cell has, `scenes` with its categories; none while there is one cell, which compares nothing."""
        entries = [made for cell in panel.cells if (made := self._entries(cell))]
        if len(entries) < 2:
            return []
        found = [scores_of(entry) for made in entries for entry in made]
        named = dict.fromkeys(name for scores in found for name in scores)
        return [name for score in panel.scores for name in named if name.partition("/")[0] == score]

    def _entries(self, cell: Cell) -> list:
        results = [self.result(cell.run, seed) for seed in self.seeds]
        wanted = self.study.evaluations(cell.run, cell.guidance)
        return [entry for result in results for one in wanted if (entry := self.study.scored(result, one)) is not None]


def section(reader: Reader, figure: Figure, pictures: Mapping[str, str]) -> str:
    """The generated part of a figure's section. pictures: panel title -> file, of those that were drawn."""
    lines = [_state(reader, figure)]
    for panel in figure.panels:
        columns = reader.columns(panel)
        if not columns:
            continue
        lines += ["", f"**{panel.title}**", "", *_table(reader, panel, columns)]
        if panel.base:
            lines += _differences(reader, panel, columns)
        if panel.claims:
            lines += _claims(reader, panel) + _losses(reader, panel)
        if panel.title in pictures:
            lines += ["", f"![{panel.title}]({pictures[panel.title]})"]
        lines += _rates(reader, panel)
    return "\n".join(lines)


def _state(reader: Reader, figure: Figure) -> str:
    runs = {(cell.run, seed) for cell in figure.cells() for seed in reader.seeds}
    done = [result for run, seed in runs if (result := reader.result(run, seed)) is not None]
    if not done:
        return "Not run yet."
    made = sorted({result["machine"] for result in done})
    size = (
        "" if reader.study.scale.size == "desk" else f" These runs check the machinery (`:{reader.study.scale.size}`)."
    )
    seeds = f"{len(reader.seeds)} seeds of each"
    count = (
        f"{len(done)} runs, {seeds}"
        if len(done) == len(runs)
        else f"{len(done)} of {len(runs)} runs ({seeds}) are done"
    )
    return f"{count}, on {', '.join(made)}.{size}"


def _table(reader: Reader, panel: Panel, columns: Sequence[str]) -> list[str]:
    head = [(panel.axis and f", {panel.axis}") or "", *map(_heading, columns)]
    rows = []
    for cell in panel.cells:
        values = [reader.values(cell, score) for score in columns]
        rows.append([cell.label, *(str(interval(list(v.values()))) if v else "-" for v in values)])
    return _markdown([head[0].removeprefix(", "), *head[1:]], rows)


def _heading(score: str) -> str:
    return f"{title_of(score)} {'↓' if lower_is_better(score) else '↑'}"


def _differences(reader: Reader, panel: Panel, columns: Sequence[str]) -> list[str]:
    """Of every line to the base at the same x, paired by seed."""
    bases, rows = {cell.x: cell for cell in panel.cells if cell.line == panel.base}, []
    for cell in panel.cells:
        base = bases.get(cell.x)
        if cell.line == panel.base or base is None:
            continue
        found = [difference(reader.values(cell, score), reader.values(base, score)) for score in columns]
        rows.append([f"{cell.label}", *("-" if one is None else str(one) for one in found)])
    return ["", f"Minus {panel.base}:", "", *_markdown(["", *map(_heading, columns)], rows)] if rows else []


def _claims(reader: Reader, panel: Panel) -> list[str]:
    rows = [[claim.text, title_of(score), *judge(reader, panel, claim, score)]
            for claim in panel.claims for score in claim.scores]  # fmt: skip
    return ["", *_markdown(["claim", "score", "difference", ""], rows)]


def _losses(reader: Reader, panel: Panel) -> list[str]:
    """The same claims by the loss of held-out records, after each of the evaluations on the way."""
    pairs = [[reader.points(panel.cell(place), LOSS) for place in (claim.better, claim.than)] for claim in panel.claims]
    last = max((step for pair in pairs for points in pair for step in points), default=0)
    near = range(last - last // 100, last)  # where rounding puts one more evaluation just before the end
    steps = sorted({step for better, than in pairs for step in better.keys() & than.keys()} - {0, *near})
    rows = []
    for claim, (better, than) in zip(panel.claims, pairs, strict=True):
        gains = [difference(better.get(step, {}), than.get(step, {})) for step in steps]
        rows.append([claim.text, *("-" if gain is None else f"{gain}: {verdict(LOSS, gain)}" for gain in gains)])
    head = ["held-out loss", *(f"after {step} steps" for step in steps)]
    return ["", *_markdown(head, rows)] if steps else []


def judge(reader: Reader, panel: Panel, claim: Claim, score: str) -> tuple[str, str]:
    """The difference that a claim is about, and the verdict."""
    better, than = (reader.values(panel.cell(place), score) for place in (claim.better, claim.than))
    gain = difference(better, than)
    return ("-", "not run yet") if gain is None else (str(gain), verdict(score, gain))


def _rates(reader: Reader, panel: Panel) -> list[str]:
    """Which learning rates were tried, and what they gave."""
    lines, seen = [], []
    for cell in panel.cells:
        tuned = cell.run.tuned
        tried = reader.study.tried(tuned)
        if tuned in seen or not tried:
            continue
        seen.append(tuned)
        losses = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tried.items())
        chosen = reader.study.rate(tuned)
        lines.append(f"{tuned.title} {losses}" + (f" (taken: {chosen:g})" if chosen else ""))
    steps = reader.study.scale.trial_steps
    return ["", f"Held-out loss after {steps} steps by learning rate: {'; '.join(lines)}."] if lines else []


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def write(
    study: Study, figures: Mapping[str, Figure], seeds: Sequence[int], page: pathlib.Path, out: pathlib.Path
) -> list[str]:
    """Writes `out`: `page` with the generated part of each of the figures, and plots beside it; returns the figures' texts.

    Raises:
      ValueError: the page has no place for a figure.
    """
    text, parts, reader = page.read_text(encoding="utf-8"), [], Reader(study, seeds)
    draws = importlib.util.find_spec("matplotlib") is not None
    for key, figure in figures.items():
        pictures = plots.draw(reader, figure, out.parent) if draws else {}
        made = section(reader, figure, pictures)
        begin, end = f"<!-- figure {key} -->", f"<!-- end of figure {key} -->"
        pattern = re.compile(rf"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page} has no place for figure {key}: write {begin} and {end} into it")
        text = pattern.sub(lambda _, made=made, begin=begin, end=end: f"{begin}\n{made}\n{end}", text)
        parts.append(f"Figure {key}: {figure.title}\n\n{made}\n")
    fileio.write_whole(out, text)
    if not draws:
        parts.append("No plots: they need Matplotlib (pip install '.[plots]')\n")
    return parts
