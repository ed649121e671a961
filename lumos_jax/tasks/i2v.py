"""Image to video: the frames that follow a picture (paper section 3.2, with the conditions of Stable Video Diffusion).

    x0     = latents of F frames
    tokens = feature of the first frame
    latent = mode(first frame + sigma e), on every frame, unscaled;   log sigma ~ N(-3, 0.5), pixels in [-1, 1]
    vector = (frames a second, motion id, 1000 sigma)

The network is the image prior with attention over frames, which starts as the identity: at first each frame is what the prior
makes of it. A batch of pictures (B, h, w, c) passes that attention by, has no vector and zero latents: it is the I2I objective,
unchanged, so that training on pictures in between keeps the prior and does not pull at the attention over frames.

Dropout: tokens and latents each with task.condition_dropout, independently of each other, vectors never, as SVD's conditioner
does it; its rates are not known.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, encoders
from lumos_jax.models import Condition
from lumos_jax.tasks import clips, denoising, pictures, requests
from lumos_jax.tasks.handoffs import Handoff

MOTION_IDS = 256
NUMBERS = 3  # of the vector
_LEVEL = 1000.0  # sigma is embedded in thousandths: sinusoids tell whole numbers apart


def _named(key: jax.Array, name: str) -> jax.Array:
    """A stream of its own, folded from another's key."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


