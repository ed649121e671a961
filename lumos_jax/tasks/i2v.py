"""Image to video: the frames that follow an image (paper section 3.2, with the conditions of Stable Video Diffusion).

    x0     = latents of F frames
    tokens = feature of the first frame
    latent = mode(first frame + sigma e), on every frame, unscaled;   log sigma ~ N(-3, 0.5), pixels in [-1, 1]
    vector = (frames a second, motion id, 1000 sigma)

The network is the image prior with attention over frames, which starts as the identity: at first each frame is what the prior
makes of it. A batch of images (B, h, w, c) skips that attention, has no vector and zero latents: it is the I2I objective,
unchanged, so that training on images in between keeps the prior and has no gradient for the attention over frames.

Dropout: tokens and latents each with task.condition_dropout, independently, vectors never, as SVD's conditioner does it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import zlib
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, encoders
from lumos_jax.config.fields import above
from lumos_jax.models import Condition
from lumos_jax.tasks import denoising, media
from lumos_jax.tasks.base import Batch, Handoff
from lumos_jax.tasks.sampling import Conditions, Host, ImageSampling, Load, Sampling

MOTION_IDS = 256
_LEVEL = 1000.0  # sigma is embedded in thousandths: sinusoids tell integers apart
FPS, MOTION = 8.0, 127  # of samples, unless the flags say
FIRST_GUIDANCE = 1.0  # scale at the first frame; that of the run is the last one's (SVD)
SAMPLE_NOISE = 0.02  # on the first frame in sampling (SVD)
NOISE_LOG_MEAN, NOISE_LOG_STD = -3.0, 0.5  # of the noise on the first frame in training, pixels in [-1, 1] (SVD)


@dataclasses.dataclass(frozen=True)
class Settings(config.Task):
    """Clips from their first frame (configs/i2v.py). The guidance scale rises over frames, from 1 to eval.guidance."""

    motion_step: Annotated[float, above(0), "motion score per motion id, of which there are 256"] = 1 / 32


def _named(key: jax.Array, name: str) -> jax.Array:
    """A stream of its own, folded from another's key."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


