"""What diffusion tasks share: the denoising objective, latents, condition dropout, and caching.

    record -> (x0, Condition) -> x_t, target -> prediction -> loss per example

Eq. (1) of the paper: E ||eps - eps_theta(x_t, t, c)||^2, with the parameterizations and weights of `diffusion`. Axes: B batch,
F frames, h w c latent, L condition tokens, C their features.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lumos_jax import config, diffusion, encoders, models
from lumos_jax.encoders import Autoencoder, Placement
from lumos_jax.models import Condition, Network, alignment
from lumos_jax.tasks.base import Batch, Handoff, Task

QUARTILES = 4

# From a prior without cross-attention, whose condition, if any, is added to the timestep embedding (DiT, RCG): it gains
# cross-attention, whose output starts at zero, and loses its condition, whose null stays (see `null_embedding`).
FROM_ADALN = Handoff(new=("blocks/cross/*", "tokens/*", "null/tokens"), gone=("vector/*", "null/vector"))
# To such a prior: another condition is initialized anew, and cross-attention is dropped.
TO_ADALN = Handoff(new=FROM_ADALN.gone, gone=(*FROM_ADALN.gone, *FROM_ADALN.new), refit=FROM_ADALN.gone)
# Of runs with and without alignment: its projector is the run's own.
ALIGN = Handoff(new=("align/*",), gone=("align/*",), refit=("align/*",))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Example:
    """One batch with every random choice made.

    x0, noise: (B, [F,] h, w, c). t: (B,), as the process counts time. condition: its camera not projected. drop: for each
    name of models.PARTS, (B,) bool, the rows that lose that part of their condition. weight: (B,) float32, 0 for records that
    could not be decoded. target: what hidden tokens are aligned with, (B, P, C) float32; None without alignment.
    """

    x0: jax.Array
    noise: jax.Array
    t: jax.Array
    condition: Condition
    drop: Mapping[str, jax.Array]
    weight: jax.Array
    target: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Of models.alignment: the weight of the similarity in the loss, and the frozen encoder of the target."""

    weight: float
    encoder: Any


