"""What all diffusion tasks have in common: a base class. See tasks.base for the interfaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, diffusion, encoders, models
from lumos_jax.encoders import Autoencoder, Placement
from lumos_jax.models import Condition, Network
from lumos_jax.tasks import pictures
from lumos_jax.tasks.handoffs import FROM_ADALN, Handoff
from lumos_jax.tasks.objective import Example, loss_terms, make_example
from lumos_jax.tasks.sampling import to_uint8

QUARTILES = 4


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Fields as of tasks.base.DiffusionTask; `encoder` is the frozen network that gives the condition's tokens.

    A task overrides `prepare`, `condition`, and what differs of the rest.
    """

    dit: Network
    process: diffusion.Process
    encoder: Any
    autoencoder: Autoencoder
    latent_shape: tuple[int, ...]
    condition_dropout: float

    @property
    def network(self):
        return self.dit

    @property
    def identity(self) -> dict[str, str]:
        return {"encoder": self.encoder.identity, "autoencoder": self.autoencoder.identity}

    @property
    def host(self) -> Callable | None:
        """What the host does to a batch as it is read (captions -> token ids), in the threads or processes that decode: a
        picklable function of a HostBatch; None for nothing."""
        return None

    def describe(self) -> dict[str, str]:
        return {
            "latents": " x ".join(map(str, self.latent_shape)),
            "condition": f"{self.encoder.output} tokens of {self.identity['encoder']}",
        }

    def handoff(self) -> Handoff:
        """How weights of another run or task become this one's first parameters; tasks add their own with `|`."""
        return FROM_ADALN

    # Training.

    def example(self, frozen: Any, batch: Mapping[str, jax.Array], keys: Mapping[str, jax.Array]) -> Example:
        return make_example(self, frozen, batch, keys)

    def draw_drop(self, key: jax.Array, size: int) -> dict[str, jax.Array]:
        """Which rows lose which part of their condition: here all parts together."""
        rows = jax.random.bernoulli(key, self.condition_dropout, (size,))
        return dict.fromkeys(models.PARTS, rows)

    def losses(
        self, params: Any, average: Any, example: Example, total: jax.Array, gather: Any
    ) -> dict[str, jax.Array]:
        """`loss`, `mse`, `vlb` (hybrid loss only), and the weighted sums quartile_loss and quartile_weight (4,) by quartile of
        the timestep, which are not divided by `total`."""
        terms = loss_terms(self, params, example, gather)
        terms = {name: value * example.weight / total for name, value in terms.items()}
        quartile = jax.nn.one_hot(diffusion.timestep_quartile(self.process, example.t), QUARTILES)
        sums = {name: value.sum() for name, value in terms.items()}
        sums["quartile_loss"] = terms["loss"] @ quartile * total
        sums["quartile_weight"] = example.weight @ quartile
        return sums

    def settle(self, params: Any, sums: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        return params, sums

    # Latents.

    def latents(self, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
        """x0 of a batch of pictures, uint8 `image` or cached `latent` moments; `key` draws the posterior."""
        if "latent" in batch:
            return self.autoencoder.draw(batch["latent"], key)
        return self.autoencoder.encode(frozen["autoencoder"], batch["image"], key)

    def encode(self, frozen: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return self.encode_pictures(frozen, batch) | {"feature": self.condition(frozen, batch).tokens}

    def encode_pictures(self, frozen: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """`encode`'s part of the autoencoder."""
        if self.autoencoder.network is None:
            return {"image": batch["image"]}
        return {"latent": self.autoencoder.moments(frozen["autoencoder"], batch["image"])}

    @property
    def ragged(self) -> Mapping[str, str]:
        """What of `encode` is cut to a record's own length in a cache -> the mask (B, L) in the batch that says where it is."""
        return {}

    def without_encoders(self, frozen: Any) -> Any:
        return {"autoencoder": {name: part for name, part in frozen["autoencoder"].items() if name != "encoder"}}

    def decode(self, frozen: Any, latent: jax.Array) -> jax.Array:
        return self.autoencoder.decode(frozen["autoencoder"], latent)

    # Judging and showing.

    def shuffled(self, condition: Condition) -> Condition:
        """Every row with the condition of the row before it: what the held-out loss must not take for its own."""
        return jax.tree.map(lambda a: jnp.roll(a, 1, axis=0), condition)

    def guidance(self, scale: float) -> float | np.ndarray:
        """The guidance scale, or scales that broadcast to (B, *latent_shape)."""
        return scale

    def source_pictures(self, frozen: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        if "image" in batch:
            return batch["image"]
        return to_uint8(self.decode(frozen, self.autoencoder.mean(batch["latent"])))

    def truth(self, host: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """What samples should show, pixel by pixel; None where many pictures would do."""
        return None

    def sheet(self, host: Mapping[str, np.ndarray], sources: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Samples as people look at them: one picture (H, W, 3) uint8, here with rows (source | sample | sample ...).

        Args:
          host: the batch as it was read, R rows.
          sources: what `source_pictures` made of it.
          drawn: uint8 (R, n, *pixels), n samples a row.
        """
        return pictures.sheet(np.concatenate([sources[:, None], drawn], axis=1))

    def for_request(self, asked: Mapping[str, Any]) -> Denoising:
        """The task as it draws what was asked for; most draw what they trained on."""
        return self

    def save(self, host: Mapping[str, np.ndarray], sources: np.ndarray, drawn: np.ndarray, out: str) -> Sequence[str]:
        """Writes what `lumos_jax.sample` drew; returns the files."""
        pictures.save_png(self.sheet(host, sources, drawn), out)
        return [out]


def make(
    kind: type[Denoising],
    settings: config.Settings,
    place: Placement | None,
    encoder: Any = None,
    encoder_params: Any = None,
    *,
    network: Mapping[str, Any] | None = None,
    concatenated: bool = False,
    frames: int = 0,
    **fields: Any,
) -> tuple[Any, dict[str, Any]]:
    """A task of that class and its frozen parameters {"encoder", "autoencoder"}, as the settings name them.

    Args:
      kind: the class.
      settings: of the run.
      place: as for `tasks.make_task`.
      encoder, encoder_params: as `encoders.make_encoder` gives them; None for a task that conditions on no features.
      network: what `models.make_dit` is told besides; unless it says otherwise, the tokens are the encoder's.
      concatenated: whether a latent is concatenated on channels.
      frames: of a clip; 0 for pictures.
      fields: of the class, where they are not as the settings have them.

    Raises:
      ValueError: weights that cannot be found or do not fit; sizes that do not divide.
    """
    autoencoder, autoencoder_params = encoders.make_autoencoder(settings.autoencoder, place)
    latent_shape = autoencoder.latent_shape(settings.data.image_size)
    process = diffusion.make_process(settings.diffusion)
    told = {} if encoder is None else {"token_shape": (encoder.tokens, encoder.dim)}
    if concatenated:
        told["concat_channels"] = latent_shape[-1]
    dit = models.make_dit(
        settings.model,
        latent_shape=latent_shape,
        out_channels=process.out_channels(latent_shape[-1]),
        **(told | dict(network or {})),
    )
    fields = {"condition_dropout": settings.task.condition_dropout} | fields
    shape = (frames, *latent_shape) if frames else latent_shape
    task = kind(dit, process, encoder, autoencoder, shape, **fields)
    return task, {"autoencoder": autoencoder_params} | ({} if encoder is None else {"encoder": encoder_params})
