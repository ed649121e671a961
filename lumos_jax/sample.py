"""Samples from a trained run. Its task adds flags of its own, which `--workdir=RUN --help` lists.

python -m lumos_jax.sample --workdir=runs/desk --images a.jpg b.jpg --num=4 --out=grid.png
    one row an image: the source, then samples conditioned on it
python -m lumos_jax.sample --workdir=runs/desk --images a.jpg b.jpg --interpolate=12 --out=path.png
    one row: the first image, samples along the line between the two features, the second image
python -m lumos_jax.sample --workdir=runs/t2i --prompts "a red sphere" "two blue cones" --out=grid.png
    one row a prompt
python -m lumos_jax.sample --workdir=runs/classes --classes 3 7 --out=grid.png
    one row a class; an unconditional run gives --num samples
python -m lumos_jax.sample --workdir=runs/clips --images a.jpg --frames=16 --fps=8 --motion=20 --out=clip.mp4
    clips that begin with an image, as clip.mp4 and clip.gif: one row an image, the image, then samples
python -m lumos_jax.sample --workdir=runs/nvs --images a.jpg --azimuths 0 45 90 --elevation 10 --num=1 --out=orbit.png
    novel views: a row an image, seen from there; and orbit.gif and orbit.mp4

An image may be held-out:N, the run's own held-out record number N. The sampler's settings default to the run's (config.eval).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from lumos_jax import cli, config
from lumos_jax.checkpoints import CheckpointError
from lumos_jax.diffusion import SAMPLERS
from lumos_jax.tasks.sampling import check_output
from lumos_jax.train import sampler


def _parser() -> argparse.ArgumentParser:
    """The flags that every task has."""
    parser = cli.Parser(
        prog="python -m lumos_jax.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--workdir", required=True, help="the run's directory")
    add("--out", help="the file to write; default: samples.png, or samples.gif for clips")
    add("--num", type=int, default=4, help="samples a condition, or in all where there is none (4)")
    add("--sampler", choices=tuple(SAMPLERS), help="default: config.eval.sampler")
    add("--steps", type=int, help="sampling steps; default: config.eval.steps")
    add("--guidance", type=float, help="guidance scale, 1 for none; default: config.eval.guidance")
    add("--seed", type=int, default=0, help="of the starting noise (0)")
    add("--batch", type=int, default=16, help="samples generated at a time (16)")
    add("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    add("--weights", choices=("ema", "params"), default="ema", help="EMA (default) or raw parameters")
    for group in ("encoder", "autoencoder"):
        add(f"--{group}-weights", metavar="PATH", help=f"where config.{group}.weights are now, if they have moved")
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
    return args, _override(settings, args)


def _override(settings: config.Settings, args: argparse.Namespace) -> config.Settings:
    """The run's settings as the flags change them."""
    changes = {
        "eval": {name: getattr(args, name) for name in ("sampler", "steps", "guidance")},
        "encoder": {"weights": args.encoder_weights},
        "autoencoder": {"weights": args.autoencoder_weights},
    }
    for group, fields in changes.items():
        fields = {name: value for name, value in fields.items() if value is not None}
        settings = dataclasses.replace(settings, **{group: dataclasses.replace(getattr(settings, group), **fields)})
    config.validate(settings)
    return settings


def run(argv: Sequence[str] | None = None) -> list[str]:
    """Samples as the command line says and returns the files that it wrote.

    Raises:
      ValueError: a user's mistake: no such run, unreadable image, impossible options.
    """
    args, settings = parse(argv)
    loaded = sampler.load(args.workdir, settings, args.checkpoint, args.weights, seed=args.seed, batch_size=args.batch)
    sampling = loaded.sampling.with_flags(args)
    return sampling.run(dataclasses.replace(loaded, sampling=sampling), args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sample as the command line says; return the exit code."""
    return cli.call(lambda: print(*run(arguments), sep="\n"), CheckpointError)


if __name__ == "__main__":
    sys.exit(main())
