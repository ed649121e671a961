"""Clips: a few frames of a video, evenly spaced, with how fast they follow each other and how much moves in them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lumos_jax.data.base import Data, HasClips, Source
from lumos_jax.data.decode import fit_square
from lumos_jax.data.records.base import Loader, Row, Use, record_rng, register
from lumos_jax.scenes.motion import SCORE_SIDE, frame_pairs


@register("clip")
@dataclasses.dataclass(frozen=True)
class Clips(Loader):
    """Clips: `frames` uint8 (B, F, S, S, 3), `fps` float32 (B,) and `motion` float32 (B,).

    In training a record's own random numbers choose stride and beginning, and a crop and a mirror image that are the same for
    all frames; otherwise the stride is the middle one and the clip begins where the video does.
    """

    needs = HasClips
    source: Source
    frames: int
    stride: tuple[int, int]
    size: int
    seed: int
    training: bool
    random_crop: bool
    flip: bool

    @classmethod
    def check(cls, data: Data, source: Source) -> None:
        super().check(data, source)
        for part in source.parts:
            most = part.source.clip_frames
            if most is not None and (data.clips.frames - 1) * data.clips.frame_stride[1] >= most:
                raise ValueError(
                    f"config.data.clips.frames={data.clips.frames} with frame_stride={data.clips.frame_stride}: a scene's "
                    f"clip has {most} "
                    "frames; (frames - 1) x stride must be below that"
                )

    @classmethod
    def make(cls, data: Data, source: Source, use: Use) -> Clips | Joint:
        crop, flip = use.training and data.crop == "random", use.training and data.flip
        clips = cls(
            source, data.clips.frames, data.clips.frame_stride, data.image_size, data.seed, use.training, crop, flip
        )
        if not (use.training and data.clips.image_step_fraction):
            return clips
        stills = Stills(dataclasses.replace(clips, frames=1, stride=(1, 1)))
        return Joint(clips, stills, data.clips.image_step_fraction, use.batch_size)

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
            random = record_rng(self.seed, position).random(4)
            stride, begin = least + int(random[0] * (most - least + 1)), float(random[1])
            shift = float(random[2]) if self.random_crop else 0.5
            flip = bool(self.flip and random[3] < 0.5)
        clip = self.source.clip(record, self.frames, stride, begin, self.size)
        frames = np.stack([fit_square(frame, self.size, shift=shift, flip=flip) for frame in clip.frames])
        motion = motion_score(frames, clip.fps) if clip.motion is None else clip.motion
        return {"frames": frames, "fps": np.float32(clip.fps), "motion": np.float32(motion)}


@dataclasses.dataclass(frozen=True)
class Stills(Loader):
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
class Joint(Loader):
    """Clips, and in a share of the steps images: which steps, the share alone says, and they are evenly spread."""

    clips: Clips
    stills: Stills
    share: float
    batch_size: int

    @property
    def source(self) -> Source:
        return self.clips.source

    def row(self) -> Row:
        return self.clips.row()

    def row_of(self, element: Sequence[tuple[int, int]]) -> Row:
        return self._of(element[0][0]).row()

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        return self._of(position).load(position, record)

    def _of(self, position: int) -> Clips | Stills:
        return self.stills if is_image_step(position // self.batch_size, self.share) else self.clips


def is_image_step(step: int, share: float) -> bool:
    return math.floor((step + 1) * share) > math.floor(step * share)


def motion_score(frames: np.ndarray, fps: float) -> float:
    """The motion score (see scenes/motion.py) of a clip (F, S, S, 3) uint8, by Farneback's optical flow (2003)."""
    import cv2  # its libraries take a moment to load, and only this needs them

    box, size = Image.Resampling.BOX, (SCORE_SIDE, SCORE_SIDE)
    gray = [np.asarray(Image.fromarray(frame).convert("L").resize(size, box)) for frame in frames]
    pairs, scale = frame_pairs(len(frames), fps)
    # Two levels and windows of 5: on 16 pixels more would only average everything.
    flows = [cv2.calcOpticalFlowFarneback(gray[a], gray[b], None, 0.5, 2, 5, 3, 5, 1.1, 0) for a, b in pairs]
    return float(np.mean([np.linalg.norm(flow, axis=-1).mean() for flow in flows])) * scale if flows else 0.0
