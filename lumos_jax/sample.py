"""Draws pictures with a trained prior.

python -m lumos_jax.sample --workdir=runs/desk --images a.jpg b.jpg --num=4 --out=grid.png
    one row an image: the source, then samples conditioned on it
python -m lumos_jax.sample --workdir=runs/desk --images a.jpg b.jpg --interpolate=12 --out=path.png
    one row: the first image, samples along the line between the two features, the second image

The sampler's settings default to the run's own (config.eval).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, config_io, config_rules, data, tasks
from lumos_jax.checkpoints import CheckpointError, Checkpoints, transfer
from lumos_jax.tasks import pictures, sampling
from lumos_jax.train import finetune, rngs, sharding

USER_ERROR = 2


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
    task, frozen = tasks.make_task(settings)
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
    return Prior(settings, task, jax.device_put(frozen, everywhere), params, mesh, step)


@functools.partial(jax.jit, static_argnames=("task", "options"))
def _draw(task, params, frozen, condition, noise, key, options):
    return sampling.draw(task, params, frozen, condition, noise, key, options)


@functools.partial(jax.jit, static_argnames="task")
def _condition(task, frozen, image):
    return task.condition(frozen, {"image": image})


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


def sheet_of_samples(prior: Prior, images: np.ndarray, count: int, seed: int, options, batch: int) -> np.ndarray:
    """images uint8 (R, S, S, 3) -> one picture with rows (source | sample | ...)."""
    condition = sampling.repeat_rows(_condition(prior.task, prior.frozen, jnp.asarray(images)), count)
    noise = jax.random.normal(rngs.key(seed, "sample/noise"), (len(images) * count, *prior.task.latent_shape))
    drawn = draw_rows(prior, condition, noise, rngs.key(seed, "sample/sampler"), options, batch)
    return pictures.sheet(
        np.concatenate([images[:, None], drawn.reshape(len(images), count, *drawn.shape[1:])], axis=1)
    )


def sheet_of_path(prior: Prior, images: np.ndarray, count: int, seed: int, options, batch: int) -> np.ndarray:
    """The path between two images' features: weights 0, 1/n .. (n-1)/n, mixed linearly and not normalised again, from one
    shared starting noise, with the last step's order always lowered, as the official release does it."""
    features = _condition(prior.task, prior.frozen, jnp.asarray(images))
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lumos_jax.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", required=True, help="the run's directory")
    add("--images", nargs="+", required=True, metavar="FILE", help="the images to condition on")
    add("--out", default="samples.png", help="the PNG to write (samples.png)")
    add("--num", type=int, default=4, help="samples an image (4)")
    add("--interpolate", type=int, default=0, metavar="N", help="draw N samples on the path between exactly two images")
    add("--sampler", choices=("ddpm", "ddim", "dpm++", "euler", "heun"), help="default: config.eval.sampler")
    add("--steps", type=int, help="sampling steps; default: config.eval.steps")
    add("--guidance", type=float, help="guidance scale, 1 for none; default: config.eval.guidance")
    add("--seed", type=int, default=0, help="of the starting noise (0)")
    add("--batch", type=int, default=16, help="samples drawn at a time (16)")
    add("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    add("--weights", choices=("ema", "params"), default="ema", help="running average (default) or raw parameters")
    return parser


def run(args: argparse.Namespace) -> pathlib.Path:
    """Draws as the command line says and returns the path of the picture.

    Raises:
      ValueError: a user's mistake: no such run, unreadable image, impossible options.
    """
    for name in ("num", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} must be at least 1")
    if args.interpolate and (len(args.images) != 2 or args.interpolate < 2):
        raise ValueError(
            f"--interpolate={args.interpolate} needs N >= 2 and exactly two --images, got {len(args.images)}"
        )
    prior = load(args.workdir, args.checkpoint, args.weights)
    changes = {"sampler": args.sampler, "steps": args.steps, "guidance": args.guidance}
    changes = {name: value for name, value in changes.items() if value is not None}
    settings = dataclasses.replace(prior.settings, eval=dataclasses.replace(prior.settings.eval, **changes))
    config_rules.validate(settings)
    options = sampling.options_of(settings.eval)
    images = np.stack([data.load_image(path, prior.settings.data.image_size) for path in args.images])
    draw, count = (sheet_of_path, args.interpolate) if args.interpolate else (sheet_of_samples, args.num)
    pictures.save_png(draw(prior, images, count, args.seed, options, args.batch), args.out)
    return pathlib.Path(args.out)


def main(argv: list[str] | None = None) -> int:
    """Draws as the command line says; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        path = run(args)
    except (ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
