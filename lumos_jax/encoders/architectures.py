"""Shapes of networks whose weights are not at hand: enough to compile what will use them, ahead of time.

Architectures are those that the config.json of each hub id says; weights of any other id, or a local path, are read.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lumos_jax.encoders.autoencoder import KlShape
from lumos_jax.encoders.clip_text import LEGACY_EOS, ClipText
from lumos_jax.encoders.t5 import T5Encoder
from lumos_jax.encoders.vit import Vit
from lumos_jax.weights import rules as name_rules
from lumos_jax.weights.placement import Take

_T5 = {
    "small": (512, 8, 6, 64, 1024),
    "base": (768, 12, 12, 64, 2048),
    "large": (1024, 24, 16, 64, 2816),
    "xl": (2048, 24, 32, 64, 5120),
    "xxl": (4096, 24, 64, 64, 10240),
}
_T5_VOCABULARY = 32128
_DINOV2 = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}

# Hub id -> network. Position offsets and the like, which cost nothing, are left at their defaults.
KNOWN: Mapping[str, Any] = {
    "facebook/dino-vits16": Vit(384, 12, 6, 16, 224, eps=1e-12),
    "facebook/dino-vits8": Vit(384, 12, 6, 8, 224, eps=1e-12),
    "facebook/dino-vitb16": Vit(768, 12, 12, 16, 224, eps=1e-12),
    "facebook/dino-vitb8": Vit(768, 12, 12, 8, 224, eps=1e-12),
    **{f"facebook/dinov2-{size}": Vit(*sides, 14, 518, layer_scale=True) for size, sides in _DINOV2.items()},
    "stabilityai/sd-vae-ft-mse": KlShape(),
    "stabilityai/sd-vae-ft-ema": KlShape(),
    **{f"google/t5-v1_1-{size}": T5Encoder(*sides, _T5_VOCABULARY) for size, sides in _T5.items()},
    **{f"google/flan-t5-{size}": T5Encoder(*sides, _T5_VOCABULARY) for size, sides in _T5.items()},
    "openai/clip-vit-large-patch14": ClipText(768, 12, 12, 3072, 49408, 77, 768, LEGACY_EOS),
}


def known(weights: str, take: Take, network_class: Any) -> Any | None:
    """The network that a hub id stands for, if shapes are all that is wanted and this list has it; else None."""
    if not take.shapes_only or pathlib.Path(weights).expanduser().exists():
        return None
    network = KNOWN.get(weights)
    return network if isinstance(network, network_class) else None


def shapes(init: Callable[[jax.Array], Any], take: Take) -> Any:
    """What `take` makes of the parameters' shapes; `init` makes the parameters of a key, and is not run."""
    flat = name_rules.flatten(jax.eval_shape(init, jax.random.key(0)))
    return name_rules.unflatten({path: take(path, leaf) for path, leaf in flat.items()})
