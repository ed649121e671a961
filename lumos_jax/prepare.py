"""Prepares data for training: python -m lumos_jax.prepare VERB ... (each has --help)

A data set from collections of images, stage by stage, each resumable by the same command:
    all        plan, scan, select, write, verify and report in turn
                   --config=configs/prepare/web.py --out=DIR
    plan       lists the input files, numbers the tasks and freezes the settings: DIR/plan.json
                   --config=configs/prepare/web.py --source=folder:/data/photos --out=DIR [--sample=0.001]
    scan       reads, decodes and measures every image once; the rest is computed from its rows
                   --out=DIR --workers=16
    select     chooses what is kept by criteria, duplicates and evaluation sets; run it again to try other thresholds
                   --out=DIR --config.criteria.min_aesthetic=5.0
    write      writes what was selected as ArrayRecord shards, or only an index over the original shards
                   --out=DIR [--index-only]
    verify     compares what was written with the manifest
    report     writes DIR/report/index.html: counts, histograms with thresholds, examples of what was rejected and why
    tombstone  takes records out of a written data set by url, key, sha256 or pHash, without changing the order of the rest
                   --out=DIR --by=url --file=optouts.txt
    compact    writes a new version without them

Features of a data set, once instead of in every epoch:
    cache      runs the frozen encoders of a config over its source and writes latents and features
                   --config=configs/i2i.py:desk --out=DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

if __name__ == "__main__":  # before NumPy is imported
    # Tasks run in processes of their own, and their matrices are small.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from absl import flags
from ml_collections import ConfigDict

from lumos_jax import cli, cluster, fileio
from lumos_jax.config.fields import validate
from lumos_jax.data import TooManyCorruptRecords
from lumos_jax.exit_codes import STOPPED
from lumos_jax.preparation import (
    compact,
    engines,
    forecast,
    plan,
    report,
    scan,
    select,
    selection,
    tombstones,
    verify,
    write,
)
from lumos_jax.preparation import settings as prepare_settings
from lumos_jax.preparation.settings import Prepare, Source

_CACHE = """Caches frozen features: python -m lumos_jax.prepare cache --config=configs/i2i.py:desk --out=DIR

Runs the frozen encoders of the config over its source, once, and writes latents and features as ArrayRecord shards. Train on
them with --config.data.source=cached --config.data.path=DIR. The same command continues a stopped one.

Any field can be set on the command line, as --config.data.path=/data/photos; docs/settings.md documents them all."""


def _cache_main() -> NoReturn:
    """Runs the verb cache, which has absl's flags, as training has."""
    config = cli.config_flag()
    out = flags.DEFINE_string(
        "out", None, "The directory to write, new or with a cache that was begun by the same command."
    )
    shard = flags.DEFINE_integer("shard_records", 4096, "Records a shard; a stopped command loses at most one.")
    batch = flags.DEFINE_integer(
        "batch_size",
        None,
        "Records encoded at a time, over all devices of a process; default: config.train.batch_size.",
    )
    dtype = flags.DEFINE_string(
        "dtype", "float16", "How latents and features are stored: float16 | bfloat16 | float32 (twice the size)."
    )

    def run(_: str) -> None:
        try:
            with cli.errors(TooManyCorruptRecords):
                _cache(config.value, out.value, shard.value, batch.value, dtype.value)
        except SystemExit as stop:
            if stop.code == STOPPED["SIGINT"]:
                print("the same command continues after the last whole shard", file=sys.stderr)
            raise

    cli.run(run, _CACHE, required=("config", "out"), verbs=("cache",))


