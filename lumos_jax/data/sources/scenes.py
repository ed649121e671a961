"""The embedded scenes as a source of images, captions, labels, clips and posed views; no files."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from lumos_jax.data.base import Clip, Data, HasCaptions, HasClips, HasLabels, HasViews, Source, register, start_of
from lumos_jax.scenes import motion, render
from lumos_jax.scenes import scene as scenes


@register("scenes")
class ScenesSource(Source, HasCaptions, HasLabels, HasClips, HasViews):
    """Scenes 0 .. records - 1 as rendered images, `size` pixels a side.

    ratios: smallest and largest height over width, if the images are to have shapes of their own, of about that area.
    turn: radians by which posed views of a scene may be turned from the first of them, at most.
    turntable: whether in all clips the camera turns, and counterclockwise, in place of a motion of each scene's own.
    """

    clip_frames = scenes.CLIP_FRAMES
    classes = tuple(f"{color} {kind}" for kind in scenes.KINDS for color in scenes.COLORS)  # of a scene's largest solid

    def __init__(
        self, records: int, size: int, seed: int = 0, ratios: Sequence[float] = (), turn: float = math.pi,
        turntable: bool = False,
    ):  # fmt: skip
        self.records, self.size, self.seed, self.ratios, self.turn = records, size, seed, ratios, turn
        self.turntable = turntable

    @classmethod
    def open(cls, data: Data) -> ScenesSource:
        ratios = data.aspect_ratios if data.has_buckets else ()
        turn = math.radians(data.scenes.max_view_angle)
        turntable = data.scenes.motion == "turntable"
        return cls(data.scenes.num_scenes, data.image_size, ratios=ratios, turn=turn, turntable=turntable)

    def __len__(self) -> int:
        return self.records

    def scene(self, index: int) -> scenes.Scene:
        """The ground truth of a record."""
        return scenes.make_scene(index, seed=self.seed)

    def read(self, index: int) -> np.ndarray:
        size = tuple(map(int, self.sizes(np.array([index]))[0])) if self.ratios else self.size
        return render.render(self.scene(index), size)

    def sizes(self, records: np.ndarray) -> np.ndarray:
        low, high = np.log(self.ratios or (1.0, 1.0))
        side = np.exp((low + (high - low) * _uniform(records, self.seed)) / 2)
        return np.stack([np.round(self.size * side), np.round(self.size / side)], axis=1).astype(np.int64)

    def captions(self, index: int) -> tuple[str, str]:
        return scenes.captions(self.scene(index))

    def label(self, index: int) -> int:
        solid = scenes.largest(self.scene(index))
        return self.classes.index(f"{solid.color} {solid.kind}")

    def clip(self, index: int, frames: int, stride: int, share: float, size: int) -> Clip:
        """A scene's clip is a video of CLIP_FRAMES frames."""
        start = start_of(share, scenes.CLIP_FRAMES, frames, stride)
        times = [(start + i * stride) / (scenes.CLIP_FRAMES - 1) for i in range(frames)]
        scene, fps = self.scene(index), scenes.CLIP_FPS / stride
        if self.turntable:
            scene = dataclasses.replace(scene, motion="camera", turn=abs(scene.turn))
        images = np.stack([render.render(scene, size, time=time) for time in times])
        between = functools.partial(motion.flow, scene, size=motion.SCORE_SIDE)
        return Clip(images, fps, motion.score(between, times, fps))

    def posed_views(self, index: int, rng: np.random.Generator, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Views (size, size, 3) uint8 from `count` random cameras that look at the origin, with their (3, 4) matrices; the
        others are turned from the first by at most `turn`, to either side."""
        low, high = np.array([(0.0, 2 * math.pi), scenes.VIEW_POLAR, scenes.VIEW_RADIUS]).T
        random = rng.random((count, 3))
        places = low + (high - low) * random
        places[1:, 0] = places[0, 0] + (2 * random[1:, 0] - 1) * self.turn
        cameras, scene = [scenes.Camera(*map(float, place)) for place in places], self.scene(index)
        return [(render.render(scene, self.size, camera=c), render.camera_matrix(c)) for c in cameras]

    def describe(self, index: int) -> str:
        return f"scene {index}"

    def fingerprint(self) -> str:
        shapes = "".join(f"-{ratio}" for ratio in self.ratios)
        turn = "" if self.turn == math.pi else f"-turn{self.turn:.4f}"
        turntable = "-turntable" if self.turntable else ""
        return f"scenes-v{scenes.VERSION}-{self.records}-{self.size}-{self.seed}{shapes}{turn}{turntable}"


def _uniform(records: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each record, all at once: the finalizer of SplitMix64 (Steele et al. 2014)."""
    mixed = np.asarray(records).astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) / 2.0**64


def scenes_of(source: Source, records: Sequence[int]) -> list[scenes.Scene]:
    """The scenes that a source of scenes renders as these records. Raises ValueError: another source."""
    if not isinstance(source, ScenesSource):
        raise ValueError(
            f"the records of a {type(source).__name__} are no scenes whose solids are known; config.data.source must be scenes"
        )
    return [source.scene(int(record)) for record in records]


def truth_of(source: Source, records: Sequence[int]) -> dict[str, np.ndarray]:
    """Exact labels of records, for probes of features: name -> int64 (len(records),), whole numbers from 0.

    `shape` and `colour` of the largest solid, and `count` of solids; empty where there is no ground truth.
    """
    if not isinstance(source, ScenesSource):
        return {}
    solids = [(scenes.largest(scene), len(scene.solids)) for scene in scenes_of(source, records)]
    return {
        "shape": np.array([scenes.KINDS.index(solid.kind) for solid, _ in solids]),
        "colour": np.array([list(scenes.COLORS).index(solid.color) for solid, _ in solids]),
        "count": np.array([count for _, count in solids]),
    }