@dataclasses.dataclass(frozen=True)
class ImageToVideo(denoising.Denoising):
    """The I2V task; see tasks.base for the interface.

    Batches of clips hold `frames` uint8 (B, F, H, W, 3), `fps` and `motion` (B,) float32; of pictures, `image`. For drawing
    only the first of the frames counts.
    """

    video: config.Video
    name: str = "i2v"

    def handoff(self) -> Handoff:
        """From an image prior: attention over frames and the vector's embedder are new, the input has more channels."""
        return super().handoff() | Handoff(
            new=("blocks/temporal/*", "vector/*"),
            refit=("tokens/fc1/*", "null/tokens"),
            widened=("patch/kernel",),
        )

    def draw_drop(self, key: jax.Array, size: int) -> dict[str, jax.Array]:
        def rows(name):
            return jax.random.bernoulli(_named(key, name), self.condition_dropout, (size,))

        return {"tokens": rows("tokens"), "latent": rows("latent"), "vector": jnp.zeros(size, bool)}

    def prepare(self, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Condition]:
        if "image" in batch:
            x0 = self.latents(frozen, batch, key)
            return x0, Condition(
                tokens=self.encoder.apply(frozen["encoder"], batch["image"]), latent=jnp.zeros_like(x0)
            )
        shape = batch["frames"].shape
        flat = self.latents(frozen, {"image": batch["frames"].reshape(-1, *shape[2:])}, key)
        draw = jax.random.normal(_named(key, "augmentation level"), shape[:1])
        sigma = jnp.exp(self.video.noise_log_mean + self.video.noise_log_std * draw)
        condition = self._condition(frozen, batch, shape[1], sigma, _named(key, "augmentation"))
        return flat.reshape(*shape[:2], *flat.shape[1:]), condition

    def condition(self, frozen: Any, batch: Mapping[str, jax.Array]) -> Condition:
        # For drawing: the same little noise every time, so that a picture has one condition.
        sigma = jnp.full(batch["frames"].shape[:1], self.video.noise_aug_strength)
        return self._condition(frozen, batch, self.latent_shape[0], sigma, jax.random.key(0))

    def _condition(self, frozen, batch, frames: int, sigma: jax.Array, key: jax.Array) -> Condition:
        """sigma (B,): standard deviation of the noise, drawn from `key`, on the first frame that every frame sees."""
        first = batch["frames"][:, 0]
        noise = sigma[:, None, None, None] * jax.random.normal(key, first.shape)
        latent = self.autoencoder.mode(frozen["autoencoder"], first.astype(jnp.float32) + 127.5 * noise)
        motion = jnp.clip(jnp.floor(batch["motion"] / self.video.motion_step), 0, MOTION_IDS - 1)
        return Condition(
            tokens=self.encoder.apply(frozen["encoder"], first),
            vector=jnp.stack([batch["fps"], motion, _LEVEL * sigma], axis=-1),
            latent=jnp.repeat(latent[:, None], frames, axis=1),
        )

    def encode(self, frozen: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        raise ValueError("config.data.sample_type=clip: clips are not cached; train on them as they are")

    def decode(self, frozen: Any, latent: jax.Array) -> jax.Array:
        if latent.ndim == 4:
            return super().decode(frozen, latent)
        # Clip by clip: the decoder needs far more memory for a frame than the network.
        return jax.lax.map(lambda frames: self.autoencoder.decode(frozen["autoencoder"], frames), latent)

    def shuffled(self, condition: Condition) -> Condition:
        """First frames exchanged; each clip keeps its own speed and motion."""
        return dataclasses.replace(super().shuffled(condition), vector=condition.vector)

    def guidance(self, scale: float) -> np.ndarray:
        """(1, F, 1, 1, 1): rising linearly over the frames, to `scale` at the last."""
        scales = np.linspace(self.video.min_guidance_scale, scale, self.latent_shape[0], dtype=np.float32)
        return scales.reshape(1, -1, 1, 1, 1)

    def source_pictures(self, frozen: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        return batch["frames"]

    def truth(self, host: Mapping[str, np.ndarray]) -> np.ndarray:
        """What the clip really shows; of moving solids, whose way the first frame does not tell, one of many ways."""
        return host["frames"]

    def sheet(self, host: Mapping[str, np.ndarray], sources: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Frames side by side: a row of the true clip over a row for each sample."""
        rows = np.concatenate([sources[:, None], drawn], axis=1)
        return pictures.sheet(rows.reshape(-1, *rows.shape[2:]))

    def request(self, asked: Mapping[str, Any], load: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        requests.check(asked, ("images",), ("frames", "fps", "motion"))
        fps, motion = asked.get("fps", self.video.sample_fps), asked.get("motion", self.video.motion_bucket_id)
        if not 0 < fps <= 240 or not 0 <= motion < MOTION_IDS:
            raise ValueError(
                f"--fps={fps} must be above 0 and at most 240, --motion={motion} from 0 to {MOTION_IDS - 1}"
            )
        images = np.stack([load(path) for path in asked["images"]])
        return {
            "frames": images[:, None],
            "fps": np.full(len(images), fps, np.float32),
            "motion": np.full(len(images), (motion + 0.5) * self.video.motion_step, np.float32),
        }

    def for_request(self, asked: Mapping[str, Any]) -> ImageToVideo:
        frames = asked.get("frames", self.latent_shape[0])
        if frames < 1:
            raise ValueError(f"--frames={frames} must be at least 1")
        return dataclasses.replace(self, latent_shape=(frames, *self.latent_shape[1:]))

    def save(self, host: Mapping[str, np.ndarray], sources: np.ndarray, drawn: np.ndarray, out: str) -> Sequence[str]:
        """An MP4 and a GIF of that name: a row for each picture, which stands still beside its samples."""
        still = np.broadcast_to(sources[:, None, :1], (len(drawn), 1, *drawn.shape[2:]))
        grid = np.concatenate([still, drawn], axis=1)  # (R, 1 + n, F, H, W, 3)
        frames = np.stack([pictures.sheet(grid[:, :, i]) for i in range(grid.shape[2])])
        return clips.save(frames, out, float(host["fps"][0]))


def make_i2v(settings: config.Settings, place: encoders.Placement | None = None) -> tuple[ImageToVideo, dict[str, Any]]:
    """The task and its frozen parameters {"encoder", "autoencoder"}, loaded as the settings name them; see tasks.make_task.

    Raises:
      ValueError: records that are no clips; weights that cannot be found or do not fit; sizes that do not divide.
    """
    if settings.data.sample_type != "clip":
        raise ValueError(
            f"config.data.sample_type={settings.data.sample_type!r}: this task trains on clips; set it to clip"
        )
    return denoising.make(
        ImageToVideo, settings, place, *encoders.make_encoder(settings.encoder, place),
        network={"vector_dim": NUMBERS, "vector_kind": "numbers", "temporal": True},
        concatenated=True,
        frames=settings.data.frames,
        video=settings.video,
    )  # fmt: skip
