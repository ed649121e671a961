"""The paper's comparisons of priors on procedural scenes: what each figure of the paper compares, trained, scored and drawn.

    python -m benchmarks.study --figure=5 --workdir=runs/study
    python -m benchmarks.study --figure=all --workdir=runs/study --plan
    python -m benchmarks.study --figure=all --report
    python -m benchmarks.study --figure=all --workdir=runs/quick --quick

Prints its plan, trains the runs that have no result of today's settings, scores samples of them with `lumos_jax.evaluate`, and
writes tables with 95 % intervals over seeds, verdicts and plots (extra `plots`) into docs/study.md. Each run's result is a
small JSON file in benchmarks/results/study, so that parts run on different days add up; `--report` reads these alone. A
repeated command continues where it was stopped. What is compared is declared in benchmarks/study/figures.py.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
from collections.abc import Sequence

from benchmarks.allocator import TUNABLES
from benchmarks.study import figures, jobs, report, work
from benchmarks.study.results import Results
from benchmarks.study.runs import ROOT, Study, key_of
from benchmarks.study.spec import Figure
from lumos_jax import cli, fileio

_RESULTS, _PAGE = ROOT / "benchmarks" / "results" / "study", ROOT / "docs" / "study.md"
# Seconds a step and for the evaluations of a run, on one core, until there are results of this machine; and for starting a run.
_STEP_SECONDS = {"i2i": 0.2, "t2i": 0.2, "nvs": 0.22, "i2v": 0.4, "": 0.2}
_EVALUATION_SECONDS, _START_SECONDS = 60.0, 40.0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m benchmarks.study", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    known = [*figures.declare(figures.DESK), *figures.ALIASES, "all"]
    add = parser.add_argument
    add("--figure", required=True, choices=known, help="of the paper; all: every one, the most important first")
    add("--workdir", default="runs/study", help="of runs, samples and logs (runs/study)")
    add("--seeds", type=int, default=figures.SEEDS, help=f"runs of each kind ({figures.SEEDS})")
    add("--jobs", type=int, default=0, help="runs at a time, on cores of their own (one a core, at most 16)")
    add("--plan", action="store_true", help="print what would be trained, and stop")
    add("--report", action="store_true", help="write tables and plots of the results that are there, and stop")
    add("--quick", action="store_true", help="check the machinery with tiny runs; results stay in the workdir")
    add("--results", help="folder of the JSON files (benchmarks/results/study)")
    add("--out", help="page to write, its plots beside it (docs/study.md)")
    return parser.parse_args(arguments)


def _print_plan(study: Study, todo: Sequence[jobs.Job], count: int) -> None:
    """What is trained and what is reused, with an estimate in hours."""
    measured = [result for result in study.results.all() if result["machine"] == work.machine()]
    total, rows, reused = 0.0, {}, {}
    for job in todo:
        if job.idle:
            reused.setdefault(job.run.name, []).append(job.seed)
            continue
        step = _median(
            [r["step_seconds"] for r in measured if r["title"] == job.run.title], _STEP_SECONDS[job.run.task]
        )
        seconds = _START_SECONDS + step * job.run.steps
        for evaluation in job.evaluations:
            alike = [r["evaluations"].get(key_of(evaluation)) for r in measured if r["title"] == job.run.title]
            seconds += _median([entry["seconds"] for entry in alike if entry], _EVALUATION_SECONDS)
        total += seconds
        rows.setdefault((job.run.name, job.run.steps, len(job.evaluations), round(seconds / 60, 1)), []).append(
            job.seed
        )
    print(f"{'run':<44} {'steps':>6} {'evaluations':>12} {'minutes':>8}  seeds")
    for (name, steps, evaluations, minutes), seeds in rows.items():
        print(f"{name:<44} {steps:>6} {evaluations:>12} {minutes:>8}  {', '.join(map(str, seeds))}")
    for name, seeds in reused.items():
        print(f"{name:<44} reused  {', '.join(map(str, seeds))}")
    known = "by steps measured on this machine, where there are any" if measured else "assumed"
    new = sum(map(len, rows.values()))
    print(
        f"{new} runs to do, {len(todo) - new} reused; about {total / 3600 / count:.1f} hours with {count} at a time ({known})"
    )


def _print_left_out(study: Study, declared: dict[str, Figure]) -> None:
    """Results that are not used, and why."""
    names = {job.run.name for job in jobs.plan(study, declared.values(), [0])}
    for name, why in study.results.left_out.items():
        print(f"left out, as it is of other settings: {name} ({why})")
    for name in study.results.undeclared(names):
        print(f"left out, as no figure has such a run: {name}")


def _median(measured: Sequence[float], default: float) -> float:
    return statistics.median(measured) if measured else default


def _run(args: argparse.Namespace) -> int:
    scale = figures.QUICK if args.quick else figures.DESK
    if args.seeds < 1 or args.jobs < 0:
        raise ValueError(f"--seeds={args.seeds} must be 1 or more, and --jobs={args.jobs} 0 or more")
    workdir = fileio.local_directory("--workdir", args.workdir)
    folder = args.results or (workdir / "results" if args.quick else _RESULTS)
    study = Study(scale, workdir, Results(folder))
    declared, seeds = figures.declare(scale), range(args.seeds)
    chosen = declared if args.figure == "all" else _one(declared, figures.ALIASES.get(args.figure, args.figure))
    failed = []
    if not args.report:
        todo, lanes = jobs.plan(study, chosen.values(), seeds), jobs.lanes(args.jobs)
        _print_plan(study, todo, len(lanes))
        if args.plan:
            _print_left_out(study, declared)
            return 0
        failed = _train(study, todo, lanes)
    out = pathlib.Path(args.out or (workdir / "study.md" if args.quick else _PAGE))
    for text in report.write(study, chosen, seeds, out if out.exists() and not args.quick else _PAGE, out):
        print(f"\n{text}", end="")
    _print_left_out(study, declared)
    print(out)
    for job in failed:
        print(f"failed: {job.name}; see {workdir / 'logs'}", file=sys.stderr)
    return 1 if failed else 0


def _one(declared: dict[str, Figure], key: str) -> dict[str, Figure]:
    return {key: declared[key]}


def _train(study: Study, todo: Sequence[jobs.Job], lanes: Sequence[Sequence[int]]) -> list[jobs.Job]:
    """Does the jobs; returns those that failed."""
    study.workdir.mkdir(parents=True, exist_ok=True)
    fileio.lock(study.workdir / "lock")
    # For the programs that are started. Runs of this size are for CPUs: by default an accelerator would hold one at a time.
    if os.environ.setdefault("JAX_PLATFORMS", "cpu") != "cpu":  # runs share it
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        # Each would time its kernels while the others do: 16 runs at a time spent nine minutes before their first step.
        os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    os.environ.setdefault("GLIBC_TUNABLES", TUNABLES)
    # Runs of other seeds compile the same programs again.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(study.workdir / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if study.scale is figures.QUICK:  # most of the time of tiny runs is compilation
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    pool = jobs.Pool(lanes, study.workdir / "logs")
    pool.run(todo, work.Worker(study, pool))
    return [job for job in todo if job.state != "done"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study as the command line says; returns the exit code."""
    return cli.call(lambda: _run(_parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
