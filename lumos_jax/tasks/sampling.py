"""How a diffusion task samples: its command-line flags, condition, guidance and decoding, and how people look at the samples.

condition -> guided sampler (one compiled program per shape) -> latents -> pixels -> a sheet, or files
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, diffusion, fileio
from lumos_jax.models import Condition
from lumos_jax.tasks import media

Host = Mapping[str, np.ndarray]  # a batch as it was read, R rows
Conditions = Sequence[Mapping[str, Any]]  # by name, one a sample
Load = Callable[[str], np.ndarray]  # path of an image -> (S, S, 3) uint8


class Sampled(NamedTuple):
    """What `run` sampled: the host batch, R `source_images` and samples uint8 (R, n, [F,] H, W, 3), as `save` takes them."""

    host: Host
    sources: np.ndarray
    samples: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Base class, frozen and hashable; a task's own class, in the task's file, overrides what differs.

    Attributes:
      task: the task, a denoising.Denoising.
      latent_shape: ([F,] h, w, c) of the samples; the task's own, unless flags ask for another.
      endings: file names that --out may have; the first is that of the default name.
      needs: what a condition of `inputs` must have.
    """

    endings: ClassVar[tuple[str, ...]] = (".png",)
    needs: ClassVar[tuple[str, ...]] = ()
    task: Any
    latent_shape: tuple[int, ...]

    # The command line of `lumos_jax.sample`.

    @classmethod
    def add_flags(cls, parser: argparse._ArgumentGroup) -> None:
        """Adds the flags that say what to sample."""

    def with_flags(self, args: argparse.Namespace) -> Sampling:
        """As the flags ask for, such as another latent shape. Raises ValueError for values that are impossible."""
        return self

    def sample_inputs(self, args: argparse.Namespace, load: Load) -> dict[str, np.ndarray]:
        """The host batch that the flags describe, one row a condition; errors as of `inputs`."""
        raise NotImplementedError

    def inputs(self, conditions: Conditions, load: Load) -> dict[str, np.ndarray]:
        """The host batch of conditions by name, a row each: image (a path), caption, label, azimuth and elevation (degrees),
        fps and motion. Each task reads its own; `needs` must be there.

        Raises:
          ValueError: values that are impossible, images that cannot be read.
        """
        return {"row": np.zeros(len(conditions), np.int32)}

    def run(self, sampler: Any, args: argparse.Namespace) -> Sampled:
        """Samples as the flags say with a train.sampler.Sampler; `save` writes them."""
        host = self.sample_inputs(args, sampler.load_image)
        if self.task.host is not None:
            host = self.task.host(host)
        return Sampled(host, sampler.source_images(host), sampler.samples(host, args.num))

    @classmethod
    def files(cls, out: str) -> list[str]:
        """The files that `save` writes for --out=`out`."""
        return [out]

    # Compiled.

    def condition(self, frozen: Any, batch: Mapping[str, jax.Array]) -> Condition:
        """The condition of each row of a batch, without randomness."""
        return self.task.condition(frozen, batch)

    def guidance(self, scale: float) -> float | np.ndarray:
        """The guidance scale, or scales that broadcast to (B, *latent_shape)."""
        return scale

    def decode(self, frozen: Any, latent: jax.Array) -> jax.Array:
        """(B, [F,] h, w, c) -> pixels (B, [F,] H, W, 3) float32 in [-1, 1]."""
        return self.task.autoencoder.decode(frozen["autoencoder"], latent)

    def source_images(self, frozen: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The batch's images, uint8 (B, H, W, 3), to be shown: decoded from the latents' mean where there is no `image`, and
        without pixels where there is neither."""
        if "image" in batch:
            return batch["image"]
        if "latent" in batch:
            return self.pixels(frozen, self.task.autoencoder.mean(batch["latent"]))
        return jnp.zeros((len(next(iter(batch.values()))), 0, 0, 3), jnp.uint8)

    def generate(self, params: Any, frozen: Any, condition: Condition, noise: jax.Array, key: jax.Array,
                 settings: config.Eval, gather: Callable | None = None, lower_last: bool = False) -> jax.Array:  # fmt: skip
        """One sample a row of `condition` and `noise` (B, *latent_shape): pixels uint8 (B, [F,] H, W, 3).

        settings: sampler, steps and guidance. gather: as for `models.Network.apply`. lower_last: as of `diffusion.sample`.
        """
        condition, null = self.prepare(params, condition)
        scale, how = self.guidance(settings.guidance), (settings.guidance_interval, settings.guidance_rescale)
        denoise = self._denoiser(params, condition, null, scale, how, gather)
        how = {"sampler": settings.sampler, "steps": settings.steps, "lower_last": lower_last}
        latent = diffusion.sample(self.task.process, denoise, noise, key, **how)
        return self.pixels(frozen, latent)

    def _denoiser(self, params: Any, condition: Condition, null: Condition, scale: Any, how: tuple,
                  gather: Callable | None = None) -> Callable:  # fmt: skip
        """Of `diffusion.guided`. how: guidance interval and rescale."""
        return diffusion.guided(
            lambda x, time, condition: self.task.network.apply(params, x, time, condition, gather=gather),
            condition, null, scale=scale, interval=how[0], rescale=how[1], process=self.task.process,
        )  # fmt: skip

    # The parts of `generate`, for samplers that stop between steps.

    def prepare(self, params: Any, condition: Condition) -> tuple[Condition, Condition]:
        """The condition as `step` takes it, and the null condition."""
        condition = self.task.network.project_camera(params, condition)
        return condition, self.task.network.null_condition(params, condition)

    def step(self, params: Any, conditions: tuple[Condition, Condition], carry: diffusion.Carry, row: diffusion.Tables,
             key: jax.Array, scale: jax.Array | None, name: str, how: tuple) -> diffusion.Carry:  # fmt: skip
        """One step of `diffusion.step`, guided by `scale`, or not at all (None). how: guidance interval and rescale."""
        denoise = self._denoiser(params, *conditions, 1.0 if scale is None else scale, how)
        return diffusion.step(self.task.process, denoise, carry, row, name=name, key=key)

    def pixels(self, frozen: Any, latent: jax.Array) -> jax.Array:
        """As `decode`, uint8."""
        return to_uint8(self.decode(frozen, latent))

    def generate_batch(self, params: Any, frozen: Any, batch: Mapping[str, jax.Array], keys: tuple[jax.Array, jax.Array],
                       count: int, settings: config.Eval, gather: Callable | None = None) -> jax.Array:  # fmt: skip
        """`count` samples for each row of the batch: uint8 (B, count, [F,] H, W, 3).

        keys: (starting noise, sampler); each one key, or a key for each of the B * count samples.
        """
        rows = next(iter(batch.values())).shape[0]
        condition = repeat_rows(self.condition(frozen, batch), count)
        noise = diffusion.normal_rows(keys[0], (rows * count, *self.latent_shape))
        samples = self.generate(params, frozen, condition, noise, keys[1], settings, gather)
        return samples.reshape(rows, count, *samples.shape[1:])

    # Looking at samples uint8 (R, n, *pixels); sources: the batch's `source_images`.

    def truth(self, host: Host) -> np.ndarray | None:
        """What a sample of each row should show, uint8 (R, [F,] H, W, 3); None where many images would do."""
        return None

    def sheet(self, host: Host, sources: np.ndarray, samples: np.ndarray, titles: Sequence[str] = ()) -> np.ndarray:
        """One image (H, W, 3) uint8 with rows (source, where there is one | sample | sample ...), `titles` above them."""
        rows = np.concatenate([sources[:, None], samples], axis=1) if sources.size else samples
        return media.image_grid(rows, titles=titles)

    def save(self, host: Host, sources: np.ndarray, samples: np.ndarray, out: str) -> list[str]:
        """Writes `files(out)` and returns their names."""
        fileio.save_png(self.sheet(host, sources, samples), out)
        return [out]


class ImageSampling(Sampling):
    """Of tasks that condition on images."""

    @classmethod
    def add_flags(cls, parser: argparse._ArgumentGroup) -> None:
        text = "images to condition on; held-out:N is the run's own held-out record N"
        parser.add_argument("--images", nargs="+", required=True, metavar="FILE", help=text)


class FeatureSampling(ImageSampling):
    """Of tasks that condition on features of images: a row of samples an image, or a path between two images' features."""

    needs = ("image",)

    @classmethod
    def add_flags(cls, parser: argparse._ArgumentGroup) -> None:
        super().add_flags(parser)
        text = "N samples on the path between exactly two images"
        parser.add_argument("--interpolate", type=int, default=0, metavar="N", help=text)

    def with_flags(self, args: argparse.Namespace) -> Sampling:
        if args.interpolate and (len(args.images) != 2 or args.interpolate < 2):
            raise ValueError(
                f"--interpolate={args.interpolate} needs N >= 2 and exactly two --images, got {len(args.images)}"
            )
        return self

    def sample_inputs(self, args: argparse.Namespace, load: Load) -> dict[str, np.ndarray]:
        return self.inputs([{"image": path} for path in args.images], load)

    def inputs(self, conditions: Conditions, load: Load) -> dict[str, np.ndarray]:
        return {"image": np.stack([load(condition["image"]) for condition in conditions])}

    def run(self, sampler: Any, args: argparse.Namespace) -> Sampled:
        """With --interpolate, one row of samples between two sources. The features are mixed linearly with weights 0,
        1/n .. (n-1)/n and not normalized again, all samples start from the same noise, and the last step's order is always
        lowered [official]."""
        if not args.interpolate:
            return super().run(sampler, args)
        host = self.sample_inputs(args, sampler.load_image)
        weights = jnp.arange(args.interpolate) / args.interpolate

        def mix(a):
            share = weights.reshape(-1, *[1] * (a.ndim - 1)).astype(a.dtype)
            return a[:1] * (1 - share) + a[1:] * share

        condition = jax.tree.map(mix, sampler.condition(host))
        noise = jnp.repeat(sampler.noise((1, *self.latent_shape)), args.interpolate, axis=0)
        return Sampled(host, host["image"], sampler.generate(condition, noise, lower_last=True)[None])

    def sheet(self, host: Host, sources: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """As of Sampling; a path, one row between two sources, ends with the second."""
        if len(samples) == len(sources):
            return super().sheet(host, sources, samples)
        return media.image_grid(np.concatenate([sources[:1], samples[0], sources[1:]])[None])


def check_output(sampling: type[Sampling], out: str) -> None:
    """Raises ValueError unless what --out=`out` names can be written; a missing folder is made."""
    if pathlib.Path(out).suffix.lower() not in sampling.endings:
        raise ValueError(f"--out={out}: the name must end in {' or '.join(sampling.endings)}")
    for file in sampling.files(out):
        media.check_writable(file, f"--out={out}")


def to_uint8(pixels: jax.Array) -> jax.Array:
    """[-1, 1] -> 0..255, rounded half up; values outside are clipped."""
    return jnp.clip(jnp.floor((pixels + 1) * 127.5 + 0.5), 0, 255).astype(jnp.uint8)


def repeat_rows(condition: Any, count: int) -> Any:
    """Every row `count` times in a row: (B, ...) -> (B * count, ...)."""
    return jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), condition)
