"""Drawing pictures: condition -> guided sampler -> pixels, one compiled program per shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import config, diffusion


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to draw. Fields as in config.Eval; `lower_last` lowers the order of dpm++'s last step: auto | always."""

    sampler: str
    steps: int
    guidance: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    lower_last: str = "auto"


def options_of(settings: config.Eval) -> SamplingOptions:
    """The sampling options that config.eval names."""
    return SamplingOptions(
        settings.sampler, settings.steps, settings.guidance, settings.guidance_interval, settings.guidance_rescale
    )


def draw(task, params: Any, frozen: Any, condition: Any, noise: jax.Array, key: jax.Array, options: SamplingOptions,
         gather: Callable | None = None) -> jax.Array:  # fmt: skip
    """Samples, one a row of `condition` and `noise` (B, *latent_shape) -> pixels uint8 (B, [F,] H, W, 3)."""
    condition = task.dit.project_camera(params, condition)
    null = task.dit.null_condition(params, condition)

    def predict(x, network_time, given):
        return task.dit.apply(params, x, network_time, given, gather=gather)

    denoise = diffusion.guided(
        predict,
        condition,
        null,
        scale=task.guidance(options.guidance),
        interval=options.guidance_interval,
        rescale=options.guidance_rescale,
        process=task.process,
    )
    latent = diffusion.sample(
        task.process,
        denoise,
        noise,
        key,
        sampler=options.sampler,
        steps=options.steps,
        lower_last=options.lower_last,
    )
    return to_uint8(task.decode(frozen, latent))


def to_uint8(pixels: jax.Array) -> jax.Array:
    """[-1, 1] -> 0..255, rounded; values outside are clipped."""
    return jnp.clip(jnp.round((pixels + 1) * 127.5), 0, 255).astype(jnp.uint8)


def repeat_rows(condition: Any, count: int) -> Any:
    """Every row `count` times in a row: (B, ...) -> (B * count, ...)."""
    return jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), condition)


def draw_for_batch(task, params: Any, frozen: Any, batch: Mapping[str, jax.Array], keys: tuple[jax.Array, jax.Array],
                    count: int, options: SamplingOptions, gather: Callable | None = None) -> jax.Array:  # fmt: skip
    """`count` samples for each row of the batch: uint8 (B, count, [F,] H, W, 3). keys: (starting noise, sampler)."""
    rows = next(iter(batch.values())).shape[0]
    condition = repeat_rows(task.condition(frozen, batch), count)
    noise = jax.random.normal(keys[0], (rows * count, *task.latent_shape), jnp.float32)
    pictures = draw(task, params, frozen, condition, noise, keys[1], options, gather)
    return pictures.reshape(rows, count, *pictures.shape[1:])
