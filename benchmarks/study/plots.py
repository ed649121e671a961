"""Plots of a figure's panels, as in the paper: scores over training steps, over what is varied, or one beside the other."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable
from typing import Any

from benchmarks.study.results import Interval, interval, lower_is_better, title_of
from benchmarks.study.spec import Cell, Figure, Panel
from lumos_jax import fileio

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")


def draw(reader: Any, figure: Figure, folder: pathlib.Path) -> dict[str, str]:
    """Writes a PNG file for each panel with results; returns panel title -> file name. reader: report.Reader."""
    written = {}
    for number, panel in enumerate(figure.panels, 1):
        columns = [name for name in reader.columns(panel) if name.partition("/")[0] in panel.scores and "/" not in name]
        if columns:
            name = f"study_{figure.key}_{number}.png"
            _draw(reader, panel, columns, folder / name)
            written[panel.title] = name
    return written


def _draw(reader: Any, panel: Panel, columns: list[str], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure as Canvas

    curves = [name for name in panel.curve if any(reader.curve(cell, name) for cell in panel.cells)]
    count = len(curves) + len(columns)
    wide = min(count, 4)
    high = -(-count // wide)
    canvas = Canvas(figsize=(3.3 * wide, 2.7 * high + 0.4), layout="constrained")
    axes = list(canvas.subplots(high, wide, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    lines = list(dict.fromkeys(cell.line for cell in panel.cells))
    colors = {line: _COLORS[i % len(_COLORS)] for i, line in enumerate(lines)}
    for name, ax in zip(curves, axes, strict=False):
        for cell in panel.cells:
            points = reader.curve(cell, name)
            _line(ax, points.keys(), points.values(), colors[cell.line], cell.line)
        ax.set(xlabel="training steps", title=f"{title_of(name).removeprefix('held-out ')}, held-out records")
    for name, ax in zip(columns, axes[len(curves) :], strict=False):
        for line in lines:
            cells = [(cell, list(reader.values(cell, name).values())) for cell in panel.cells if cell.line == line]
            cells = [(cell, interval(values)) for cell, values in cells if values]
            if panel.axis:
                _line(ax, [cell.x for cell, _ in cells], [value for _, value in cells], colors[line], line)
            else:
                _points(ax, lines.index(line), cells, colors[line])
        if panel.axis:
            ax.set(xlabel=panel.axis, xscale="log" if panel.log else "linear")
        else:
            ax.set_xticks(range(len(lines)), lines, rotation=20, ha="right")
        ax.set_title(f"{title_of(name)} ({'lower' if lower_is_better(name) else 'higher'} is better)")
    for ax in axes[:count]:
        ax.title.set_fontsize(9)
        ax.tick_params(labelsize=7)
    if curves or panel.axis:
        axes[0].legend(fontsize=7)
    canvas.suptitle(f"{panel.title}: mean and 95 % interval over seeds", fontsize=10)
    with fileio.replacing(path) as partial:
        canvas.savefig(partial, dpi=90, format="png")


def _line(ax: Any, x: Iterable[float], values: Iterable[Interval], color: str, label: str) -> None:
    """A line of means with a band of intervals."""
    x, values = list(x), list(values)
    ax.plot(x, [value.mean for value in values], marker="o", markersize=3, color=color, label=label)
    if values and not math.isnan(values[0].low):
        ax.fill_between(x, [v.low for v in values], [v.high for v in values], color=color, alpha=0.15)


def _points(ax: Any, place: int, cells: list[tuple[Cell, Interval]], color: str) -> None:
    """A point with its interval for each cell of a line."""
    for _, value in cells:
        reach = 0.0 if math.isnan(value.low) else value.high - value.mean
        ax.errorbar([place], [value.mean], yerr=[reach], marker="o", capsize=4, color=color)
