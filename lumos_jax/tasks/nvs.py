"""Novel view synthesis: one picture of an object, and how the camera moves -> the picture from there.

Zero-1-to-3's conditions (Liu et al. 2023) on the Lumos prior: every token of the frozen feature of the input view, with the
four numbers of the relative camera beside it, goes through a projection that starts as the identity; the input view's latent,
the posterior's mode and unscaled, is concatenated on channels. So at the hand-off the network still is the prior. The noise
schedule stays the prior's, so that what it learned transfers [inferred].

A small network does not find within minutes what to do with four numbers beside many features: with config.nvs.camera =
turned they also turn each token, see models.conditioning.CameraProjection, and are embedded into the timestep embedding, in
degrees, through a layer that starts at zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, encoders
from lumos_jax.models import Condition
from lumos_jax.tasks import clips, denoising, pictures, requests
from lumos_jax.tasks.handoffs import Handoff

CAMERA_DIM = 4  # polar angle, sine and cosine of the azimuth, radius: target minus input
ORBIT = tuple(range(0, 360, 30))  # degrees, of `lumos_jax.sample` where nothing else is asked


@dataclasses.dataclass(frozen=True)
class NovelView(denoising.Denoising):
    """The NVS task; see tasks.base for the interface. Batches hold the target `image`, the `input` view and `camera` (B, 4).

    dropout: see config.Nvs.
    """

    dropout: tuple[float, float, float]
    name: str = "nvs"

    def handoff(self) -> Handoff:
        return super().handoff() | Handoff(
            new=("camera/*", "vector/*"), gone=("null/tokens",), refit=("tokens/fc1/*",), widened=("patch/kernel",)
        )

    # Training.

    def prepare(self, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Condition]:
        return self.latents(frozen, batch, key), self.condition(frozen, batch)

    def condition(self, frozen: Any, batch: Mapping[str, jax.Array]) -> Condition:
        feature = self.encoder.apply(frozen["encoder"], batch["input"])
        camera = jnp.broadcast_to(batch["camera"][:, None], (*feature.shape[:2], CAMERA_DIM))
        latent = self.autoencoder.mode(frozen["autoencoder"], batch["input"])
        vector = jnp.degrees(batch["camera"]) if self.dit.vector_dim else None
        return Condition(tokens=jnp.concatenate([feature, camera], axis=-1), vector=vector, latent=latent)

    def draw_drop(self, key: jax.Array, size: int) -> dict[str, jax.Array]:
        """One uniform number a row decides: the feature alone, both, or the latent alone. The camera stays."""
        u = jax.random.uniform(key, (size,))
        feature, both, latent = self.dropout
        return {"tokens": u < both, "vector": jnp.zeros(size, bool), "latent": (u >= feature) & (u < latent)}

    def encode(self, frozen: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        raise ValueError("novel views train on pairs that each epoch draws anew: there is nothing to cache")

    # Judging and showing.

    def shuffled(self, condition: Condition) -> Condition:
        """Every row with the camera of the row before it: its picture stays."""
        camera = jnp.roll(condition.tokens[..., -CAMERA_DIM:], 1, axis=0)
        tokens = jnp.concatenate([condition.tokens[..., :-CAMERA_DIM], camera], axis=-1)
        vector = None if condition.vector is None else jnp.roll(condition.vector, 1, axis=0)
        return dataclasses.replace(condition, tokens=tokens, vector=vector)

    def source_pictures(self, frozen: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        return batch["input"]

    def truth(self, host: Mapping[str, np.ndarray]) -> np.ndarray | None:
        return host.get("image")

    def sheet(self, host: Mapping[str, np.ndarray], sources: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Rows of (input | true view | sample ...)."""
        return pictures.sheet(np.concatenate([sources[:, None], host["image"][:, None], drawn], axis=1))

    # Orbits.

    def request(self, asked: Mapping[str, Any], load: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        """One row a picture and azimuth; `record` numbers the pictures."""
        requests.check(asked, ("images",), ("azimuths", "elevation"))
        azimuths, elevation = asked.get("azimuths", ORBIT), asked.get("elevation", 0.0)
        if not all(map(math.isfinite, azimuths)) or not -90 <= elevation <= 90:
            raise ValueError(
                f"--azimuths {' '.join(map(str, azimuths))} --elevation {elevation}: both are degrees from the picture's "
                "own camera, elevation from -90 to 90"
            )
        turns = np.radians(azimuths)
        up = np.full_like(turns, -np.radians(elevation))  # the polar angle is counted from above
        camera = np.stack([up, np.sin(turns), np.cos(turns), np.zeros_like(turns)], axis=1).astype(np.float32)
        views = np.stack([load(path) for path in asked["images"]])
        return {
            "input": np.repeat(views, len(camera), axis=0),
            "camera": np.tile(camera, (len(views), 1)),
            "record": np.repeat(np.arange(len(views)), len(camera)),
        }

    def save(self, host: Mapping[str, np.ndarray], sources: np.ndarray, drawn: np.ndarray, out: str) -> Sequence[str]:
        """A PNG, one row a picture and sample (input | azimuth | azimuth ...), and a GIF and an MP4 of them turning."""
        count = host["record"].max() + 1
        views = drawn.reshape(count, -1, *drawn.shape[1:]).swapaxes(1, 2)  # (pictures, samples, azimuths, H, W, 3)
        samples = views.shape[1]
        rows = views.reshape(count * samples, *views.shape[2:])
        first = np.repeat(sources[:: views.shape[2]], samples, axis=0)
        pictures.save_png(pictures.sheet(np.concatenate([first[:, None], rows], axis=1)), out)
        frames = np.stack([pictures.sheet(view) for view in views.transpose(2, 0, 1, 3, 4, 5)])
        return [out, *clips.save(frames, out)]


def make_nvs(settings: config.Settings, place: encoders.Placement | None = None) -> tuple[NovelView, dict[str, Any]]:
    """The task and its frozen parameters {"encoder", "autoencoder"}, loaded as the settings name them; see tasks.make_task.

    Raises:
      ValueError: records that are no views; weights that cannot be found or do not fit; sizes that do not divide.
    """
    if settings.data.sample_type != "views":
        raise ValueError(
            f"config.data.sample_type={settings.data.sample_type!r}: novel views train on pairs of views, set views"
        )
    if settings.task.condition_dropout != config.Task().condition_dropout:
        raise ValueError(
            "config.task.condition_dropout is not for novel views, whose parts drop as config.nvs.dropout says"
        )
    dropout, turned = settings.nvs.dropout, settings.nvs.camera == "bilinear"
    return denoising.make(
        NovelView, settings, place, *encoders.make_encoder(settings.encoder, place),
        network={
            "camera_dim": CAMERA_DIM,
            "camera_turns": turned,
            "vector_dim": CAMERA_DIM if turned else 0,
            "vector_kind": "numbers",
        },
        concatenated=True,
        condition_dropout=dropout[1] - dropout[0],  # of both parts
        dropout=dropout,
    )  # fmt: skip
