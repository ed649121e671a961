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
            "encoder": _Encoder(self).init(first, image)["params"],
            "decoder": _Decoder(self).init(second, latent)["params"],
        }

    def moments(self, params: dict[str, Any], pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pixels (B, H, W, 3) in [-1, 1] -> mean and log variance of the posterior, each (B, h, w, c)."""
        mean, log_variance = jnp.split(_Encoder(self).apply({"params": params["encoder"]}, pixels), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def decode(self, params: dict[str, Any], latent: jax.Array, tile: int = TILE) -> jax.Array:
        """Unscaled latents (B, h, w, c) -> pixels (B, H, W, 3), about [-1, 1].

        Latents of more than 2 tile^2 pixels are decoded in overlapping tiles of that side, one at a time, that blend over a
        quarter of it: memory no longer grows with the image. Norms and attention then see one tile
        only, so the result is close to the untiled one, not equal.
        """

        def decode_one(x):
            return _Decoder(self).apply({"params": params["decoder"]}, x)

        size, height, width, _ = latent.shape
        if height * width <= 2 * tile**2:
            return decode_one(latent)
        sides = (min(tile, height), min(tile, width))
        starts = [(top, left) for top in _starts(height, sides[0]) for left in _starts(width, sides[1])]
        tiles = jnp.stack([latent[:, y : y + sides[0], x : x + sides[1]] for y, x in starts])
        decoded = jax.lax.map(decode_one, tiles)
        f = self.factor
        window = jnp.asarray(np.outer(_ramp(sides[0] * f), _ramp(sides[1] * f)), decoded.dtype)[None, :, :, None]
        total = jnp.zeros((size, height * f, width * f, 3), decoded.dtype)
        weight = jnp.zeros((1, height * f, width * f, 1), decoded.dtype)
        for i, (top, left) in enumerate(starts):
            at = (slice(None), slice(top * f, (top + sides[0]) * f), slice(left * f, (left + sides[1]) * f))
            total = total.at[at].add(decoded[i] * window)
            weight = weight.at[at].add(window)
        return total / weight


class _Resnet(nn.Module):
    features: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(_norm(self.groups, "norm1", x))
        h = _conv(self.features, "conv1", h)
        h = nn.silu(_norm(self.groups, "norm2", h))
        h = _conv(self.features, "conv2", h)
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


class _Mid(nn.Module):
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _Resnet(x.shape[-1], self.groups, name="resnets_0")(x)
        x = _Attention(self.groups, name="attentions_0")(x)
        return _Resnet(x.shape[-1], self.groups, name="resnets_1")(x)


class _Stage(nn.Module):
    """Residual blocks of one resolution; then the change to the next, "up", "down" or, at the last, none."""

    features: int
    layers: int
    groups: int
    change: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = _Resnet(self.features, self.groups, name=f"resnets_{i}")(x)
        if self.change == "up":
            x = _conv(self.features, "upsamplers_0_conv", jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        elif self.change == "down":
            pad = ((0, 1), (0, 1))
            x = nn.Conv(self.features, (3, 3), 2, padding=pad, dtype=x.dtype, name="downsamplers_0_conv")(x)
        return x


class _Encoder(nn.Module):
    """(B, H, W, 3) in [-1, 1] -> moments (B, h, w, 2 c)."""

    shape: KLAutoencoder

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s = self.shape
        x = _conv(s.channels[0], "conv_in", x)
        for i, features in enumerate(s.channels):
            change = "down" if i < len(s.channels) - 1 else ""
            x = _Stage(features, s.layers, s.groups, change, name=f"down_blocks_{i}")(x)
        x = _Mid(s.groups, name="mid_block")(x)
        x = nn.silu(_norm(s.groups, "conv_norm_out", x))
        x = _conv(2 * s.latent_channels, "conv_out", x)
        return nn.Conv(2 * s.latent_channels, (1, 1), dtype=x.dtype, name="quant_conv")(x)


class _Decoder(nn.Module):
    """Unscaled latents (B, h, w, c) -> (B, H, W, 3), about [-1, 1]."""

    shape: KLAutoencoder

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s = self.shape
        x = nn.Conv(s.latent_channels, (1, 1), dtype=x.dtype, name="post_quant_conv")(x)
        x = _conv(s.channels[-1], "conv_in", x)
        x = _Mid(s.groups, name="mid_block")(x)
        for i, features in enumerate(reversed(s.channels)):
            change = "up" if i < len(s.channels) - 1 else ""
            x = _Stage(features, s.layers + 1, s.groups, change, name=f"up_blocks_{i}")(x)
        x = nn.silu(_norm(s.groups, "conv_norm_out", x))
        return _conv(3, "conv_out", x)


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
