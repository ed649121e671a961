"""Novel view synthesis: one image of an object, and how the camera moves -> the image from there.

Zero-1-to-3's conditions (Liu et al. 2023) on the Lumos prior: every token of the frozen feature of the input view, with the
four numbers of the relative camera beside it, goes through a projection that starts as the identity; the input view's latent,
the posterior's mode and unscaled, is concatenated on channels. So at the hand-off the network still is the prior. The noise
schedule stays the prior's, so that what it learned transfers [inferred].

With config.task.camera = bilinear the numbers also multiply each token, see models.conditioning.CameraProjection, and are
embedded into the timestep embedding, in degrees, through a layer that starts at zero.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, encoders, fileio
from lumos_jax.models import Condition
from lumos_jax.tasks import denoising, media
from lumos_jax.tasks.base import Batch, Handoff
from lumos_jax.tasks.sampling import Conditions, Host, ImageSampling, Load, Sampling

CAMERA_DIM = 4  # polar angle, sine and cosine of the azimuth, radius: target minus input
ORBIT = tuple(range(0, 360, 30))  # degrees

# One uniform number a record decides which parts of its condition are dropped: below the first, the input view's feature;
# below the second, feature and latent; below the third, the latent (Lumos).
DROPOUT = (0.05, 0.10, 0.15)


@dataclasses.dataclass(frozen=True)
class Settings(config.Task):
    """Novel view synthesis (configs/nvs.py)."""

    camera: Annotated[
        Literal["token", "bilinear"],
        "where the camera's numbers enter. token: beside each token of the feature (Zero-1-to-3); bilinear: they multiply the",
        "tokens as well, each by a learned matrix, and are in the timestep embedding, from which small networks learn left",
        "from right within minutes",
    ] = "token"


class OrbitSampling(ImageSampling):
    """Views of each image from cameras around it."""

    needs = ("image", "azimuth")

    @classmethod
    def add_flags(cls, parser: argparse._ArgumentGroup) -> None:
        super().add_flags(parser)
        add = functools.partial(parser.add_argument, type=float, metavar="DEGREES")
        text = "how far the camera goes around the object, counter-clockwise from above (0 30 .. 330)"
        add("--azimuths", nargs="+", default=ORBIT, help=text)
        add("--elevation", default=0.0, help="how far it rises (0)")

    def with_flags(self, args: argparse.Namespace) -> Sampling:
        if not all(map(math.isfinite, args.azimuths)) or not -90 <= args.elevation <= 90:
            raise ValueError(
                f"--azimuths {' '.join(map(str, args.azimuths))} --elevation {args.elevation}: both are degrees from the "
                "image's own camera, elevation from -90 to 90"
            )
        return self

    def sample_inputs(self, args: argparse.Namespace, load: Load) -> dict[str, np.ndarray]:
        """One row an image and azimuth; `record` numbers the images, whose views start from the same noise."""
        conditions = [
            {"image": path, "azimuth": azimuth, "elevation": args.elevation}
            for path in args.images
            for azimuth in args.azimuths
        ]
        record = np.repeat(np.arange(len(args.images)), len(args.azimuths))
        return self.inputs(conditions, load) | {"record": record}

    def inputs(self, conditions: Conditions, load: Load) -> dict[str, np.ndarray]:
        turns = np.radians([condition["azimuth"] for condition in conditions])
        # The polar angle is counted from above.
        up = -np.radians([condition.get("elevation", 0.0) for condition in conditions])
        camera = np.stack([up, np.sin(turns), np.cos(turns), np.zeros_like(turns)], axis=1).astype(np.float32)
        views = {path: load(path) for path in {condition["image"]: None for condition in conditions}}
        return {"input": np.stack([views[condition["image"]] for condition in conditions]), "camera": camera}

    def source_images(self, frozen: Any, batch: Batch) -> jax.Array:
        return batch["input"]

    def truth(self, host: Host) -> np.ndarray | None:
        return host.get("image")

    def sheet(self, host: Host, sources: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Rows of (input | true view | sample ...)."""
        return media.image_grid(np.concatenate([sources[:, None], host["image"][:, None], samples], axis=1))

    @classmethod
    def files(cls, out: str) -> list[str]:
        return [out, *media.clip_files(out)]

    def save(self, host: Host, sources: np.ndarray, samples: np.ndarray, out: str) -> list[str]:
        """A PNG, one row an image and sample (input | azimuth | azimuth ...), and a GIF and an MP4 of them turning."""
        images = host["record"].max() + 1
        views = samples.reshape(images, -1, *samples.shape[1:]).swapaxes(1, 2)  # (images, samples, azimuths, H, W, 3)
        rows = views.reshape(-1, *views.shape[2:])
        first = np.repeat(sources[:: views.shape[2]], views.shape[1], axis=0)
        fileio.save_png(media.image_grid(np.concatenate([first[:, None], rows], axis=1)), out)
        frames = np.stack([media.image_grid(view) for view in views.transpose(2, 0, 1, 3, 4, 5)])
        return [out, *media.save_clip(frames, out)]


