"""The page of a preparation: plain HTML with inline SVG, no script, no request to anywhere. `report` fills it.

Colors: kept and rejected are blue and orange everywhere, which color-blind readers can tell apart.
"""

from __future__ import annotations

import dataclasses
import html
import importlib.resources
import math
from collections.abc import Mapping, Sequence

import numpy as np

KEPT = "kept"
_TICKS = 6
_WIDTH, _HEIGHT, _FOOT = 460, 130, 18  # of a histogram, in its own units; _FOOT: height of the axis labels
_HUES = ("#e07b39", "#b5651d", "#d4a72c", "#a23b3b", "#7c5c9e", "#5b8f6b", "#8a8a8a", "#c05c84", "#3f7f93", "#6b6f2a")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of a sheet. path: relative to the page, "" for one that cannot be shown. note: below it; title: on hovering."""

    path: str
    note: str
    title: str


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Examples of one outcome. count: of all that had it."""

    name: str
    count: int
    pictures: Sequence[Picture]


@dataclasses.dataclass(frozen=True)
class Group:
    """A record that was kept, and what was dropped for it."""

    reason: str
    keeper: Picture
    members: Sequence[Picture]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """The values of one criterion.

    Attributes:
      field: of the settings' criteria. limit: its value. off: whether that rejects nothing. upper: whether it is a maximum.
      edges, counts: (B + 1,), (B,); logarithmic: of the horizontal axis.
      unknown: records without a value, which satisfy the criterion.
      moves: (limit, records that would satisfy all criteria).
      remark: about the moves.
    """

    label: str
    field: str
    limit: float
    off: bool
    upper: bool
    edges: np.ndarray
    counts: np.ndarray
    logarithmic: bool
    unknown: int
    moves: Sequence[tuple[float, int]]
    remark: str = ""


@dataclasses.dataclass(frozen=True)
class Page:
    """Everything on the page. sources: name -> outcome (KEPT or a reason) -> records; facts, timings: rows of tables."""

    title: str
    facts: Sequence[tuple[str, str]]
    sources: Mapping[str, Mapping[str, int]]
    histograms: Sequence[Histogram]
    basis: str  # what the histograms were counted on
    sheets: Sequence[Sheet]
    groups: Sequence[Group]
    problems: Sequence[tuple[str, str, str]]  # file, what, why
    timings: Sequence[Sequence[str]]  # the first row is the head
    forecast: Sequence[Sequence[str]]
    settings: str


