"""The embedded scenes as a source of images, captions, labels, clips and posed views; no files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lumos_jax.data.base import Clip, Data, HasCaptions, HasClips, HasLabels, HasViews, Source, register, start_of
from lumos_jax.scenes import motion, truth
from lumos_jax.scenes.render import posed_views, render
from lumos_jax.scenes.scene import (
    CLIP_FPS,
    CLIP_FRAMES,
    COLORS,
    KINDS,
    VERSION,
    VIEW_POLAR,
    VIEW_RADIUS,
    Camera,
    Scene,
    captions,
    largest,
    make_scene,
)  # fmt: skip


@register("scenes")
class ScenesSource(Source, HasCaptions, HasLabels, HasClips, HasViews):
    """Scenes 0 .. records - 1 as rendered images, `size` pixels a side.

    ratios: smallest and largest height over width, if the images are to have shapes of their own, of about that area.
    turn: radians by which posed views of a scene may be turned from the first of them, at most.
    """

    clip_frames = CLIP_FRAMES

    def __init__(
        self,
        records: int,
        size: int,
        seed: int = 0,
        ratios: tuple[float, float] | None = None,
        turn: float = math.pi,
    ):
        self.records, self.size, self.seed, self.ratios, self.turn = records, size, seed, ratios, turn

    @classmethod
    def open(cls, data: Data) -> ScenesSource:
        ratios = data.buckets.ratios if data.buckets.enabled else None
        return cls(
            data.scenes.num_scenes, data.image_size, ratios=ratios, turn=math.radians(data.scenes.max_view_angle)
        )

    def __len__(self) -> int:
        return self.records

    def scene(self, index: int) -> Scene:
        """The ground truth of a record."""
        return make_scene(index, seed=self.seed)

    def read(self, index: int) -> np.ndarray:
        size = self.size if self.ratios is None else tuple(map(int, self.sizes(np.array([index]))[0]))
        return render(self.scene(index), size)

    def sizes(self, records: np.ndarray) -> np.ndarray:
        """(height, width) of the images of records (N,): int (N, 2)."""
        low, high = np.log(self.ratios or (1.0, 1.0))
        side = np.exp((low + (high - low) * _uniform(records, self.seed)) / 2)
        return np.stack([np.round(self.size * side), np.round(self.size / side)], axis=1).astype(np.int64)

    def captions(self, index: int) -> tuple[str, str]:
        return captions(self.scene(index))

    @property
    def classes(self) -> tuple[str, ...]:
        """The kind and color of a scene's largest solid."""
        return tuple(f"{color} {kind}" for kind in KINDS for color in COLORS)

    def label(self, index: int) -> int:
        solid = largest(self.scene(index))
        return self.classes.index(f"{solid.color} {solid.kind}")

    def clip(self, index: int, frames: int, stride: int, share: float, size: int) -> Clip:
        """A scene's clip is a video of CLIP_FRAMES frames."""
        start = start_of(share, CLIP_FRAMES, frames, stride)
        times = [(start + i * stride) / (CLIP_FRAMES - 1) for i in range(frames)]
        scene = self.scene(index)
        images = np.stack([render(scene, size, time=time) for time in times])
        fps = CLIP_FPS / stride
        return Clip(images, fps, motion.mean_flow(scene, times, fps))

    def posed_views(self, index: int, rng: np.random.Generator, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Views (size, size, 3) uint8 from `count` random cameras that look at the origin, with their (3, 4) matrices; the
        others are turned from the first by at most `turn`, to either side."""
        low, high = np.array([(0.0, 2 * math.pi), VIEW_POLAR, VIEW_RADIUS]).T
        random = rng.random((count, 3))
        places = low + (high - low) * random
        places[1:, 0] = places[0, 0] + (2 * random[1:, 0] - 1) * self.turn
        cameras = [Camera(*map(float, place)) for place in places]
        images, matrices = posed_views(self.scene(index), cameras, self.size)
        return list(zip(images, matrices, strict=True))

    def describe(self, index: int) -> str:
        return f"scene {index}"

    def fingerprint(self) -> str:
        shapes = "" if self.ratios is None else f"-{self.ratios[0]}-{self.ratios[1]}"
        turn = "" if self.turn == math.pi else f"-turn{self.turn:.4f}"
        return f"scenes-v{VERSION}-{self.records}-{self.size}-{self.seed}{shapes}{turn}"


def _uniform(records: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each record, all at once: the finalizer of SplitMix64 (Steele et al. 2014)."""
    mixed = np.asarray(records).astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) / 2.0**64


def scenes_of(source: Source, records: Sequence[int]) -> list[Scene]:
    """The scenes that a source of scenes renders as these records.

    Raises:
      ValueError: another source.
    """
    if not isinstance(source, ScenesSource):
        raise ValueError(
            f"the records of a {type(source).__name__} are no scenes whose solids are known; config.data.source must be scenes"
        )
    return [source.scene(int(record)) for record in records]


def truth_of(data: Data, source: Source, records: Sequence[int]) -> dict[str, np.ndarray]:
    """Labels of records: name -> int64 (len(records),), as `scenes.truth.labels`; empty where there is no ground truth."""
    return truth.labels(scenes_of(source, records)) if isinstance(source, ScenesSource) else {}