def _cache(config: ConfigDict, out: str, shard_records: int, batch_size: int | None, dtype: str) -> None:
    from lumos_jax.config import io as config_io  # with JAX, which no other verb needs

    settings = config_io.resolve(config)
    directory = fileio.local_directory("--out", out)
    cluster.join()
    from lumos_jax.preparation import cache  # after jax.distributed, which must come before any computation

    size = settings.train.batch_size if batch_size is None else batch_size
    made = cache.write(settings, str(directory), cache.Options(shard_records, size, dtype), _say)
    print(f"{made.records:,} records, {made.undecodable} of them undecodable")
    print(f"train on it with --config.data.source=cached --config.data.path={directory}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class _Command:
    """What a stage takes from the command line. settings: None for verbs that have none. alone: whether this process is the
    only one."""

    out: str
    settings: Prepare | None
    execution: engines.Execution
    args: argparse.Namespace

    @property
    def alone(self) -> bool:
        return self.execution.processes == 1

    def tasks_left(self, count: int, finished: Callable[[str], int]) -> bool:
        """Whether other processes still have tasks to do; says so."""
        left = 0 if self.alone else count - finished(self.out)
        if left > 0:
            _say(f"{left:,} of {count:,} tasks are left to other processes")
        return left > 0


def _plan(command: _Command) -> None:
    plan.make(command.out, command.settings, _say)


def _scan(command: _Command) -> None:
    out, made = command.out, plan.read(command.out)
    if changed := plan.frozen_changes(made.settings, command.settings):
        raise ValueError(plan.refusal(out, changed))
    engines.run(scan.run_task, out, scan.tasks(made), command.execution, lambda: scan.finished(out), "scan")
    if command.tasks_left(len(made.tasks), scan.finished):
        return
    for line in scan.describe(scan.finish(out, command.settings)):
        _say(line)


def _select(command: _Command) -> None:
    out, settings = command.out, command.settings
    chosen = select.run(out, settings, command.execution.workers, _say)
    made = plan.read(out)
    if made.settings.sample < 1 or made.settings.sample_inputs < 1:
        kept = selection.inputs(out, chosen.digest)
        for line in forecast.describe(forecast.make(made, scan.finish(out, settings), kept), settings.prices):
            _say(line)


def _write(command: _Command) -> None:
    out, numbers = command.out, write.tasks(command.out, command.settings)
    engines.run(write.run_task, out, numbers, command.execution, lambda: write.finished(out), "write")
    if command.tasks_left(len(numbers), write.finished):
        return
    write.finish(out, _say)
    _say(f"train on it with --config.data.source=prepared --config.data.path={out}")


def _verify(command: _Command) -> None:
    problems = verify.run(command.out, workers=command.execution.workers, say=_say)
    if problems:
        raise OSError(f"{len(problems):,} problems in {command.out}")


def _report(command: _Command) -> None:
    report.write(command.out, command.settings, _say)


def _tombstone(command: _Command) -> None:
    args = command.args
    values = [*args.value, *(tombstones.read_values(args.file) if args.file else ())]
    if not values:
        raise ValueError("name the records: --value=VALUE, several times, or --file=FILE with a value a line")
    tombstones.add(command.out, args.by, values, _say, distance=args.distance)


def _compact(command: _Command) -> None:
    out, numbers = command.out, compact.tasks(command.out)
    engines.run(compact.run_task, out, numbers, command.execution, lambda: compact.finished(out), "compact")
    if not command.tasks_left(len(numbers), compact.finished):
        compact.finish(out, _say)


def _all(command: _Command) -> None:
    if not command.alone:
        raise ValueError("`all` has stages that wait for each other: run the verbs one by one with --processes")
    for stage in (_plan, _scan, _select, _write, _verify, _report):
        stage(command)


_VERBS: dict[str, tuple[Callable[[_Command], None], str]] = {
    "all": (_all, "Runs plan, scan, select, write, verify and report in turn."),
    "plan": (_plan, "Lists the input files, numbers the tasks and freezes the settings in DIR/plan.json."),
    "scan": (_scan, "Reads, decodes and measures every image once; rows go to DIR/scan/."),
    "select": (
        _select,
        "Chooses what is kept: criteria, duplicates, evaluation sets. With a sample, forecasts the whole.",
    ),
    "write": (_write, "Writes what was selected as ArrayRecord shards, or only an index over the original shards."),
    "verify": (_verify, "Compares what was written with the manifest; exit code 1 if something is wrong."),
    "report": (_report, "Writes DIR/report/index.html: what was kept, what was rejected, and why."),
    "tombstone": (_tombstone, "Takes records out of a written data set; the order of the others stays."),
    "compact": (_compact, "Writes a new version without the records that have a tombstone; numbers and order change."),
}
_BY_ENGINE, _IN_PROCESSES = ("all", "scan", "write", "compact"), ("select", "verify")
_WITHOUT_SETTINGS = ("verify", "tombstone", "compact")  # the manifest tells them everything


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("lumos_jax.prepare", description=__doc__, formatter_class=raw, usage="%(prog)s VERB ...")
    verbs = parser.add_subparsers(
        prog="lumos_jax.prepare", dest="verb", required=True, metavar="VERB", help="see above"
    )
    for name, (_, text) in _VERBS.items():
        verb = verbs.add_parser(name, description=text, allow_abbrev=False)
        add = verb.add_argument
        add("--out", required=True, metavar="DIR", help="directory or URL (gs://, s3://) of the data set")
        needed = name in ("all", "plan")
        if name not in _WITHOUT_SETTINGS:
            default = "selection" if name in ("write", "report") else "plan"
            add("--config", required=needed, metavar="FILE",
                help="in configs/prepare/" + ("" if needed else f"; default: the settings of the {default}"))  # fmt: skip
            add("--config.GROUP.FIELD", dest="_", metavar="VALUE", help="set any field (docs/settings.md)")
        if needed:
            add("--source", action="append", default=[], metavar="KIND:PATH",
                help="in place of the config's sources, as folder:/data/photos; may be given several times")  # fmt: skip
            add("--sample", type=float, metavar="SHARE", help="scan only this share of the images, for a forecast")
            add("--sample-inputs", type=float, metavar="SHARE", help="read only this share of the input files")
        if name in ("all", "write"):
            add("--index-only", action="store_true", help="write an index over the original shards, no images")
        if name == "tombstone":
            add("--by", required=True, choices=tuple(tombstones.KINDS), help="what the values are")
            add("--value", action="append", default=[], metavar="VALUE", help="may be given several times")
            add("--file", metavar="FILE", help="a text file with a value a line")
            add("--distance", type=int, default=0, metavar="BITS", help="by phash: bits in which hashes may differ")
        if name in (*_BY_ENGINE, *_IN_PROCESSES):
            add("--workers", type=int, default=1, metavar="N", help="processes on this machine; default: 1")
        if name in _BY_ENGINE:
            add(
                "--processes",
                type=int,
                default=1,
                metavar="N",
                help="how many commands share the tasks, as a Slurm array",
            )
            add("--process", type=int, default=0, metavar="I", help="which of those this is, from 0")
            add("--runner", default="", metavar="RUNNER",
                help=f"of Apache Beam: {', '.join(engines.RUNNERS)}; Beam's own flags may follow")  # fmt: skip
    return parser


def _settings(args: argparse.Namespace, changes: Sequence[str]) -> Prepare:
    """The config file's settings, or those of the plan or selection, as the flags change them."""
    default = {}
    if not args.config:
        planned = plan.read(args.out).settings
        if args.verb in ("write", "report"):
            planned = selection.settings(planned, selection.read(args.out))
        default = prepare_settings.to_dict(planned)
    settings = prepare_settings.from_dict(cli.changed_config(args.config, default, changes))
    if given := getattr(args, "source", []):
        pairs = [text.partition(":") for text in given]
        sources = tuple(Source(kind=kind, path=path) for kind, _, path in pairs)
        settings = dataclasses.replace(settings, sources=sources)
    for name in ("sample", "sample_inputs"):
        if (share := getattr(args, name, None)) is not None:
            settings = dataclasses.replace(settings, **{name: share})
    if getattr(args, "index_only", False):
        settings = dataclasses.replace(settings, write=dataclasses.replace(settings.write, layout="index"))
    validate(settings)
    return settings


def main(arguments: Sequence[str]) -> None:
    """Runs the stage that the arguments name. Raises ValueError: a user's mistake; OSError: storage fails."""
    args, rest = _parser().parse_known_args(arguments)
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("this needs the extra `prepare`: pip install '.[prepare]'")
    changes = [word for word in rest if word.startswith("--config.")]
    beam = tuple(word for word in rest if not word.startswith("--config."))
    unexpected = [] if args.verb in _BY_ENGINE else [*beam]
    unexpected += changes if args.verb in _WITHOUT_SETTINGS else []
    if unexpected:
        raise ValueError(
            f"unexpected argument {unexpected[0]!r}: fields are set as --config.group.field=value; see lumos_jax.prepare "
            f"{args.verb} --help"
        )
    names = ("workers", "runner", "processes", "process")
    execution = engines.Execution(**{name: getattr(args, name) for name in names if hasattr(args, name)}, beam=beam)
    settings = None if args.verb in _WITHOUT_SETTINGS else _settings(args, changes)
    try:
        _VERBS[args.verb][0](_Command(args.out, settings, execution, args))
    except OSError as error:
        text = str(error) if error.filename else f"{args.out}: {error}"
        raise (error if error.errno is None else fileio.failure(error, text)) from error


if __name__ == "__main__":
    if sys.argv[1:2] == ["cache"]:
        _cache_main()
    sys.exit(cli.call(lambda: main(sys.argv[1:])))
