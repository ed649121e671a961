"""Draws pictures with a trained prior.

python -m lumos_jax.sample --workdir=runs/desk --images a.jpg b.jpg --num=4 --out=grid.png
    one row an image: the source, then samples conditioned on it
python -m lumos_jax.sample --workdir=runs/desk --images a.jpg b.jpg --interpolate=12 --out=path.png
    one row: the first image, samples along the line between the two features, the second image
python -m lumos_jax.sample --workdir=runs/t2i --prompts "a red sphere" "two blue cones" --out=grid.png
    one row a prompt, of a run that draws from text
python -m lumos_jax.sample --workdir=runs/classes --classes 3 7 --out=grid.png
    one row a class, of a run that draws from classes; an unconditional one draws --num samples of nothing in particular
python -m lumos_jax.sample --workdir=runs/clips --images a.jpg --frames=16 --fps=8 --motion=20 --out=clip.mp4
    clips that begin with an image, as clip.mp4 and clip.gif: one row an image, the image, then samples
python -m lumos_jax.sample --workdir=runs/nvs --images a.jpg --azimuths 0 45 90 --elevation 10 --num=1 --out=orbit.png
    novel views: a row an image, seen from there; and orbit.gif and orbit.mp4

An image may be held-out:N, the run's own held-out record number N.

The sampler's settings default to the run's own (config.eval).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import cli, config, data, tasks
from lumos_jax.checkpoints import CheckpointError, Checkpoints, transfer
from lumos_jax.config import io as config_io
from lumos_jax.tasks import pictures, sampling
from lumos_jax.train import finetune, rngs, sharding
from lumos_jax.train.sharding import of_the_task

HELD_OUT = "held-out:"
# Flags that say what to draw; which of them are needed, the task knows.
CONDITIONS = ("images", "prompts", "classes", "size", "frames", "fps", "motion", "azimuths", "elevation")


@dataclasses.dataclass(frozen=True)
class Prior:
    """A trained prior, ready to draw: settings, task, frozen networks and weights, all on `mesh`."""

    settings: config.Settings
    task: tasks.Task
    frozen: dict
    params: dict
    mesh: jax.sharding.Mesh
    step: int


def load(workdir: str, step: int | None = None, weights: str = "ema") -> Prior:
    """Loads a run's weights.

    Args:
      workdir: the run's directory.
      step: which checkpoint; None takes the newest.
      weights: "ema" or "params" (the raw ones).

    Raises:
      ValueError: no such run or checkpoint, or the frozen networks are not those of the training run.
    """
    settings = config_io.load(pathlib.Path(workdir) / "config.json")
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest() if step is None else step
    if step is None or not (checkpoints.directory / str(step)).is_dir():
        raise ValueError(f"there is no checkpoint {'' if step is None else step} in {checkpoints.directory}")
    mesh = sharding.make_mesh(config.Mesh())
    task, frozen = tasks.make_task(settings, sharding.Frozen(mesh))
    if not hasattr(task, "dit"):
        raise ValueError(f"{workdir} trained an encoder, which draws nothing; see its sheets in {workdir}/samples")
    trained_with = checkpoints.meta(step)["fingerprints"]
    for name, identity in task.identity.items():
        if trained_with.get(name, identity) != identity:  # imported weights do not say
            raise ValueError(
                f"config.{name}.weights={getattr(settings, name).weights!r} is not the network that this run was trained "
                f"with: {trained_with[name]} then, {identity} now"
            )
    everywhere = sharding.replicated(mesh)
    abstract = jax.eval_shape(task.dit.init, rngs.key(0, "init"))
    params, _ = transfer(finetune.read_weights(checkpoints, step, weights, everywhere), abstract, origin=workdir)
    checkpoints.close()
    return Prior(settings, task, frozen, params, mesh, step)


@functools.partial(jax.jit, static_argnames=("task", "options"))
def _draw(task, params, frozen, condition, noise, key, options):
    return sampling.draw(task, params, frozen, condition, noise, key, options)


@functools.partial(jax.jit, static_argnames="task")
def _condition(task, frozen, batch):
    return task.condition(frozen, batch)


@functools.partial(jax.jit, static_argnames="task")
def _sources(task, frozen, batch):
    return task.source_pictures(frozen, batch)


def draw_rows(prior: Prior, condition, noise: jax.Array, key: jax.Array, options, batch: int) -> np.ndarray:
    """Samples for every row of `condition` and `noise`, `batch` at a time: uint8 (B, H, W, 3).

    The rows are independent for the deterministic samplers (dpm++, ddim, euler, heun): their pictures do not depend on `batch`.
    """
    total, drawn = noise.shape[0], []
    for number, first in enumerate(range(0, total, batch)):
        rows = np.minimum(np.arange(first, first + batch), total - 1)  # the last part is filled up: one compiled shape
        part = jax.tree.map(lambda a, rows=rows: a[rows], (condition, noise))
        if batch % prior.mesh.size == 0:
            part = jax.device_put(part, sharding.batch_sharding(prior.mesh))
        pictures_ = _draw(prior.task, prior.params, prior.frozen, *part, jax.random.fold_in(key, number), options)
        drawn.append(np.asarray(pictures_)[: total - first])
        print(f"{min(first + batch, total)} of {total} samples", file=sys.stderr)
    return np.concatenate(drawn)


def draw_samples(
    prior: Prior, batch: Mapping[str, np.ndarray], count: int, seed: int, options, size: int
) -> np.ndarray:
    """`count` samples for each of R rows of a host batch, `size` at a time: uint8 (R, count, [F,] H, W, 3).

    Rows of one `record`, as the views of an orbit are, start from the same noise, so that what turns is the camera alone.
    """
    condition = _condition(prior.task, prior.frozen, of_the_task(batch))
    rows = len(next(iter(batch.values())))
    records, which = np.unique(batch.get("record", np.arange(rows)), return_inverse=True)
    shape = prior.task.latent_shape
    noise = jax.random.normal(rngs.key(seed, "sample/noise"), (len(records), count, *shape))
    noise = noise[which].reshape(rows * count, *shape)
    condition = sampling.repeat_rows(condition, count)
    drawn = draw_rows(prior, condition, noise, rngs.key(seed, "sample/sampler"), options, size)
    return drawn.reshape(rows, count, *drawn.shape[1:])


def sheet_of_path(prior: Prior, images: np.ndarray, count: int, seed: int, options, batch: int) -> np.ndarray:
    """The path between two images' features: weights 0, 1/n .. (n-1)/n, mixed linearly and not normalised again, from one
    shared starting noise, with the last step's order always lowered, as the official release does it."""
    features = _condition(prior.task, prior.frozen, {"image": jnp.asarray(images)})
    mix = jnp.arange(count) / count

    def between(a):
        share = mix.reshape(-1, *[1] * (a.ndim - 1)).astype(a.dtype)
        return a[:1] * (1 - share) + a[1:] * share

    condition = jax.tree.map(between, features)
    noise = jax.random.normal(rngs.key(seed, "sample/noise"), (1, *prior.task.latent_shape))
    noise = jnp.broadcast_to(noise, (count, *noise.shape[1:]))
    options = dataclasses.replace(options, lower_last="always")
    drawn = draw_rows(prior, condition, noise, rngs.key(seed, "sample/sampler"), options, batch)
    return pictures.sheet(np.concatenate([images[:1], drawn, images[1:]])[None])


