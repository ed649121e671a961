"""Kills a preparation again and again, under other engines and numbers of workers, and compares its files with one left alone.

    python -m benchmarks.prepare_corpus --out=CORPUS --images=3000 --file-images=50
    python -m benchmarks.prepare_kill --corpus=CORPUS --out=DIR [--kills=20] [--seed=0]

DIR/whole is prepared by one worker without an interruption. DIR/killed is begun by one of HOW at a time; all its processes are
killed (SIGKILL) at a random moment, and the next continues. Then it is left to end, and each of HOW makes one alone.
Prints the files with another sha256 than in DIR/whole (times in JSON files do not count). Ends with code 1 if there are any.
"""

from __future__ import annotations

import argparse
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

# One command, or several that run at a time.
HOW = {
    "beam": [["--workers=1"]],
    "beam, 3 workers": [["--workers=3"]],
    "dask, 2 workers": [["--runner=DaskRunner", "--workers=2"]],
    "2 processes": [["--processes=2", "--process=0"], ["--processes=2", "--process=1"]],
    "3 processes": [["--processes=3", f"--process={i}"] for i in range(3)],
}
TIMES = {"seconds"}  # keys of JSON files that are left out


def start(config: pathlib.Path, out: pathlib.Path, how: str) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "lumos_jax.prepare", "all", f"--config={config}", f"--out={out}"]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    with open(out.with_suffix(".log"), "ab") as log:
        return [
            subprocess.Popen([*command, *flags], env=environment, stdout=log, stderr=log, start_new_session=True)
            for flags in HOW[how]
        ]


def finish(processes: list[subprocess.Popen], out: pathlib.Path) -> None:
    if any([process.wait() for process in processes]):
        sys.exit("\n".join(out.with_suffix(".log").read_text().splitlines()[-20:]))


def kill(processes: list[subprocess.Popen]) -> bool:
    """Kills all processes and what they started. Returns whether any was still running."""
    running = any(process.poll() is None for process in processes)
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for process in processes:
        process.wait()
    return running


def without_times(tree):
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in TIMES}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def digests(out: pathlib.Path) -> dict[str, str]:
    """Every file but the report's -> sha256."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and "report" not in path.parts):
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
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, different = random.Random(args.seed), 0
    args.out.mkdir(parents=True, exist_ok=True)
    config = args.out / "config.py"
    config.write_text(prepare_quality.config(args.corpus, 4, task_bytes=1 << 20, shard_bytes=4 << 20))
    begun = time.time()
    finish(start(config, args.out / "whole", "beam"), args.out / "whole")
    seconds, whole = time.time() - begun, digests(args.out / "whole")
    print(f"{len(whole)} files in {seconds:.0f} s", flush=True)
    for _ in range(args.kills):
        how = rng.choice(list(HOW))
        processes, wait = start(config, args.out / "killed", how), rng.uniform(0.1, 0.5) * seconds
        time.sleep(wait)
        running = kill(processes)
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