@dataclasses.dataclass(frozen=True)
class NovelView(denoising.Denoising):
    """The NVS task; batches hold the target `image`, the `input` view and `camera` (B, 4)."""

    name: ClassVar[str] = "nvs"
    sample_type: ClassVar[str] = "views"
    sampling_class: ClassVar[type[Sampling]] = OrbitSampling
    settings_class: ClassVar[type[config.Task]] = Settings
    uncacheable: ClassVar[str] = "novel views train on pairs that each epoch samples anew: there is nothing to cache"

    @classmethod
    def build(cls, settings: config.Settings, place: encoders.Placement | None) -> tuple[NovelView, dict[str, Any]]:
        if settings.task.condition_dropout != config.Task().condition_dropout:
            raise ValueError(
                "config.task.condition_dropout is not for novel views, whose parts drop at rates of their own"
            )
        bilinear = settings.task.camera == "bilinear"
        network = {"camera_dim": CAMERA_DIM, "camera_turns": bilinear}
        return denoising.make(
            cls, settings, place, *encoders.make_encoder(settings.encoder, place, settings.model.dtype),
            network=network | {"vector_dim": CAMERA_DIM if bilinear else 0, "vector_kind": "numbers"},
            concatenated=True,
            condition_dropout=DROPOUT[1] - DROPOUT[0],  # of both parts
        )  # fmt: skip

    def handoff(self) -> Handoff:
        return super().handoff() | Handoff(
            new=("camera/*", "vector/*"), gone=("null/tokens",), refit=("tokens/fc1/*",), widened=("patch/kernel",)
        )

    def condition(self, frozen: Any, batch: Batch) -> Condition:
        feature = self.encoder.apply(frozen["encoder"], batch["input"])
        camera = jnp.broadcast_to(batch["camera"][:, None], (*feature.shape[:2], CAMERA_DIM))
        latent = self.autoencoder.mode(frozen["autoencoder"], batch["input"])
        vector = jnp.degrees(batch["camera"]) if self.network.vector_dim else None
        return Condition(tokens=jnp.concatenate([feature, camera], axis=-1), vector=vector, latent=latent)

    def dropout_masks(self, key: jax.Array, size: int) -> dict[str, jax.Array]:
        """One uniform number a row decides: the feature alone, both, or the latent alone. The camera stays."""
        u = jax.random.uniform(key, (size,))
        feature, both, latent = DROPOUT
        return {"tokens": u < both, "vector": jnp.zeros(size, bool), "latent": (u >= feature) & (u < latent)}

    def shuffled(self, condition: Condition) -> Condition:
        """Every row with the camera of the row before it and its own image."""
        camera = jnp.roll(condition.tokens[..., -CAMERA_DIM:], 1, axis=0)
        tokens = jnp.concatenate([condition.tokens[..., :-CAMERA_DIM], camera], axis=-1)
        vector = None if condition.vector is None else jnp.roll(condition.vector, 1, axis=0)
        return dataclasses.replace(condition, tokens=tokens, vector=vector)


TASK = NovelView