@dataclasses.dataclass(frozen=True)
class Denoising(Task):
    """Base class of diffusion tasks; a subclass defines `condition` and overrides what differs, as `build`, which by default
    conditions on tokens of an image encoder.

    Attributes:
      encoder: the frozen network whose features are the condition; None for a task that conditions on no features.
      autoencoder: the frozen map between pixels and latents.
      latent_shape: ([F,] h, w, c) of x0.
      condition_dropout: probability in [0, 1] of the null condition in training.
      align: representation alignment in training; None for none.
    """

    evaluator: ClassVar[str] = "denoising"
    network: Network
    process: diffusion.Process
    encoder: Any
    autoencoder: Autoencoder
    latent_shape: tuple[int, ...]
    condition_dropout: float
    align: Alignment | None = dataclasses.field(default=None, kw_only=True)

    @property
    def identity(self) -> dict[str, str]:
        networks = {"encoder": self.encoder, "autoencoder": self.autoencoder}
        if self.align is not None:
            networks["align"] = self.align.encoder
        return {group: network.identity for group, network in networks.items() if network is not None}

    def describe(self) -> dict[str, str]:
        encoder = self.encoder
        condition = "none" if encoder is None else f"{encoder.settings.output} tokens of {encoder.identity}"
        lines = {"latents": " x ".join(map(str, self.latent_shape)), "condition": condition}
        if self.align is not None:
            target = f"{self.align.encoder.tokens} patches of {self.align.encoder.identity}"
            lines["alignment"] = f"{self.align.weight:g} x block {self.network.align_block} with {target}"
        return lines

    @classmethod
    def build(cls, settings: config.Settings, place: Placement | None) -> tuple[Denoising, dict[str, Any]]:
        return make(cls, settings, place, *encoders.make_encoder(settings.encoder, place, settings.model.dtype))

    def handoff(self) -> Handoff:
        """Tasks add their own rules with `|`."""
        return ALIGN | (FROM_ADALN if self.network.token_shape else TO_ADALN)

    def check_prior(self, ours: config.Model, theirs: config.Model, paths: Collection[str]) -> None:
        final, own = "adaln" if "final/modulation/kernel" in paths else "table", self.network.final
        if final != own:
            raise ValueError(
                f"the prior's final layer is {final}, this network's {own}: set config.model.final={final} to keep it"
            )
        if theirs.activation != ours.activation:
            raise ValueError(
                f"config.model.activation={ours.activation}, but the prior was trained with {theirs.activation}: set it to that"
            )

    # Training.

    def condition(self, frozen: Any, batch: Batch) -> Condition:
        """The condition of a batch of B records."""
        raise NotImplementedError

    def prepare(self, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Condition]:
        """A batch -> x0 (B, [F,] h, w, c) float32 and its Condition; `key` samples the autoencoder's posterior."""
        return self.latents(frozen, batch, key), self.condition(frozen, batch)

    def dropout_masks(self, key: jax.Array, size: int) -> dict[str, jax.Array]:
        """For each name of models.PARTS, (size,) bool: the rows of a training batch that lose that part; here all together."""
        rows = jax.random.bernoulli(key, self.condition_dropout, (size,))
        return dict.fromkeys(models.PARTS, rows)

    def example(self, frozen: Any, batch: Batch, keys: Mapping[str, jax.Array]) -> Example:
        x0, condition = self.prepare(frozen, batch, keys["posterior"])
        return Example(
            x0=jax.lax.stop_gradient(x0),
            noise=jax.random.normal(keys["noise"], x0.shape, jnp.float32),
            t=diffusion.sample_timesteps(self.process, keys["timestep"], x0.shape[:1]),
            condition=jax.lax.stop_gradient(condition),
            drop=self.dropout_masks(keys["dropout"], x0.shape[0]),
            weight=batch["weight"],
            target=None if self.align is None else jax.lax.stop_gradient(self.align_target(frozen, batch)),
        )

    def align_target(self, frozen: Any, batch: Batch) -> jax.Array:
        """(B, P, C) float32: patch tokens of the clean images."""
        return self.align.encoder.apply(frozen["align"], batch["image"])

    def loss_terms(
        self, params: Any, example: Example, gather: Any = None, null: bool = False, aligned: bool = False
    ) -> dict[str, jax.Array]:
        """Losses per example, each (B,) float32 and unweighted: `loss`, `mse` and, for the hybrid loss, `vlb`.

        null: with the null condition of guidance, in place of the condition with its dropped parts. aligned: adds `alignment`,
        the negative cosine similarity with the example's target, which is not part of `loss`.
        """
        if null:
            condition = self.network.null_condition(params, self.network.project_camera(params, example.condition))
        else:
            condition = self.network.drop_condition(params, example.condition, example.drop)
        x_t = diffusion.corrupt(self.process, example.x0, example.noise, example.t)
        time = diffusion.network_time(self.process, example.t)
        forward = functools.partial(self.network.apply, params, x_t, time, condition, gather=gather)
        output, hidden = forward(aligned=True) if aligned else (forward(), None)
        terms = diffusion.loss_terms(self.process, output, x_t, example.x0, example.t, example.noise)
        return terms | ({"alignment": -alignment.similarity(hidden, example.target)} if aligned else {})

    def losses(self, params: Any, ema: Any, example: Example, total: jax.Array, gather: Any) -> dict[str, jax.Array]:
        """`loss`, `mse`, `vlb` (hybrid loss only), `alignment` (where there is one, and `loss` then has it), and the weighted
        sums quartile_loss and quartile_weight (4,) of the diffusion loss by quartile of the timestep, which are not divided by
        `total`."""
        terms = self.loss_terms(params, example, gather, aligned=self.align is not None)
        terms = {name: value * example.weight / total for name, value in terms.items()}
        quartile = jax.nn.one_hot(diffusion.timestep_quartile(self.process, example.t), QUARTILES)
        sums = {name: value.sum() for name, value in terms.items()}
        sums["quartile_loss"] = terms["loss"] @ quartile * total
        sums["quartile_weight"] = example.weight @ quartile
        if self.align is not None:
            sums["loss"] += self.align.weight * sums["alignment"]
        return sums

    def shuffled(self, condition: Condition) -> Condition:
        """Every row with the condition of the row before it, for the held-out loss."""
        return jax.tree.map(lambda a: jnp.roll(a, 1, axis=0), condition)

    # Frozen networks.

    def latents(self, frozen: Any, batch: Batch, key: jax.Array) -> jax.Array:
        """x0 of uint8 `image` (B, H, W, 3) or of cached `latent` moments; `key` samples the posterior."""
        if "latent" in batch:
            return self.autoencoder.sample(batch["latent"], key)
        return self.autoencoder.encode(frozen["autoencoder"], batch["image"], key)

    def image_features(self, frozen: Any, batch: Batch) -> jax.Array:
        """The encoder's features (B, L, C) float32 of `image`, or as a cache has them."""
        if "feature" in batch:
            return batch["feature"].astype(jnp.float32)
        return self.encoder.apply(frozen["encoder"], batch["image"])

    def encode(self, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        if self.uncacheable:
            raise ValueError(self.uncacheable)
        if self.autoencoder.network is None:
            latents = {"image": batch["image"]}
        else:
            latents = {"latent": self.autoencoder.moments(frozen["autoencoder"], batch["image"])}
        return latents | self.encode_condition(frozen, batch)

    def encode_condition(self, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        """The part of `encode` that `condition` takes: features of images where there is an encoder."""
        return {} if self.encoder is None else {"feature": self.image_features(frozen, batch)}

    def without_encoders(self, frozen: Any) -> Any:
        kept = {"autoencoder": {name: part for name, part in frozen["autoencoder"].items() if name != "encoder"}}
        if self.align is None:
            return kept
        if self.autoencoder.network is not None:
            raise ValueError(
                f"config.align.weight={self.align.weight} needs the images, and a cache holds latents in their place: train on "
                "the records as they are, or set it to 0"
            )
        return kept | {"align": frozen["align"]}


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
    """A task of class `kind` and its frozen parameters {"encoder", "autoencoder"}, as `tasks.make_task`.

    Args:
      encoder, encoder_params: as `encoders.make_encoder` gives them; None for a task that conditions on no features.
      network: further arguments of `models.make_dit`; by default its tokens are the encoder's, if there is one.
      concatenated: whether a latent is concatenated on channels.
      frames: of a clip; 0 for images.
      fields: of the class, where they are not as the settings have them.
    """
    autoencoder, autoencoder_params = encoders.make_autoencoder(settings.autoencoder, place, settings.model.dtype)
    shape = autoencoder.latent_shape(settings.data.image_size)
    process = diffusion.make_process(settings.diffusion)
    parts: dict[str, Any] = {"token_shape": None, "final": "adaln"}
    if encoder is not None:
        parts = {"token_shape": (encoder.tokens, encoder.dim)}
    parts |= {"concat_channels": shape[-1] if concatenated else 0} | dict(network or {})
    align, align_params = None, {}
    if settings.align.weight and not frames:
        align, align_params = make_alignment(settings, place)
        parts |= {
            "align_block": settings.align.block,
            "align_shape": (math.isqrt(align.encoder.tokens), align.encoder.dim),
        }
    parts["position_scale"] = models.position_scale(settings.data.image_size)
    out_channels = process.out_channels(shape[-1])
    dit = models.make_dit(settings.model, latent_shape=shape, out_channels=out_channels, **parts)
    fields = {"condition_dropout": settings.task.condition_dropout, "align": align} | fields
    task = kind(dit, process, encoder, autoencoder, (frames, *shape) if frames else shape, **fields)
    return task, {"autoencoder": autoencoder_params} | (
        {} if encoder is None else {"encoder": encoder_params}
    ) | align_params


def make_alignment(settings: config.Settings, place: Placement | None) -> tuple[Alignment, dict[str, Any]]:
    """What config.align describes, and its frozen parameters {"align"}. Raises ValueError as `encoders.make_encoder`, and for
    images that are not square."""
    weight, data = settings.align.weight, settings.data
    if data.has_buckets:
        raise ValueError(
            f"config.align.weight={weight}: the encoder sees a square, and images of config.data.aspect_ratios="
            f"{data.aspect_ratios} are none; set the weight to 0, or the ratios to (1,1)"
        )
    encoder, params = encoders.make_encoder(settings.align.encoder, place, settings.model.dtype)
    return Alignment(weight, encoder), {"align": params}


def null_embedding(params: Mapping[str, Any], dropped: Collection[str]) -> Any | None:
    """What the null condition of a prior adds to the timestep embedding (D,), if the embedder of its condition is dropped.

    Added to the last bias of the timestep MLP, it makes the network start as the prior under its null condition, which its
    blocks have learned to see, and not as the prior without any.
    """
    if "vector/table" in dropped:
        return params["vector"]["table"][-1]
    if "null/vector" in dropped:
        return params["null"]["vector"] @ params["vector"]["kernel"] + params["vector"]["bias"]
    return None
