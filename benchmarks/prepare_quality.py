"""Compares a preparation of the benchmark corpus with its truth.

    python -m benchmarks.prepare_corpus --out=CORPUS
    python -m benchmarks.prepare_quality --corpus=CORPUS --out=DIR [--distance=4] [--workers=2]

Runs `prepare plan` to `verify` on the corpus, where DIR has no manifest yet, with its evaluation folder as a decontamination
set, and prints for each role and change of an image how many had the outcome that they must have, and which reasons were given:

    exact, near    no second image of a group is kept                     evaluation   no copy is kept
    distinct       one image of the group is kept                         broken       none is kept, "undecodable" is the reason
    negative       kept: it only resembles another (mirrored, other view, other colors)
    scores, shape  rejected by the criterion that was planted
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import glob
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as parquet

STAGES = ("plan", "scan", "select", "write", "verify")
REASONS = {"broken": {"undecodable"}, "evaluation": {"evaluation", "short_side"}}  # a cropped one may be too small
PLANTED = {"small": "short_side", "long": "ratio"}  # how -> reason


def config(corpus: pathlib.Path, distance: int, task_bytes: int = 16 << 20, shard_bytes: int = 64 << 20) -> str:
    """The text of a config file for `prepare`."""
    at = corpus.resolve()
    sources = [
        {"kind": "imagenet", "path": f"{at}/imagenet", "name": "imagenet", "priority": 3},
        {"kind": "imagenet", "path": f"{at}/classes", "name": "classes", "priority": 3},
        {"kind": "sa1b", "path": f"{at}/sa1b", "priority": 2},
        {"kind": "journeydb", "path": f"{at}/journeydb", "metadata": f"{at}/journeydb/*.jsonl", "priority": 1},
        {"kind": "img2dataset", "name": "laion", "path": f"{at}/laion"},
        {"kind": "img2dataset", "name": "coyo", "path": f"{at}/coyo", "metadata": f"{at}/coyo-metadata.parquet"},
        {"kind": "parquet", "path": f"{at}/parquet"},
        {"kind": "folder", "path": f"{at}/folder"},
    ]
    return (
        "from ml_collections import ConfigDict\n\nfrom lumos_jax.preparation import settings\n\n\ndef get_config():\n"
        "    config = ConfigDict(settings.to_dict(settings.Prepare()))\n"
        f"    config.sources = {tuple(sources)!r}\n"
        f"    config.duplicates.phash_distance = {distance}\n"
        f"    config.decontamination.sets = ({f'{at}/evaluation'!r},)\n"
        "    config.decontamination.phash_distance = 6\n"
        f"    config.task_bytes = {task_bytes}\n    config.write.shard_bytes = {shard_bytes}\n"
        "    config.write.group_inputs = 16\n"
        "    return config\n"
    )


def outcomes(out: pathlib.Path) -> dict[str, list[str]]:
    """sha256 -> the outcome of each row with that content, "" for kept."""
    selection = out / "select" / json.loads((out / "select/current.json").read_text())["digest"]
    names = json.loads((selection / "selection.json").read_text())["reasons"]
    found = collections.defaultdict(list)
    for path in sorted(glob.glob(f"{out}/scan/*.parquet")):
        codes = np.load(selection / f"reasons-{pathlib.Path(path).stem}.npy")
        for digest, code in zip(parquet.read_table(path, columns=["sha256"])["sha256"].to_pylist(), codes, strict=True):
            found[digest.hex()].append(names[code] if code else "")
    return found


@dataclasses.dataclass(frozen=True)
class Quality:
    """By (role, how): images, those whose outcome is wrong, and the reasons given. unseen: images that are not in the scan."""

    total: collections.Counter
    wrong: collections.Counter
    reasons: dict[tuple[str, str], collections.Counter]
    unseen: int

    def share_wrong(self, *roles: str) -> float:
        keys = [key for key in self.total if key[0] in roles]
        return sum(self.wrong[key] for key in keys) / max(sum(self.total[key] for key in keys), 1)

    def lines(self) -> list[str]:
        lines = [f"{self.unseen} images are not in the scan"]
        for key in sorted(self.total):
            given = ", ".join(f"{name or 'kept'} {count}" for name, count in self.reasons[key].most_common())
            right = 100 * (1 - self.wrong[key] / self.total[key])
            lines.append(
                f"{key[0]:12}{key[1]:14}{self.total[key]:8,}{self.wrong[key]:6} wrong {right:8.3f} % right  {given}"
            )
        found, lost = 100 * (1 - self.share_wrong("exact", "near")), 100 * self.share_wrong("distinct")
        return [*lines, f"planted duplicates found: {found:.3f} %; distinct images lost: {lost:.4f} %"]


def compare(truth: list[dict], found: dict[str, list[str]]) -> Quality:
    total, wrong, reasons = collections.Counter(), collections.Counter(), collections.defaultdict(collections.Counter)
    groups = collections.defaultdict(list)
    for row in truth:
        role, how, seen = row["role"], row["how"], found.get(row["sha256"], [])
        if role in ("distinct", "exact", "near"):
            groups[row["base"]].append(row)
            continue
        right = {"negative": {""}, **REASONS}.get(role, {PLANTED.get(how, how)})
        total[role, how] += 1
        wrong[role, how] += not set(seen) <= right
        reasons[role, how].update(set(seen))
    for rows in groups.values():
        kept = {row["sha256"]: found.get(row["sha256"], []).count("") for row in rows}
        original = next(row for row in rows if row["role"] == "distinct")["sha256"]
        spare = original if kept[original] else next((digest for digest, count in kept.items() if count), None)
        total["distinct", ""] += 1
        if spare is None:  # the image is lost: what was it taken for?
            wrong["distinct", ""] += 1
            reasons["distinct", ""].update(set(found.get(original, [])))
        for row in rows:
            if row["role"] != "distinct":
                total[row["role"], row["how"]] += 1
                wrong[row["role"], row["how"]] += kept[row["sha256"]] > (row["sha256"] == spare)
    return Quality(total, wrong, reasons, sum(row["sha256"] not in found for row in truth))


def measure(corpus: pathlib.Path, out: pathlib.Path) -> Quality:
    return compare(parquet.read_table(corpus / "truth.parquet").to_pylist(), outcomes(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--distance", type=int, default=4, help="bits in which near-duplicates may differ")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if not (args.out / "manifest.json").exists():
        file = pathlib.Path(f"{args.out}-config.py")
        file.write_text(config(args.corpus, args.distance))
        for stage in STAGES:
            begun = time.time()
            command = [sys.executable, "-m", "lumos_jax.prepare", stage, f"--config={file}", f"--out={args.out}"]
            subprocess.run(command + [f"--workers={args.workers}"] * (stage != "plan"), check=True)
            print(f"{stage}: {time.time() - begun:.0f} s", flush=True)
    print("\n".join(measure(args.corpus, args.out).lines()))


if __name__ == "__main__":
    main()
