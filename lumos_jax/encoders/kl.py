"""The network of Stable Diffusion's KL-autoencoder (Rombach et al. 2022), with diffusers' parameter names.

Axes: B batch, H W pixels, h w latents. Group norm before each SiLU, eps 1e-6; downsampling pads right and below only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

EPS = 1e-6
TILE = 128  # latent pixels: 1024 px
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class KLAutoencoder:
    """Shape of the network.

    Attributes:
      channels: width of each resolution.
      layers: residual blocks per resolution.
      groups: of the group norms.
      latent_channels: c.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    latent_channels: int = 4

    @property
    def factor(self) -> int:
        """Pixels per latent pixel."""
        return 2 ** (len(self.channels) - 1)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random float32 parameters {"encoder", "decoder"}."""
        first, second = jax.random.split(key)
        image, latent = jnp.zeros((1, self.factor, self.factor, 3)), jnp.zeros((1, 1, 1, self.latent_channels))
        return {
            "encoder": _Half(self, decodes=False).init(first, image)["params"],
            "decoder": _Half(self, decodes=True).init(second, latent)["params"],
        }

    def moments(self, params: dict[str, Any], pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pixels (B, H, W, 3) in [-1, 1] -> mean and log variance of the posterior, each (B, h, w, c)."""
        mean, log_variance = jnp.split(
            _Half(self, decodes=False).apply({"params": params["encoder"]}, pixels), 2, axis=-1
        )
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def decode(self, params: dict[str, Any], latent: jax.Array, tile: int = TILE) -> jax.Array:
        """Unscaled latents (B, h, w, c) -> pixels (B, H, W, 3), about [-1, 1].

        Latents of more than 2 tile^2 pixels are decoded in overlapping tiles of that side, one at a time, that blend over a
        quarter of it: memory no longer grows with the image. Norms and attention then see one tile
        only, so the result is close to the untiled one, not equal.
        """

        def decode_one(x):
            return _Half(self, decodes=True).apply({"params": params["decoder"]}, x)

        size, height, width, _ = latent.shape
        if height * width <= 2 * tile**2:
            return decode_one(latent)
        h, w, f = min(tile, height), min(tile, width), self.factor
        starts = [(top, left) for top in _starts(height, h) for left in _starts(width, w)]
        decoded = jax.lax.map(
            decode_one, jnp.stack([latent[:, top : top + h, left : left + w] for top, left in starts])
        )
        window = jnp.asarray(np.outer(_ramp(h * f), _ramp(w * f)), decoded.dtype)[None, :, :, None]
        total = jnp.zeros((size, height * f, width * f, 3), decoded.dtype)
        weight = jnp.zeros((1, height * f, width * f, 1), decoded.dtype)
        for part, (top, left) in zip(decoded, starts, strict=True):
            at = (slice(None), slice(top * f, (top + h) * f), slice(left * f, (left + w) * f))
            total = total.at[at].add(part * window)
            weight = weight.at[at].add(window)
        return total / weight


class _Resnet(nn.Module):
    features: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = _conv(self.features, "conv1", nn.silu(_norm(self.groups, "norm1", x)))
        h = _conv(self.features, "conv2", nn.silu(_norm(self.groups, "norm2", h)))
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=x.dtype, name="conv_shortcut")(x)
        return x + h


class _Attention(nn.Module):
    """One head over all positions."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, height, width, channels = x.shape
        h = _norm(self.groups, "group_norm", x).reshape(size, height * width, channels)
        q, k, v = (nn.Dense(channels, dtype=x.dtype, name=name)(h)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        h = jax.nn.dot_product_attention(q, k, v)[:, :, 0]
        return x + nn.Dense(channels, dtype=x.dtype, name="to_out_0")(h).reshape(x.shape)


def _norm(groups: int, name: str, x: jax.Array) -> jax.Array:
    return nn.GroupNorm(groups, epsilon=EPS, dtype=x.dtype, name=name)(x)


def _conv(features: int, name: str, x: jax.Array) -> jax.Array:
    return nn.Conv(features, (3, 3), padding=1, dtype=x.dtype, name=name)(x)


class _Stage(nn.Module):
    """Residual blocks of one resolution; then the change to the next, "up", "down" or, at the last, none. The "mid" stage has
    attention after the first block."""

    features: int
    layers: int
    groups: int
    change: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = _Resnet(self.features, self.groups, name=f"resnets_{i}")(x)
            if self.change == "mid" and i == 0:
                x = _Attention(self.groups, name="attentions_0")(x)
        if self.change == "up":
            x = _conv(self.features, "upsamplers_0_conv", jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        elif self.change == "down":
            pad = ((0, 1), (0, 1))
            x = nn.Conv(self.features, (3, 3), 2, padding=pad, dtype=x.dtype, name="downsamplers_0_conv")(x)
        return x


class _Half(nn.Module):
    """The encoder, (B, H, W, 3) in [-1, 1] -> moments (B, h, w, 2 c), or the decoder, unscaled latents (B, h, w, c) ->
    (B, H, W, 3), about [-1, 1]."""

    shape: KLAutoencoder
    decodes: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s, way, moments = self.shape, "up" if self.decodes else "down", 2 * self.shape.latent_channels
        channels = s.channels[::-1] if self.decodes else s.channels
        middle = _Stage(s.channels[-1], 2, s.groups, "mid", name="mid_block")
        if self.decodes:
            x = nn.Conv(s.latent_channels, (1, 1), dtype=x.dtype, name="post_quant_conv")(x)
        x = _conv(channels[0], "conv_in", x)
        x = middle(x) if self.decodes else x
        for i, features in enumerate(channels):
            change = way if i < len(channels) - 1 else ""
            x = _Stage(features, s.layers + self.decodes, s.groups, change, name=f"{way}_blocks_{i}")(x)
        x = x if self.decodes else middle(x)
        x = nn.silu(_norm(s.groups, "conv_norm_out", x))
        x = _conv(3 if self.decodes else moments, "conv_out", x)
        return x if self.decodes else nn.Conv(moments, (1, 1), dtype=x.dtype, name="quant_conv")(x)


def _starts(length: int, side: int) -> list[int]:
    """First positions of tiles that overlap by at least a quarter and end at the border."""
    if length <= side:
        return [0]
    count = -(-(length - side) // max(side - side // 4, 1)) + 1
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def _ramp(side: int) -> np.ndarray:
    """Weights that fall linearly over the outer quarter of a tile, never to zero."""
    edge = max(side // 4, 1)
    distance = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1
    return np.minimum(distance / (edge + 1), 1.0)
