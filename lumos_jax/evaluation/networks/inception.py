"""FID's Inception v3 of 2015 (Heusel et al. 2017; weights as pytorch-fid converted them), features of the last average pool.

It differs from the Inception v3 of later libraries: average pools leave padding out of the count, the last block (7c) pools by
maximum, and there are 1008 classes. Every convolution is without bias, followed by batch norm and ReLU. A value of FID holds
for one way of resizing to 299 x 299, the protocol:

    tf1    bilinear as TensorFlow 1, (x - 128) / 128        ADM, EDM, StyleGAN, torch-fidelity
    torch  bilinear with half-pixel centers, 2 x / 255 - 1  pytorch-fid
    clean  Pillow's bicubic in float, (x - 128) / 128       clean-fid (Parmar et al. 2022)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax.evaluation.networks import weights as weights_of
from lumos_jax.evaluation.networks.layers import max_pool, unit, unit_rules, unit_shapes
from lumos_jax.evaluation.networks.resize import resize
from lumos_jax.weights.rules import Rule, linear

SIDE, FEATURES, CLASSES = 299, 2048, 1008
# name: kernel, shift and scale of the input x in [0, 255], (x - shift) / scale.
PROTOCOLS = {"tf1": ("tf1", 128.0, 128.0), "torch": ("bilinear", 127.5, 127.5), "clean": ("bicubic", 128.0, 128.0)}

# A convolution: name within the block, width, kernel (height, width), stride; padding keeps the size, or is none at stride 2.
_Conv = tuple[str, int, tuple[int, int], int]
_ONE, _THREE, _FIVE = (1, 1), (3, 3), (5, 5)
_ROW, _COLUMN = (1, 7), (7, 1)
_STEM = {  # name: width, kernel, stride, padding; a maximum pool comes after 2b and 4a
    "Conv2d_1a_3x3": (32, _THREE, 2, "VALID"), "Conv2d_2a_3x3": (32, _THREE, 1, "VALID"),
    "Conv2d_2b_3x3": (64, _THREE, 1, "SAME"), "Conv2d_3b_1x1": (80, _ONE, 1, "VALID"),
    "Conv2d_4a_3x3": (192, _THREE, 1, "VALID"),
}  # fmt: skip
_POOLED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")


def _block_a(pool: int) -> list[list[_Conv]]:
    return [
        [("branch1x1", 64, _ONE, 1)],
        [("branch5x5_1", 48, _ONE, 1), ("branch5x5_2", 64, _FIVE, 1)],
        [("branch3x3dbl_1", 64, _ONE, 1), ("branch3x3dbl_2", 96, _THREE, 1), ("branch3x3dbl_3", 96, _THREE, 1)],
        [("branch_pool", pool, _ONE, 1)],
    ]


def _block_c(width: int) -> list[list[_Conv]]:
    kernels = (_ONE, _COLUMN, _ROW, _COLUMN, _ROW)
    double = [(f"branch7x7dbl_{i + 1}", 192 if i == 4 else width, kernel, 1) for i, kernel in enumerate(kernels)]
    return [
        [("branch1x1", 192, _ONE, 1)],
        [("branch7x7_1", width, _ONE, 1), ("branch7x7_2", width, _ROW, 1), ("branch7x7_3", 192, _COLUMN, 1)],
        double,
        [("branch_pool", 192, _ONE, 1)],
    ]


_BLOCK_B = [
    [("branch3x3", 384, _THREE, 2)],
    [("branch3x3dbl_1", 64, _ONE, 1), ("branch3x3dbl_2", 96, _THREE, 1), ("branch3x3dbl_3", 96, _THREE, 2)],
    [],  # the pool alone
]
_BLOCK_D = [
    [("branch3x3_1", 192, _ONE, 1), ("branch3x3_2", 320, _THREE, 2)],
    [("branch7x7x3_1", 192, _ONE, 1), ("branch7x7x3_2", 192, _ROW, 1), ("branch7x7x3_3", 192, _COLUMN, 1),
     ("branch7x7x3_4", 192, _THREE, 2)],
    [],
]  # fmt: skip
# A list in place of a convolution: its members read the same input and are concatenated.
_BLOCK_E: list[list[Any]] = [
    [("branch1x1", 320, _ONE, 1)],
    [("branch3x3_1", 384, _ONE, 1), [("branch3x3_2a", 384, (1, 3), 1), ("branch3x3_2b", 384, (3, 1), 1)]],
    [("branch3x3dbl_1", 448, _ONE, 1), ("branch3x3dbl_2", 384, _THREE, 1),
     [("branch3x3dbl_3a", 384, (1, 3), 1), ("branch3x3dbl_3b", 384, (3, 1), 1)]],
    [("branch_pool", 192, _ONE, 1)],
]  # fmt: skip
# name: branches, and how the last one pools: mean | max, at stride 1; down: maximum at stride 2.
_BLOCKS: dict[str, tuple[list[list[Any]], str]] = {
    "Mixed_5b": (_block_a(32), "mean"), "Mixed_5c": (_block_a(64), "mean"), "Mixed_5d": (_block_a(64), "mean"),
    "Mixed_6a": (_BLOCK_B, "down"),
    "Mixed_6b": (_block_c(128), "mean"), "Mixed_6c": (_block_c(160), "mean"), "Mixed_6d": (_block_c(160), "mean"),
    "Mixed_6e": (_block_c(192), "mean"),
    "Mixed_7a": (_BLOCK_D, "down"),
    "Mixed_7b": (_BLOCK_E, "mean"), "Mixed_7c": (_BLOCK_E, "max"),
}  # fmt: skip


def features(params: Any, x: jax.Array) -> jax.Array:
    """Scaled images (B, 299, 299, 3) -> (B, 2048)."""
    for name, (_, _, stride, padding) in _STEM.items():
        x = unit(params[name], x, stride, padding)
        if name in _POOLED:
            x = max_pool(x, _THREE, (2, 2), "VALID")
    for name, (branches, pool) in _BLOCKS.items():
        x = _block(params[name], x, branches, pool)
    return x.mean((1, 2))


def load(weights: weights_of.Weights, protocol: str) -> weights_of.Loaded:
    """The network of pytorch-fid's file; protocol: a key of PROTOCOLS."""
    kernel, shift, scale = PROTOCOLS[protocol]

    def apply(params, pixels):
        x = resize(pixels.astype(jnp.float32), SIDE, SIDE, kernel)
        x = jnp.clip(x, 0, 255) if kernel == "bicubic" else x
        return features(params, (x - shift) / scale)

    described = {"resize": f"squash {SIDE} {kernel}", "scale": f"(x - {shift:g}) / {scale:g}", "layer": "pool_3"}
    return weights_of.Loaded(apply, weights_of.official("inception", weights, table(), shapes()), FEATURES, described)