def render(page: Page) -> str:
    """The whole page as HTML."""
    sections = [
        ("Sources", _sources(page.sources)),
        ("Criteria", _criteria(page)),
        ("Rejected and kept", "".join(map(_sheet, page.sheets))),
        ("Duplicates", _groups(page.groups)),
        ("Files that failed", _problems(page.problems)),
        ("Time", _table(page.timings)),
        ("Forecast", _table(page.forecast) if page.forecast else ""),
        (
            "Settings",
            f"<details><summary>All settings of this data set</summary><pre>{_text(page.settings)}</pre></details>",
        ),
    ]
    sections = [(name, content) for name, content in sections if content]
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name, _ in sections)
    body = "".join(f'<section id="{_anchor(name)}"><h2>{name}</h2>{content}</section>' for name, content in sections)
    style = importlib.resources.files(__package__).joinpath("page.css").read_text()
    facts = "".join(f"<div><b>{_text(value)}</b><span>{_text(label)}</span></div>" for label, value in page.facts)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{_text(page.title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head><body>'
        f"<header><h1>{_text(page.title)}</h1><nav>{links}</nav></header>"
        f'<div class="facts">{facts}</div>{body}</body></html>\n'
    )


def number(value: float) -> str:
    """A number as people read it: 12,345 or 0.25."""
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def share(part: float, whole: float) -> str:
    """A percentage with digits enough to be no zero."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.1f} %" if percent >= 0.1 or not part else f"{percent:.2g} %"


def _text(value: object) -> str:
    return html.escape(str(value))


def _anchor(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{_text(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _sources(sources: Mapping[str, Mapping[str, int]]) -> str:
    """A bar a source, and the table of counts by source and reason."""
    total: dict[str, int] = {}
    for counts in sources.values():
        for outcome, count in counts.items():
            total[outcome] = total.get(outcome, 0) + count
    reasons = sorted((name for name in total if name != KEPT), key=lambda name: -total[name])
    hue = {KEPT: "var(--kept)"} | {name: _HUES[i % len(_HUES)] for i, name in enumerate(reasons)}
    bars, rows = [], [["source", "candidates", KEPT, *reasons]]
    for name, counts in {**sources, "all": total}.items():
        read = sum(counts.values())
        parts = "".join(
            f'<i style="width:{100 * counts[outcome] / read:.3f}%;background:{hue[outcome]}" '
            f'title="{_text(outcome)}: {counts[outcome]:,} ({share(counts[outcome], read)})"></i>'
            for outcome in (KEPT, *reasons)
            if counts.get(outcome)
        )
        kept = counts.get(KEPT, 0)
        label = f"<span>{_text(name)}</span><div>{parts}</div><span>{share(kept, read)} of {read:,} kept</span>"
        bars.append(f'<div class="bar">{label}</div>')
        cells = [f"{counts.get(reason, 0):,}" if counts.get(reason) else "" for reason in reasons]
        rows.append([name, f"{read:,}", f"{kept:,}", *cells])
    legend = "".join(f'<span><i style="background:{hue[name]}"></i>{_text(name)}</span>' for name in hue)
    return f'<div class="bars">{"".join(bars)}</div><div class="legend">{legend}</div>{_table(rows)}'


def _criteria(page: Page) -> str:
    if not page.histograms:
        return ""
    figures = "".join(
        f"<figure><figcaption><b>{_text(one.label)}</b> <code>criteria.{_text(one.field)}</code> "
        f"{'off' if one.off else ('at most ' if one.upper else 'at least ') + number(one.limit)}"
        f"</figcaption>{_histogram(one)}{_moves(one)}</figure>"
        for one in page.histograms
    )
    return (
        f"<p>{_text(page.basis)} The line is the threshold; heights are square roots of counts, so that few records show, too. "
        "Below each histogram: how many records satisfy all criteria, before duplicates, if the threshold is moved. Change it "
        "in the config and run <code>select</code> and <code>report</code> again: no image is decoded.</p>"
        f'<div class="figures">{figures}</div>'
    )


def _place(one: Histogram, value: float) -> float:
    """Where a value lies on the horizontal axis."""
    low, high = one.edges[0], one.edges[-1]
    if one.logarithmic:
        low, high, value = (math.log(max(one, 1e-9)) for one in (low, high, value))
    return min(max((value - low) / (high - low), 0.0), 1.0) * _WIDTH


def _histogram(one: Histogram) -> str:
    top, parts = max(float(one.counts.max(initial=0)), 1.0), []
    for count, left, right in zip(one.counts, one.edges[:-1], one.edges[1:], strict=True):
        middle = math.sqrt(left * right) if one.logarithmic else (left + right) / 2
        out = not one.off and (middle > one.limit if one.upper else middle < one.limit)
        # A root shows bins of a few records beside those of thousands.
        height = _HEIGHT * math.sqrt(count / top)
        x, end = _place(one, left), _place(one, right)
        parts.append(
            f'<rect class="{"out" if out else "in"}" x="{x:.1f}" y="{_HEIGHT - height:.1f}" '
            f'width="{max(end - x - 0.6, 0.6):.1f}" height="{height:.1f}"><title>{number(left)} to {number(right)}: '
            f"{int(count):,}</title></rect>"
        )
    for tick in _ticks(one):
        x = _place(one, tick)
        anchor = "start" if x < 20 else "end" if x > _WIDTH - 20 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT + _FOOT - 4}" text-anchor="{anchor}">{number(tick)}</text>')
    if not one.off:
        x = _place(one, one.limit)
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="-4" y2="{_HEIGHT + 2}"/>')
    base = f'<line class="base" x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>'
    box = f'viewBox="0 -6 {_WIDTH} {_HEIGHT + _FOOT + 6}" role="img" aria-label="{_text(one.label)}"'
    return f"<svg {box}>{base}{''.join(parts)}</svg>"


def _ticks(one: Histogram) -> list[float]:
    """Round values between the ends."""
    low, high = float(one.edges[0]), float(one.edges[-1])
    if one.logarithmic and high / max(low, 1e-9) > 8:
        steps = [
            m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 3)
        ]
        inside = [step for step in steps if low <= step <= high]
        return inside[:: math.ceil(len(inside) / _TICKS)]
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _moves(one: Histogram) -> str:
    if not one.moves:
        return ""
    now, cells = dict(one.moves)[one.limit], []
    for limit, count in one.moves:
        current = limit == one.limit
        change = "now" if current else f"{count - now:+,}"
        shown = "off" if current and one.off else number(limit)
        kind = ' class="now"' if current else ""
        cells.append(f"<td{kind}><b>{shown}</b>{count:,}<small>{change}</small></td>")
    unknown = f"{one.unknown:,} have no value and pass. " if one.unknown else ""
    remark = f'<p class="remark">{unknown}{_text(one.remark)}</p>' if unknown or one.remark else ""
    return f'<table class="moves"><tr>{"".join(cells)}</tr></table>{remark}'


def _picture(one: Picture, kind: str = "") -> str:
    title = _text(one.title)
    shown = f'<img src="{_text(one.path)}" alt="{title}" loading="lazy">'
    if not one.path:
        shown = f'<div class="none">{_text(one.title.splitlines()[0])}</div>'
    return f'<div class="picture {kind}" title="{title}">{shown}<small>{_text(one.note)}</small></div>'


def _sheet(one: Sheet) -> str:
    kind = KEPT if one.name == KEPT else "rejected"
    shown = "".join(map(_picture, one.pictures))
    some = f", {len(one.pictures)} drawn at random" if len(one.pictures) < one.count else ""
    return (
        f'<h3 class="{kind}">{_text(one.name)} <small>{one.count:,}{some}</small></h3><div class="sheet">{shown}</div>'
    )


def _groups(groups: Sequence[Group]) -> str:
    if not groups:
        return "<p>None was found.</p>"
    shown = "".join(map(_group, groups))
    return f'<p>Left, what was kept; beside it, what was dropped for it.</p><div class="groups">{shown}</div>'


def _group(one: Group) -> str:
    members = "".join(_picture(member, "rejected") for member in one.members)
    return f'<div class="group"><h4>{_text(one.reason)}</h4>{_picture(one.keeper, "kept")}{members}</div>'


def _problems(rows: Sequence[tuple[str, str, str]]) -> str:
    if not rows:
        return "<p>None: every input was read to its end, and no image crashed its decoder.</p>"
    return _table([("file", "what", "why"), *rows])