def _held_out(settings: config.Data, name: str) -> np.ndarray:
    """ "held-out:N" -> the picture (S, S, 3) uint8 of the run's held-out record N: of two views the one that is given, of a
    clip the first frame.

    Raises:
      ValueError: no such record, or it cannot be decoded.
    """
    number = name.removeprefix(HELD_OUT)
    if not number.isdecimal() or int(number) >= settings.holdout:
        raise ValueError(f"{name}: this run holds out {settings.holdout} records, held-out:0 and so on")
    source = data.make_source(settings)
    batch = data.read_batch(settings, source, [data.holdout_records(settings, source)[int(number)]])
    if not batch["weight"][0]:
        raise ValueError(f"{name} cannot be decoded: {batch['problem'][0]}")
    if "frames" in batch:
        return batch["frames"][0, 0]
    if "image" not in batch:
        raise ValueError(f"{name}: config.data.source={settings.source} holds no pictures; give a file")
    return batch.get("input", batch["image"])[0]


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m lumos_jax.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", required=True, help="the run's directory")
    add("--images", nargs="+", metavar="FILE", help="the images to condition on")
    add("--prompts", nargs="+", metavar="TEXT", help="the texts to condition on")
    add(
        "--size", metavar="HEIGHTxWIDTH", help="pixels, of a run that trained in several sizes; default: the square one"
    )
    add("--classes", nargs="+", type=int, metavar="N", help="the classes to condition on, by number from 0")
    add("--frames", type=int, metavar="N", help="clips: how many frames; default: as in training")
    add("--fps", type=float, help="clips: frames a second; default: config.video.sample_fps")
    add(
        "--motion",
        type=int,
        metavar="ID",
        help="clips: how much moves, 0 to 255; default: config.video.motion_bucket_id",
    )
    add("--out", default="samples.png", help="the PNG to write (samples.png); clips: the name of an MP4 and a GIF")
    add("--azimuths", nargs="+", type=float, metavar="DEGREES",
        help="novel views: how far the camera goes round the object, counter-clockwise from above (0 30 .. 330)")  # fmt: skip
    add("--elevation", type=float, metavar="DEGREES", help="novel views: how far the camera rises (0)")
    add("--num", type=int, default=4, help="samples a condition, or in all where there is none (4)")
    add("--interpolate", type=int, default=0, metavar="N", help="draw N samples on the path between exactly two images")
    add("--sampler", choices=("ddpm", "ddim", "dpm++", "euler", "heun"), help="default: config.eval.sampler")
    add("--steps", type=int, help="sampling steps; default: config.eval.steps")
    add("--guidance", type=float, help="guidance scale, 1 for none; default: config.eval.guidance")
    add("--seed", type=int, default=0, help="of the starting noise (0)")
    add("--batch", type=int, default=16, help="samples drawn at a time (16)")
    add("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    add("--weights", choices=("ema", "params"), default="ema", help="running average (default) or raw parameters")
    return parser


def run(args: argparse.Namespace) -> Sequence[str]:
    """Draws as the command line says and returns the files that it wrote.

    Raises:
      ValueError: a user's mistake: no such run, unreadable image, impossible options.
    """
    for name in ("num", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} must be at least 1")
    images = args.images or []
    if args.interpolate and (len(images) != 2 or args.interpolate < 2):
        raise ValueError(f"--interpolate={args.interpolate} needs N >= 2 and exactly two --images, got {len(images)}")
    prior = load(args.workdir, args.checkpoint, args.weights)
    changes = {"sampler": args.sampler, "steps": args.steps, "guidance": args.guidance}
    changes = {name: value for name, value in changes.items() if value is not None}
    settings = dataclasses.replace(prior.settings, eval=dataclasses.replace(prior.settings.eval, **changes))
    config.validate(settings)
    options = sampling.options_of(settings.eval)

    def load_image(path):
        if path.startswith(HELD_OUT):
            return _held_out(prior.settings.data, path)
        return data.load_image(path, prior.settings.data.image_size)

    asked = {name: getattr(args, name) for name in CONDITIONS if getattr(args, name) is not None}
    batch = prior.task.request(asked, load_image)
    prior = dataclasses.replace(prior, task=prior.task.for_request(asked))
    if args.interpolate:
        picture = sheet_of_path(prior, batch["image"], args.interpolate, args.seed, options, args.batch)
        pictures.save_png(picture, args.out)
        return [args.out]
    if prior.task.host is not None:
        batch = prior.task.host(batch)
    drawn = draw_samples(prior, batch, args.num, args.seed, options, args.batch)
    sources = np.asarray(_sources(prior.task, prior.frozen, of_the_task(batch)))
    return prior.task.save(batch, sources, drawn, args.out)


def main(arguments: list[str] | None = None) -> int:
    """Draw as the command line says; return the exit code."""
    args = _parser().parse_args(arguments)
    return cli.call(lambda: print(*run(args), sep="\n"), CheckpointError)


if __name__ == "__main__":
    sys.exit(main())