class ClipSampling(ImageSampling):
    """Clips that begin with an image."""

    needs = ("image",)
    endings: ClassVar[tuple[str, ...]] = (".gif", ".mp4", ".png")  # any of them stands for both files

    @classmethod
    def add_flags(cls, parser: argparse._ArgumentGroup) -> None:
        super().add_flags(parser)
        add = parser.add_argument
        add("--frames", type=int, metavar="N", help="frames of a clip; default: as in training")
        add("--fps", type=float, default=FPS, help=f"frames a second; default: {FPS:g}")
        add("--motion", type=int, default=MOTION, metavar="ID", help=f"how much moves, 0 to 255; default: {MOTION}")

    def with_flags(self, args: argparse.Namespace) -> Sampling:
        frames = self.latent_shape[0] if args.frames is None else args.frames
        if frames < 1:
            raise ValueError(f"--frames={frames} must be at least 1")
        return dataclasses.replace(self, latent_shape=(frames, *self.latent_shape[1:]))

    def sample_inputs(self, args: argparse.Namespace, load: Load) -> dict[str, np.ndarray]:
        fps, motion = args.fps, args.motion
        if not 0 < fps <= 240 or not 0 <= motion < MOTION_IDS:
            raise ValueError(
                f"--fps={fps} must be above 0 and at most 240, --motion={motion} from 0 to {MOTION_IDS - 1}"
            )
        return self.inputs([{"image": path, "fps": fps, "motion": motion} for path in args.images], load)

    def inputs(self, conditions: Conditions, load: Load) -> dict[str, np.ndarray]:
        motion = np.array([condition.get("motion", MOTION) for condition in conditions], np.float32)
        return {
            "frames": np.stack([load(condition["image"]) for condition in conditions])[:, None],
            "fps": np.array([condition.get("fps", FPS) for condition in conditions], np.float32),
            "motion": (motion + np.float32(0.5)) * np.float32(self.task.video.motion_step),
        }

    def condition(self, frozen: Any, batch: Batch) -> Condition:
        # The same noise on the first frame every time and in every row, so that an image has one condition.
        first = batch["frames"][:, 0]
        noise = jnp.broadcast_to(jax.random.normal(jax.random.key(0), first.shape[1:])[None], first.shape)
        sigma = jnp.full(first.shape[:1], SAMPLE_NOISE)
        return self.task.clip_condition(frozen, batch, self.latent_shape[0], sigma, noise)

    def guidance(self, scale: float) -> np.ndarray:
        """(1, F, 1, 1, 1): rising linearly over the frames, to `scale` at the last."""
        scales = np.linspace(FIRST_GUIDANCE, scale, self.latent_shape[0], dtype=np.float32)
        return scales.reshape(1, -1, 1, 1, 1)

    def decode(self, frozen: Any, latent: jax.Array) -> jax.Array:
        # Clip by clip: the decoder needs far more memory for a frame than the network.
        decode = functools.partial(super().decode, frozen)
        return decode(latent) if latent.ndim == 4 else jax.lax.map(decode, latent)

    def source_images(self, frozen: Any, batch: Batch) -> jax.Array:
        return batch["frames"]

    def truth(self, host: Host) -> np.ndarray:
        """The true clip; where solids move, which the first frame does not show, one of many possible ones."""
        return host["frames"]

    def sheet(self, host: Host, sources: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Frames side by side: a row of the true clip above a row for each sample."""
        rows = np.concatenate([sources[:, None], samples], axis=1)
        return media.image_grid(rows.reshape(-1, *rows.shape[2:]))

    @classmethod
    def files(cls, out: str) -> list[str]:
        return media.clip_files(out)

    def save(self, host: Host, sources: np.ndarray, samples: np.ndarray, out: str) -> list[str]:
        """An MP4 and a GIF of that name: a row for each image, which stands still beside its samples."""
        still = np.broadcast_to(sources[:, None, :1], (len(samples), 1, *samples.shape[2:]))
        grid = np.concatenate([still, samples], axis=1)  # (R, 1 + n, F, H, W, 3)
        frames = np.stack([media.image_grid(grid[:, :, i]) for i in range(grid.shape[2])])
        return media.save_clip(frames, out, float(host["fps"][0]))


@dataclasses.dataclass(frozen=True)
class ImageToVideo(denoising.Denoising):
    """The I2V task. Batches of clips hold `frames` uint8 (B, F, H, W, 3), `fps`, `motion` (B,) float32; of images, `image`."""

    name: ClassVar[str] = "i2v"
    sample_type: ClassVar[str] = "clip"
    sampling_class: ClassVar[type[Sampling]] = ClipSampling
    uncacheable: ClassVar[str] = "config.data.sample_type=clip: clips are not cached; train on them as they are"
    settings_class: ClassVar[type[config.Task]] = Settings
    video: Settings

    @classmethod
    def build(cls, settings: config.Settings, place: encoders.Placement | None) -> tuple[ImageToVideo, dict[str, Any]]:
        return denoising.make(
            cls, settings, place, *encoders.make_encoder(settings.encoder, place, settings.model.dtype),
            network={"vector_dim": 3, "vector_kind": "numbers", "temporal": True},
            concatenated=True,
            frames=settings.data.clips.frames,
            video=settings.task,
        )  # fmt: skip

    def handoff(self) -> Handoff:
        """From an image prior: attention over frames and the vector's embedder are new, the input has more channels."""
        return super().handoff() | Handoff(
            new=("blocks/temporal/*", "vector/*"), refit=("tokens/fc1/*", "null/tokens"), widened=("patch/kernel",)
        )

    def dropout_masks(self, key: jax.Array, size: int) -> dict[str, jax.Array]:
        def rows(name):
            return jax.random.bernoulli(_named(key, name), self.condition_dropout, (size,))

        return {"tokens": rows("tokens"), "latent": rows("latent"), "vector": jnp.zeros(size, bool)}

    def prepare(self, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Condition]:
        if "image" in batch:
            x0 = self.latents(frozen, batch, key)
            return x0, Condition(tokens=self.image_features(frozen, batch), latent=jnp.zeros_like(x0))
        shape = batch["frames"].shape
        flat = self.latents(frozen, {"image": batch["frames"].reshape(-1, *shape[2:])}, key)
        normal = jax.random.normal(_named(key, "augmentation level"), shape[:1])
        sigma = jnp.exp(NOISE_LOG_MEAN + NOISE_LOG_STD * normal)
        noise = jax.random.normal(_named(key, "augmentation"), (shape[0], *shape[2:]))
        condition = self.clip_condition(frozen, batch, shape[1], sigma, noise)
        return flat.reshape(*shape[:2], *flat.shape[1:]), condition

    def clip_condition(self, frozen: Any, batch: Batch, frames: int, sigma: jax.Array, noise: jax.Array) -> Condition:
        """The condition of clips of so many frames; of the batch's frames only the first counts.

        sigma: (B,) standard deviation of the noise on the first frame that is concatenated to every frame. noise: of standard
        deviation 1, as the first frames.
        """
        first = batch["frames"][:, 0]
        noise = 127.5 * (sigma[:, None, None, None] * noise)
        latent = self.autoencoder.mode(frozen["autoencoder"], first.astype(jnp.float32) + noise)
        motion = jnp.clip(jnp.floor(batch["motion"] / self.video.motion_step), 0, MOTION_IDS - 1)
        return Condition(
            tokens=self.encoder.apply(frozen["encoder"], first),
            vector=jnp.stack([batch["fps"], motion, _LEVEL * sigma], axis=-1),
            latent=jnp.repeat(latent[:, None], frames, axis=1),
        )

    def shuffled(self, condition: Condition) -> Condition:
        """First frames exchanged; each clip keeps its own speed and motion."""
        return dataclasses.replace(super().shuffled(condition), vector=condition.vector)


TASK = ImageToVideo
