"""Kills a preparation again and again, under other engines and numbers of workers, and compares its files with one left alone.

    python -m benchmarks.prepare_corpus --out=CORPUS --images=3000 --file-images=50
    python -m benchmarks.prepare_kill --corpus=CORPUS --out=DIR [--kills=20] [--seed=0]

DIR/whole is prepared by one worker without an interruption. DIR/killed is begun by one of HOW at a time; all its processes are
killed (SIGKILL) at a random moment, and the next continues. Then it is left to end, and each of HOW makes one alone.
Prints the files with another sha256 than in DIR/whole (times in JSON files do not count). Ends with code 1 if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from benchmarks import prepare_quality

HOW = {  # flags of one command, or the number of processes that share the tasks of each verb
    "1 worker": [],
    "2 workers": ["--workers=2"],
    "Beam, 3 workers": ["--runner=DirectRunner", "--workers=3"],
    "Dask, 2 workers": ["--runner=DaskRunner", "--workers=2"],
    "2 processes": 2,
    "3 processes": 3,
}
TIMES = {"seconds", "decode_seconds"}  # keys of JSON files that are left out


def command(config: pathlib.Path, out: pathlib.Path, how: str) -> str:
    """A line for the shell."""
    program, flags = f"{sys.executable} -m lumos_jax.prepare", f"--config={config} --out={out}"
    if not isinstance(HOW[how], int):
        return " ".join([program, "all", flags, *HOW[how]])
    steps = []
    for verb in ("plan", "scan", "select", "write", "verify", "report"):
        line, count = f"{program} {verb} --out={out}" if verb == "verify" else f"{program} {verb} {flags}", HOW[how]
        if verb in ("scan", "write"):
            parts = [f"{line} --processes={count} --process={i} & p{i}=$!" for i in range(count)]
            waits = " && ".join(f"wait $p{i}" for i in range(count))
            line = f"{{ {'; '.join(parts)}; {waits}; }}"
        steps.append(line)
    return " && ".join(steps)


def start(config: pathlib.Path, out: pathlib.Path, how: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    with open(f"{out}.log", "ab") as log:
        return subprocess.Popen(
            ["bash", "-c", command(config, out, how)], env=environment, stdout=log, stderr=log, start_new_session=True
        )


def finish(process: subprocess.Popen, out: pathlib.Path) -> None:
    if process.wait():
        sys.exit("\n".join(pathlib.Path(f"{out}.log").read_text().splitlines()[-20:]))


def kill(process: subprocess.Popen) -> bool:
    """Kills a command and what it started. Returns whether it was still running."""
    running = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return running


def without_times(tree):
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in TIMES}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def digests(out: pathlib.Path) -> dict[str, str]:
    """Every output but the report -> sha256. Temporary files of killed processes have names of their own and are no outputs."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        if {"report", "attempts", "scratch"} & set(path.parts) or "partial" in path.name or path.name == "lock":
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps(without_times(json.loads(content)), sort_keys=True).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found


def differences(whole: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in whole.keys() | other.keys() if whole.get(name) != other.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--wait", type=float, nargs=2, default=(1.0, 8.0), help="seconds before a kill, from and to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, different = random.Random(args.seed), 0
    args.out.mkdir(parents=True, exist_ok=True)
    config = args.out / "config.py"
    config.write_text(prepare_quality.config(args.corpus, 4, task_bytes=1 << 20, shard_bytes=4 << 20))
    begun = time.time()
    finish(start(config, args.out / "whole", "1 worker"), args.out / "whole")
    seconds, whole = time.time() - begun, digests(args.out / "whole")
    print(f"{len(whole)} files in {seconds:.0f} s", flush=True)
    for _ in range(args.kills):
        how = rng.choice(list(HOW))
        process, wait = start(config, args.out / "killed", how), rng.uniform(*args.wait)
        time.sleep(wait)
        running = kill(process)
        made = digests_made(args.out / "killed", whole)
        print(
            f"{how}: killed after {wait:.1f} s, {made} of {len(whole)} files" if running else f"{how}: done", flush=True
        )
        if not running:
            different += compare("killed", args, whole)
            shutil.rmtree(args.out / "killed")
    finish(start(config, args.out / "killed", "2 processes"), args.out / "killed")
    different += compare("killed", args, whole)
    for how in HOW:
        name = how.replace(", ", "-").replace(" ", "-")
        finish(start(config, args.out / name, how), args.out / name)
        different += compare(name, args, whole)
    sys.exit(bool(different))


def digests_made(out: pathlib.Path, whole: dict[str, str]) -> int:
    return sum((out / name).exists() for name in whole)


def compare(name: str, args: argparse.Namespace, whole: dict[str, str]) -> int:
    other = differences(whole, digests(args.out / name))
    print(f"{name}: {len(other)} of {len(whole)} files differ {other[:5] or ''}", flush=True)
    return len(other)


if __name__ == "__main__":
    main()
