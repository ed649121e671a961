"""Reports of one or several scored sets of samples: Markdown, JSON, and curves over training steps as PNG files.

Differences are between each directory and the first, paired item by item (or block by block), and only where both are of the
same list and seed; otherwise both runs' errors would be needed, and a difference says less.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lumos_jax import fileio
from lumos_jax.evaluation import intervals, scoring
from lumos_jax.evaluation.intervals import Estimate

_PAIRED = ("list_digest", "seed", "num")  # what two sets must share


def make(directories: Sequence[str]) -> dict[str, Any]:
    """The content of a report's JSON file: `runs`, one entry a directory with its samples and scores, and `differences` to the
    first, or why there are none.

    Raises:
      ValueError: a directory has no scores.
    """
    loaded = [scoring.load(directory) for directory in directories]
    runs = [{"directory": str(where), **content} for where, (content, _) in zip(directories, loaded, strict=True)]
    differences = []
    for where, (content, estimates) in zip(directories[1:], loaded[1:], strict=True):
        first, base = loaded[0]
        entry: dict[str, Any] = {"directory": str(where), "from": str(directories[0]), "scores": {}}
        other = [key for key in _PAIRED if content["samples"].get(key) != first["samples"].get(key)]
        if other:
            entry["unpaired"] = f"the two differ in {', '.join(other)}"
        else:
            for name in (name for name in base if name in estimates):
                if _made_alike(first["scores"][name], content["scores"][name]):
                    entry["scores"][name] = _numbers(intervals.difference(estimates[name], base[name]))
        differences.append(entry)
    return {"runs": runs, "differences": differences}


def _made_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(a.get(key) == b.get(key) for key in ("network", "reference", "num"))


def _numbers(estimate: Estimate) -> dict[str, float | None]:
    return {field: getattr(estimate, field) for field in ("value", "corrected", "error", "low", "high")}


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of a report."""
    runs, lines = content["runs"], ["# Scores", ""]
    names = list(dict.fromkeys(name for run in runs for name in run["scores"]))
    lines += [
        "Values with 95 % intervals; after an arrow, without the bias of few samples, which the interval is around.",
        "",
    ]
    lines += _table(
        ["score", *(run["directory"] for run in runs)],
        [[name, *(_cell(run["scores"].get(name)) for run in runs)] for name in names],
    )
    for entry in content["differences"]:
        lines += ["", f"## {entry['directory']} minus {entry['from']}", ""]
        if "unpaired" in entry:
            lines.append(f"No paired differences: {entry['unpaired']}.")
            continue
        rows = [[name, _cell(made), _verdict(made)] for name, made in entry["scores"].items()]
        lines += _table(["score", "difference", ""], rows)
    lines += ["", "## Samples", ""]
    for run in runs:
        about = {key: value for key, value in run["samples"].items() if not isinstance(value, (dict, list, type(None)))}
        short = {key: value[:12] if key.endswith("digest") else value for key, value in about.items()}
        lines.append(f"- {run['directory']}: " + ", ".join(f"{key} {value}" for key, value in short.items()))
        lines += [f"  - warning: {warning}" for warning in run["warnings"]]
    return "\n".join(lines) + "\n"


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    corrected = "" if entry["corrected"] is None else f" → {entry['corrected']:.4g}"
    return f"{entry['value']:.4g}{corrected} [{entry['low']:.4g}, {entry['high']:.4g}]"


def _verdict(entry: Mapping[str, Any]) -> str:
    return "" if entry["low"] <= 0 <= entry["high"] else "differs"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def curves(content: Mapping[str, Any], path: pathlib.Path) -> list[pathlib.Path]:
    """Writes a PNG file for each score that directories of one folder have at two training steps or more; returns them.

    One line a folder: put the samples of a run's steps into one, as samples/desk/1000 and samples/desk/2000.

    Raises:
      ModuleNotFoundError: Matplotlib, of the extra `plots`, is not installed.
    """
    lines: dict[str, dict[str, list[tuple[int, Mapping[str, Any]]]]] = {}  # score -> folder -> (step, entry)
    for run in content["runs"]:
        step, folder = run["samples"].get("step"), str(pathlib.Path(run["directory"]).parent)
        for name, entry in run["scores"].items() if step is not None else ():
            lines.setdefault(name, {}).setdefault(folder, []).append((step, entry))
    several = {name: found for name, found in lines.items() if max(map(len, found.values())) > 1}
    if not several:
        return []
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("curves over steps need Matplotlib: pip install '.[plots]'")
    from matplotlib.figure import Figure

    written = []
    for name, found in several.items():
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        for folder, points in found.items():
            steps, entries = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            middle = [entry["value"] if entry["corrected"] is None else entry["corrected"] for entry in entries]
            axes.fill_between(steps, [e["low"] for e in entries], [e["high"] for e in entries], alpha=0.2)
            axes.plot(steps, middle, marker="o", label=folder)
        axes.set(xlabel="step", ylabel=f"{name} ({entries[0]['better']} is better)")
        if len(found) > 1:
            axes.legend()
        written.append(path.with_name(f"{path.stem}_{name.replace('@', '_')}.png"))
        figure.savefig(written[-1], dpi=150)
    return written


def write(directories: Sequence[str], out: str | pathlib.Path) -> str:
    """Writes out.md, out.json and curves beside them; returns the Markdown. Raises ValueError as `make`."""
    path = pathlib.Path(out).with_suffix("")
    content = make(directories)
    text = markdown(content)
    try:
        for picture in curves(content, path):
            text += f"\n![{picture.stem}]({picture.name})\n"
    except ModuleNotFoundError as error:
        text += f"\nNo pictures: {error}\n"
    fileio.save_json(content, path.with_suffix(".json"))
    fileio.write_whole(path.with_suffix(".md"), text)
    return text
