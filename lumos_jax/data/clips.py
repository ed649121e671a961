"""Clips: a few frames of a video, evenly spaced, with how fast they follow each other and how much moves in them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lumos_jax import config
from lumos_jax.data.decode import UndecodableImage, fit_square
from lumos_jax.data.loaders import BatchLoader, HostBatch, RecordLoader, Row, require, stream
from lumos_jax.data.motion import measured
from lumos_jax.data.sources import MixtureSource, Source
from lumos_jax.scenes.scene import CLIP_FRAMES, ScenesSource


@dataclasses.dataclass(frozen=True)
class Clip:
    """frames: F pictures (H, W, 3) uint8. fps: of the clip. motion: its score, as `motion` has it; None to measure it."""

    frames: Sequence[np.ndarray]
    fps: float
    motion: float | None


class ClipSource(Source, Protocol):
    def clip(self, index: int, frames: int, stride: int, share: float, size: int) -> Clip:
        """`frames` frames of a video, every `stride`-th.

        Args:
          index: record number.
          frames, stride: see config.data.
          share: where the clip begins, 0 .. 1 (exclusive) of the places where it can.
          size: side of the square that the pictures will be cut to; what is smaller on disk may stay so.

        Raises:
          UndecodableImage or OSError: it cannot be decoded, or is shorter than that.
        """
        ...


def start_of(share: float, total: int, frames: int, stride: int) -> int:
    """The first frame of a clip in a video of `total` frames. Raises UndecodableImage if that is too short."""
    room = total - ((frames - 1) * stride + 1)
    if room < 0:
        raise UndecodableImage(f"{total} frames are too few for {frames} with a stride of {stride}")
    return int(share * (room + 1))


@dataclasses.dataclass(frozen=True)
class Clips(RecordLoader):
    """Clips: `frames` uint8 (B, F, S, S, 3), `fps` float32 (B,) and `motion` float32 (B,).

    In training a record's own random numbers choose stride and beginning, and a crop and a mirror image that are the same for
    all frames; otherwise the stride is the middle one and the clip begins where the video does.
    """

    source: ClipSource
    frames: int
    stride: tuple[int, int]
    size: int
    seed: int
    training: bool
    random_crop: bool
    flip: bool

    def row(self) -> Row:
        return {
            "frames": (np.dtype(np.uint8), (self.frames, self.size, self.size, 3)),
            "fps": (np.dtype(np.float32), ()),
            "motion": (np.dtype(np.float32), ()),
        }

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        least, most = self.stride
        stride, begin, shift, flip = (least + most) // 2, 0.0, 0.5, False
        if self.training:
            draw = stream(self.seed, position).random(4)
            stride, begin = least + int(draw[0] * (most - least + 1)), float(draw[1])
            shift = float(draw[2]) if self.random_crop else 0.5
            flip = bool(self.flip and draw[3] < 0.5)
        clip = self.source.clip(record, self.frames, stride, begin, self.size)
        frames = np.stack([fit_square(frame, self.size, shift=shift, flip=flip) for frame in clip.frames])
        motion = measured(frames, clip.fps) if clip.motion is None else clip.motion
        return {"frames": frames, "fps": np.float32(clip.fps), "motion": np.float32(motion)}


@dataclasses.dataclass(frozen=True)
class Stills(RecordLoader):
    """One frame of each clip's video, any in training: `image` uint8 (B, S, S, 3)."""

    clips: Clips

    @property
    def source(self) -> Source:
        return self.clips.source

    def row(self) -> Row:
        return {"image": (np.dtype(np.uint8), (self.clips.size, self.clips.size, 3))}

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        return {"image": self.clips.load(position, record)["frames"][0]}


@dataclasses.dataclass(frozen=True)
class Joint(BatchLoader):
    """Clips, and in a share of the steps pictures. Which steps, the share alone says: they are evenly spread."""

    clips: Clips
    pictures: Stills
    share: float
    batch_size: int

    def row(self) -> Row:
        return self.clips.row()  # the larger of the two

    def map(self, element: Sequence[tuple[int, int]]) -> HostBatch:
        step = element[0][0] // self.batch_size
        return (self.pictures if is_picture_step(step, self.share) else self.clips).map(element)


def is_picture_step(step: int, share: float) -> bool:
    return math.floor((step + 1) * share) > math.floor(step * share)


def joint(data: config.Data, clips: Clips, batch_size: int) -> Clips | Joint:
    """The loader of training batches of that many rows, as config.data.image_step_fraction says."""
    if not data.image_step_fraction:
        return clips
    stills = Stills(dataclasses.replace(clips, frames=1, stride=(1, 1)))
    return Joint(clips, stills, data.image_step_fraction, batch_size)


def make_clips(data: config.Data, source: Source, training: bool) -> Clips:
    """The loader that config.data describes.

    Raises:
      ValueError: the source has no clips, or none that long.
    """
    require(source, "clip", "clip: {} ... are no videos. Sources that have clips are scenes and videos")
    for part in source.sources if isinstance(source, MixtureSource) else [source]:
        if isinstance(part, ScenesSource) and (data.frames - 1) * data.frame_stride[1] >= CLIP_FRAMES:
            raise ValueError(
                f"config.data.frames={data.frames} with frame_stride={data.frame_stride}: a scene's clip has {CLIP_FRAMES} "
                "frames; (frames - 1) x stride must be below that"
            )
    crop, flip = training and data.crop == "random", training and data.flip
    return Clips(source, data.frames, data.frame_stride, data.image_size, data.seed, training, crop, flip)
