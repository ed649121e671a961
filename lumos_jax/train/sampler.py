"""Samples from a trained run: its settings, frozen networks and weights, and compiled sampling programs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lumos_jax import config, data, diffusion, encoders, tasks
from lumos_jax.checkpoints import Checkpoints, transfer
from lumos_jax.checkpoints.checksums import checksums
from lumos_jax.config import io as config_io
from lumos_jax.tasks import denoising
from lumos_jax.tasks.sampling import Sampled, Sampling, repeat_rows
from lumos_jax.train import finetune, rngs, sharding
from lumos_jax.train.experiment import Experiment
from lumos_jax.train.items import make_generate
from lumos_jax.train.sharding import device_arrays

HELD_OUT = "held-out:"


@dataclasses.dataclass
class Progress:
    """How far sampling is.

    Attributes:
      total, done: sampling steps, of all batches.
      preview: what the network predicts now of the samples of this batch, uint8 (B, [F,] H, W, 3).
    """

    total: int
    done: int = 0
    preview: Callable[[], np.ndarray] | None = None


# Compiled once for each task, shape and kind of step in a process: `sampling`, which is hashed, holds the networks.
_compiled = functools.partial(jax.jit, static_argnames="sampling")


@_compiled
def _condition(sampling: Sampling, frozen: Any, batch: Any) -> Any:
    return sampling.condition(frozen, batch)


@_compiled
def _source_images(sampling: Sampling, frozen: Any, batch: Any) -> jax.Array:
    return sampling.source_images(frozen, batch)


@_compiled
def _start(sampling: Sampling, params: Any, condition: Any, noise: jax.Array) -> tuple:
    return sampling.prepare(params, condition), diffusion.start(noise)


@functools.partial(jax.jit, static_argnames=("sampling", "name", "how"))
def _step(sampling: Sampling, name: str, how: tuple, params: Any, conditions: Any, carry: Any, row: Any, key: jax.Array,
          scale: jax.Array | None) -> Any:  # fmt: skip
    return sampling.step(params, conditions, carry, row, key, scale, name, how)


@_compiled
def _pixels(sampling: Sampling, frozen: Any, latent: jax.Array) -> jax.Array:
    return sampling.pixels(frozen, latent)


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A trained run, ready to sample. See `load`.

    Attributes:
      experiment, params: of the run's settings, for sampling; the network's weights.
      sampling: the task's, as flags ask for.
      seed: of the starting noise.
      batch_size: samples generated at a time.
      step: of the checkpoint.
      on_step: called after each sampling step; what it raises ends the sampling.
    """

    experiment: Experiment
    params: Any
    sampling: Sampling
    seed: int = 0
    batch_size: int = 16
    step: int = 0
    on_step: Callable[[Progress], None] | None = None

    def with_flags(self, args: argparse.Namespace, settings: config.Settings) -> Sampler:
        """As the flags of `add_flags` and the task's own ask for. settings: as of `with_flags`; of them config.eval counts.
        Compiled programs are shared."""
        experiment = dataclasses.replace(self.experiment, settings=settings)
        sampling = self.experiment.task.sampling.with_flags(args)
        return dataclasses.replace(
            self, experiment=experiment, sampling=sampling, seed=args.seed, batch_size=args.batch
        )

    def run(self, args: argparse.Namespace) -> Sampled:
        """What the flags ask for; see Sampling.run."""
        return self.sampling.run(self, args)

    def load_image(self, path: str) -> np.ndarray:
        """A file, or "held-out:N" -> (S, S, 3) uint8. Raises ValueError if it cannot be read."""
        settings = self.experiment.settings.data
        if path.startswith(HELD_OUT):
            return held_out(settings, path)
        return data.load_image(path, settings.image_size)

    def noise(self, shape: tuple[int, ...]) -> jax.Array:
        """Starting noise."""
        return jax.random.normal(rngs.key(self.seed, "sample/noise"), shape)

    def condition(self, host: Mapping[str, np.ndarray]) -> Any:
        """The condition of each row of a host batch."""
        return _condition(self.sampling, self.experiment.frozen, device_arrays(host))

    def source_images(self, host: Mapping[str, np.ndarray]) -> np.ndarray:
        """See Sampling.source_images."""
        return np.asarray(_source_images(self.sampling, self.experiment.frozen, device_arrays(host)))

    def generate(self, condition: Any, noise: jax.Array, lower_last: bool = False) -> np.ndarray:
        """A sample for every row of `condition` and `noise`, `batch_size` at a time: uint8 (B, [F,] H, W, 3).

        Rows are independent for the deterministic samplers (dpm++, ddim, euler, heun): their samples do not depend on
        `batch_size`. The steps are compiled once for each shape, whatever their number. lower_last: as of `diffusion.sample`.
        """
        experiment, used = self.experiment, self.experiment.settings.eval
        total, size, samples = noise.shape[0], self.batch_size, []
        key = rngs.key(self.seed, "sample/sampler")
        stages = diffusion.stages(
            experiment.task.process, sampler=used.sampler, steps=used.steps, lower_last=lower_last
        )
        firsts = range(0, total, size)
        progress = Progress(total=len(firsts) * used.steps)
        for number, first in enumerate(firsts):
            rows = np.minimum(np.arange(first, first + size), total - 1)  # the last batch is padded: one compiled shape
            part = jax.tree.map(lambda a, rows=rows: a[rows], (condition, noise))
            if size % experiment.mesh.size == 0:
                part = jax.device_put(part, sharding.batch_layout(experiment.mesh))
            latent = self._steps(*part, stages, jax.random.fold_in(key, number), progress, total - first)
            samples.append(self._pixels(latent, total - first))
        return np.concatenate(samples)

    def _steps(
        self, condition: Any, noise: jax.Array, stages: Any, key: jax.Array, progress: Progress, count: int
    ) -> Any:
        """The latents of one batch, of which `count` rows are wanted."""
        used = self.experiment.settings.eval
        scale = np.asarray(self.sampling.guidance(used.guidance), np.float32)
        scale = None if np.all(scale == 1) else scale
        conditions, carry = _start(self.sampling, self.params, condition, noise)
        for name, tables in stages:
            how = self.sampling, name, (used.guidance_interval, used.guidance_rescale)
            for index in range(len(tables["index"])):
                row = {column: table[index] for column, table in tables.items()}
                carry = _step(*how, self.params, conditions, carry, row, key, scale)
                progress.done += 1
                if self.on_step is not None:
                    jax.block_until_ready(carry)
                    progress.preview = functools.partial(self._pixels, carry[1], count)
                    self.on_step(progress)
        return carry[0]

    def _pixels(self, latent: jax.Array, count: int) -> np.ndarray:
        """The first `count` rows, decoded."""
        return np.asarray(_pixels(self.sampling, self.experiment.frozen, latent))[:count]

    @functools.cached_property
    def _generate_items(self) -> Any:
        return jax.jit(make_generate(self.experiment, self.sampling, self.seed))

    def generate_items(self, host: Mapping[str, np.ndarray], numbers: np.ndarray) -> np.ndarray:
        """A sample for every row of a host batch, from the noise of its item's number (B,): uint8 (B, [F,] H, W, 3)."""
        inputs = (device_arrays(host), numbers)
        if len(numbers) % self.experiment.mesh.size == 0:
            inputs = jax.device_put(inputs, sharding.batch_layout(self.experiment.mesh))
        return np.asarray(self._generate_items(self.params, self.experiment.frozen, *inputs))

    def protocol(self) -> dict[str, Any]:
        """What decides the samples of items, besides their list: plain values."""
        used, task = self.experiment.settings.eval, self.experiment.task
        sums = json.dumps(checksums(self.params), sort_keys=True)
        return {
            "task": task.name,
            "step": self.step,
            "weights_digest": hashlib.sha256(sums.encode()).hexdigest(),
            "networks": {group: identity.rpartition("@")[2] for group, identity in sorted(task.identity.items())},
            **{name: getattr(used, name) for name in _PROTOCOL},
            "seed": self.seed,
            "image_size": self.experiment.settings.data.image_size,
            "latent_shape": list(self.sampling.latent_shape),
        }

    def samples(self, host: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """`count` samples for each of R rows of a host batch: uint8 (R, count, [F,] H, W, 3).

        Rows of one `record`, such as the views of an orbit, start from the same noise, so that only their conditions differ.
        """
        rows = len(next(iter(host.values())))
        records, which = np.unique(host.get("record", np.arange(rows)), return_inverse=True)
        shape = self.sampling.latent_shape
        noise = self.noise((len(records), count, *shape))[which].reshape(rows * count, *shape)
        samples = self.generate(repeat_rows(self.condition(host), count), noise)
        return samples.reshape(rows, count, *samples.shape[1:])


_PROTOCOL = ("sampler", "steps", "guidance", "guidance_interval", "guidance_rescale")


def add_flags(parser: argparse.ArgumentParser, batch: int, by: str = "") -> None:
    """Adds the flags of any sampling: the run, its weights, and how they are sampled. batch: the default, generated `by`."""
    add = parser.add_argument
    add("--workdir", required=True, metavar="RUN", help="directory of the run")
    add("--sampler", choices=tuple(diffusion.SAMPLERS), help="default: config.eval.sampler of the run")
    add("--steps", type=int, help="sampling steps; default: config.eval.steps")
    add("--guidance", type=float, metavar="SCALE", help="guidance scale, 1 for none; default: config.eval.guidance")
    add("--seed", type=int, default=0, help="of the starting noise; default: 0")
    add("--batch", type=int, default=batch, metavar="SIZE", help=f"samples generated at a time{by}; default: {batch}")
    add("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    add("--weights", choices=("ema", "params"), default="ema", help="EMA or raw parameters; default: ema")
    for group in ("encoder", "autoencoder"):
        add(f"--{group}-weights", metavar="PATH", help=f"new location of config.{group}.weights, if they have moved")


def with_flags(settings: config.Settings, args: argparse.Namespace) -> config.Settings:
    """The run's settings as the flags of `add_flags` change them. Raises ValueError for values that are not allowed."""
    changes = {f"eval.{name}": getattr(args, name) for name in ("sampler", "steps", "guidance")}
    changes |= {"encoder.weights": args.encoder_weights, "autoencoder.weights": args.autoencoder_weights}
    settings = config.replace(settings, {name: value for name, value in changes.items() if value is not None})
    config.validate(settings)
    return settings


def load_settings(workdir: str) -> tuple[config.Settings, type[Sampling]]:
    """The settings of a run, and how its task samples. Raises ValueError if there is no such run, or nothing to sample."""
    settings = config_io.load(pathlib.Path(workdir) / "config.json")
    kind = tasks.task_class(settings.task.name).sampling_class
    if kind is None:
        raise ValueError(
            f"{workdir} trained an encoder (config.task.name={settings.task.name}), which generates nothing; look at "
            f"{workdir}/samples"
        )
    return settings, kind


def load(
    workdir: str,
    settings: config.Settings,
    step: int | None = None,
    weights: str = "ema",
    devices: Sequence[jax.Device] | None = None,
    **fields: Any,
) -> Sampler:
    """Loads a run's weights: "ema", or the raw "params".

    Args:
      settings: of the run; paths of frozen weights and config.eval may differ from what the run saved.
      step: of the checkpoint; None takes the newest.
      devices: to sample on; None takes all of them.
      fields: of the Sampler.

    Raises:
      ValueError: no such checkpoint, or the frozen networks are not those of the training run.
    """
    checkpoints = Checkpoints(workdir)
    step = checkpoints.find(step)
    experiment = Experiment.build(settings, devices, training=False)
    saved = checkpoints.meta(step)
    for group, identity in experiment.task.identity.items():
        trained_with = saved["fingerprints"].get(group, identity)  # imported weights do not say
        if not encoders.same_content(identity, trained_with):  # names may differ
            raise ValueError(
                f"config.{group}.weights={getattr(settings, group).weights!r} is not the network that this run was trained "
                f"with: {trained_with} then, {identity} now"
            )
    everywhere = sharding.replicated(experiment.mesh)
    shapes = jax.eval_shape(experiment.task.network.init, rngs.key(0, "init"))
    stored = finetune.read_weights(checkpoints, step, weights, everywhere)
    params, _ = transfer(stored, shapes, origin=workdir, drop=denoising.ALIGN.gone)
    checkpoints.close()
    return Sampler(experiment, params, experiment.task.sampling, step=step, **fields)


def held_out(settings: config.Data, name: str) -> np.ndarray:
    """ "held-out:N" -> the image (S, S, 3) uint8 of the run's held-out record N: the input of two views, the first frame of a
    clip. Raises ValueError if there is no such record, or it cannot be decoded."""
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
        raise ValueError(f"{name}: config.data.source={settings.source} holds no images; give a file")
    return batch.get("input", batch["image"])[0]