def _block(params: Any, x: jax.Array, branches: list[list[Any]], pool: str) -> jax.Array:
    if pool == "mean":
        pooled = _mean_pool(x)
    elif pool == "max":
        pooled = max_pool(x, _THREE, (1, 1), "SAME")
    else:
        pooled = max_pool(x, _THREE, (2, 2), "VALID")
    made = []
    for number, branch in enumerate(branches):
        y = pooled if number == len(branches) - 1 else x
        for step in branch:
            if isinstance(step, list):
                y = jnp.concatenate([unit(params[name], y, 1, "SAME") for name, *_ in step], -1)
            else:
                name, _, _, stride = step
                y = unit(params[name], y, stride, "SAME" if stride == 1 else "VALID")
        made.append(y)
    return jnp.concatenate(made, -1)


def _mean_pool(x: jax.Array) -> jax.Array:
    """Means of 3 x 3, of the places within the image."""

    def total(x):
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1)))


def _kernels() -> dict[str, tuple[int, ...]]:
    """Path of each convolution -> shape of its kernel."""
    found, inner = {}, 3
    for name, (width, kernel, *_) in _STEM.items():
        found[name], inner = (*kernel, inner, width), width
    for block, (branches, _) in _BLOCKS.items():
        outer = 0
        for branch in branches:
            width = inner
            for step in branch:
                parts = step if isinstance(step, list) else [step]
                found |= {f"{block}/{name}": (*kernel, width, out) for name, out, kernel, _ in parts}
                width = sum(out for _, out, _, _ in parts)
            outer += width
        inner = outer
    return found


def shapes() -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters."""
    made: dict[str, tuple[int, ...]] = {"fc/kernel": (FEATURES, CLASSES), "fc/bias": (CLASSES,)}
    for path, kernel in _kernels().items():
        made |= unit_shapes(path, kernel)
    return made


def table() -> Sequence[Rule]:
    """The names of pytorch-fid's file."""
    return [*linear("fc", "fc/"), *(rule for path in _kernels() for rule in unit_rules(path, "conv"))]
