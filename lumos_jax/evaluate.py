"""Evaluates a trained run: python -m lumos_jax.evaluate COMMAND ... (each has --help)

sample   makes one sample an item of a numbered list, in shards. Item i always starts from the same noise, so that samples do
         not depend on the batch, the devices or the processes. The same command continues a job that was stopped.
             --workdir=runs/desk --set=scenes --num=2000 --out=samples/desk
statistics  writes mean and covariance of a reference set's features, and features.
             --source=folder --path=DIR --network=vgg16 --image-size=64 --out=ref.npz
score    scores samples by any of the metrics, with 95 % intervals, into scores.json.
             --samples=samples/desk --reference=ref.npz --metrics=fd_vgg16,precision_vgg16
report   writes tables, paired differences between runs, and curves over training steps.
             samples/desk samples/other --out=report.md
export   writes samples in the layout of an official scorer.
             --samples=samples/desk --format=adm-npz --out=desk.npz
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

if __name__ == "__main__":  # before NumPy is imported
    # LAPACK's eigenvalues gain little from threads, and wait for them where other processes have the cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from lumos_jax import cli, cluster, config, fileio
from lumos_jax.checkpoints import CheckpointError, quiet_logs
from lumos_jax.evaluation import export, job, lists, shards
from lumos_jax.evaluation.commands import add_report, add_score, add_statistics
from lumos_jax.train import items as run_items
from lumos_jax.train import sampler, sharding

WAIT = 7 * 24 * 3600  # seconds for the slowest process


def _add_sample(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("sample", allow_abbrev=False, help="make one sample an item of a numbered list")
    sampler.add_flags(parser, batch=64, by=" by each device")
    add = parser.add_argument
    add("--set", required=True, metavar="SET",
        help=f"{', '.join(lists.SETS)}, held-out (the run's own records), a .jsonl list, or a folder of images")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="directory of the shards")
    add("--data", metavar="FOLDER", help="the files of the set")
    add("--num", type=int, metavar="N", help="the first N items; of scenes how many, 2048")
    add("--frames", type=int, metavar="N", help="of a clip; default: as in training")
    add(
        "--stride",
        type=int,
        metavar="N",
        help="of clips: frames of a video from one to the next; default: training's middle",
    )
    add("--shard-size", type=int, default=shards.SHARD_SIZE, metavar="N", help=f"default: {shards.SHARD_SIZE}")
    for name, kind in (("coordinator", str), ("processes", int), ("process", int)):
        add(f"--{name}", type=kind, help=flags.FLAGS[name].help)
    parser.set_defaults(run=_sample)


def _sample(args: argparse.Namespace) -> None:
    for flag in ("batch", "shard_size"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')}={getattr(args, flag)} must be at least 1")
    settings = _with_clips(sampler.with_flags(sampler.load_settings(args.workdir)[0], args), args)
    out = fileio.local_directory("--out", args.out)
    held_out = args.set == "held-out"
    items = (
        run_items.held_out_list(settings.data, args.num) if held_out else lists.make_list(args.set, args.data, args.num)
    )
    names = ("coordinator", "processes", "process")
    given = [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name) is not None]
    flags.FLAGS(["evaluate", *given])
    cluster.join()
    devices = jax.local_devices()
    size = args.batch * len(devices)
    loaded = sampler.load(
        args.workdir, settings, args.checkpoint, args.weights, devices, seed=args.seed, batch_size=size
    )
    read = run_items.ItemReader(loaded.experiment, loaded.sampling, items)
    protocol = loaded.protocol() | read.protocol() | {"shard_size": args.shard_size}
    process, processes = jax.process_index(), jax.process_count()
    if process == 0:
        shards.open_job(out, items, protocol)
        fileio.lock(out / "lock")
    sharding.barrier("the directory of samples")
    writer = shards.open_job(out, items, protocol)
    missing = np.zeros(len(writer), bool)
    missing[writer.missing()] = True
    if processes > 1:
        missing = multihost_utils.broadcast_one_to_all(missing)  # others may see a directory later
    todo = np.flatnonzero(missing).tolist()
    if process == 0 and len(todo) < len(writer):
        print(f"{len(writer) - len(todo)} of {len(writer)} shards are there; {len(todo)} are made", file=sys.stderr)
    own = todo[process::processes]
    job.make_samples(writer, own, read, loaded.generate_items, size, show=process == 0)
    sharding.barrier("all samples", WAIT)
    if process == 0:
        print(f"{len(shards.Samples(out))} samples of {items.name} in {out}")


def _with_clips(settings: config.Settings, args: argparse.Namespace) -> config.Settings:
    """The run's settings with --frames and --stride. Raises ValueError if it makes no clips."""
    changes = {} if args.frames is None else {"data.clips.frames": args.frames}
    changes |= {} if args.stride is None else {"data.clips.frame_stride": (args.stride, args.stride)}
    if changes and settings.data.sample_type != "clip":
        raise ValueError(f"--frames={args.frames} --stride={args.stride} are for clips, and this run makes images")
    settings = config.replace(settings, changes)
    config.validate(settings)
    return settings


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", allow_abbrev=False, help="write samples in the layout of an official scorer")
    add = parser.add_argument
    add("--samples", required=True, metavar="DIR", help="of `evaluate sample`")
    add("--format", required=True, choices=tuple(export.FORMATS), help="layout")
    add("--out", required=True, metavar="PATH", help="file or folder to write")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    out = fileio.local_directory("--out", args.out)
    export.FORMATS[args.format](shards.Samples(args.samples), out)
    print(out)


COMMANDS = (_add_sample, add_statistics, add_score, add_report, _add_export)


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; return the exit code."""
    parser = cli.Parser(
        prog="python -m lumos_jax.evaluate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)

    def run() -> None:
        args = parser.parse_args(arguments)
        args.run(args)

    return cli.call(run, CheckpointError)


if __name__ == "__main__":
    quiet_logs()
    code = main()
    if code and jax.distributed.is_initialized():  # the others must not wait for this process
        cluster.end(code)
    sys.exit(code)
