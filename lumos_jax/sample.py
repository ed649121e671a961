"""Samples from a trained run. Each task has flags of its own: `--workdir=RUN --help` lists them.

Examples (python -m lumos_jax.sample ...):
  --workdir=runs/desk --images a.jpg b.jpg --num=4 --out=grid.png
      image to image: a row per image, the image and then its samples
  --workdir=runs/desk --images a.jpg b.jpg --interpolate=12 --out=path.png
      one row: the first image, samples along the line between the two features, the second image
  --workdir=runs/t2i --prompts "a red sphere" "two blue cones" --out=grid.png
      text to image: a row per prompt
  --workdir=runs/nvs --images a.jpg --azimuths 0 45 90 --elevation 10 --num=1 --out=orbit.png
      novel views: a row per image, and an animation, orbit.gif and orbit.mp4
  --workdir=runs/clips --images a.jpg --frames=16 --fps=8 --motion=20 --out=clip.mp4
      clips that begin with an image, as clip.mp4 and clip.gif: a row per image, the image and then its samples
  --workdir=runs/classes --classes 3 7 --out=grid.png
      a row per class; an unconditional run gives --num samples

An image may be held-out:N, held-out record N of the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from lumos_jax import cli, config, progress
from lumos_jax.checkpoints import CheckpointError, quiet_logs
from lumos_jax.tasks.sampling import check_output
from lumos_jax.train import sampler


def _parser() -> argparse.ArgumentParser:
    """The flags that every task has."""
    parser = cli.Parser(
        prog="python -m lumos_jax.sample", usage="%(prog)s --workdir=RUN [flags]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    sampler.add_flags(parser, batch=16)
    add("--out", metavar="FILE", help="file to write; default: samples.png, of clips samples.gif")
    add("--num", type=int, default=4, help="samples per condition; default: 4")
    return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, config.Settings]:
    """The flags, those of the run's task included, and the run's settings.

    Raises:
      ValueError: no such run; flags that are missing, unknown or another task's, or values that are not allowed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    where = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where.add_argument("--workdir")
    workdir = where.parse_known_args(argv)[0].workdir
    parser = _parser()
    if workdir is None:
        parser.parse_args(argv)  # prints the help, or raises: --workdir is required
    settings, sampling = sampler.load_settings(workdir)
    name = settings.task.name
    group = parser.add_argument_group(f"flags of this run's task, {name}")
    sampling.add_flags(group)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        own = [flag for action in group._group_actions for flag in action.option_strings]
        raise ValueError(
            f"{unknown[0]} is no flag of this run, whose task is {name}: it takes {', '.join(own) or 'none of its own'}; "
            "--help lists all"
        )
    for flag in ("num", "batch"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag}={getattr(args, flag)} must be at least 1")
    args.out = args.out or f"samples{sampling.endings[0]}"
    check_output(sampling, args.out)
    return args, sampler.with_flags(settings, args)


def run(argv: Sequence[str] | None = None) -> list[str]:
    """Samples as the command line says and returns the files that it wrote. Raises ValueError for a user's mistake."""
    args, settings = parse(argv)
    loaded = sampler.load(args.workdir, settings, args.checkpoint, args.weights).with_flags(args, settings)
    with progress.bar(unit="step") as bar:

        def show(made: sampler.Progress) -> None:
            bar.total = made.total
            bar.update(made.done - bar.n)

        sampled = dataclasses.replace(loaded, on_step=None if bar.disable else show).run(args)
    return loaded.sampling.save(*sampled, args.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sample as the command line says; return the exit code."""
    return cli.call(lambda: print(*run(arguments), sep="\n"), CheckpointError)


if __name__ == "__main__":
    quiet_logs()
    sys.exit(main())
