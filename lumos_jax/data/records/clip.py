"""Clips: a few frames of a video, evenly spaced, with how fast they follow each other and how much moves in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lumos_jax.data.base import HasClips, register
from lumos_jax.data.decode import decode_square
from lumos_jax.data.records.base import Loader, Row, record_rng
from lumos_jax.scenes.motion import SCORE_SIDE, score


@register("clip")
class Clips(Loader):
    """Clips: `frames` uint8 (B, F, S, S, 3), `fps` float32 (B,) and `motion` float32 (B,).

    In training a record's own random numbers choose stride and beginning, and a crop and a mirror image that are the same for
    all frames; otherwise the stride is the middle one and the clip begins where the video does.

    A share of the training steps, config.data.clips.image_step_fraction, evenly spread, has one frame of each video instead:
    `image` uint8 (B, S, S, 3).
    """

    needs = HasClips

    def check(self) -> None:
        super().check()
        clips = self.data.clips
        for part in self.source.parts:
            most = part.source.clip_frames
            if most is not None and (clips.frames - 1) * clips.frame_stride[1] >= most:
                raise ValueError(
                    f"config.data.clips.frames={clips.frames} with frame_stride={clips.frame_stride}: a scene's clip has "
                    f"{most} frames; (frames - 1) x stride must be below that"
                )

    def row(self) -> Row:
        dtype, shape = self.square
        number = np.dtype(np.float32), ()
        return {"frames": (dtype, (self.data.clips.frames, *shape)), "fps": number, "motion": number}

    def row_of(self, element: Sequence[tuple[int, int]]) -> Row:
        return {"image": self.square} if self._is_image(element[0][0]) else self.row()

    def _is_image(self, position: int) -> bool:
        return self.training and is_image_step(position // self.batch_size, self.data.clips.image_step_fraction)

    def load(self, position: int, record: int) -> dict[str, np.ndarray]:
        image, clips, size = self._is_image(position), self.data.clips, self.data.image_size
        count, (least, most) = (1, (1, 1)) if image else (clips.frames, clips.frame_stride)
        stride, begin, augmentation = (least + most) // 2, 0.0, {}
        if self.training:
            random = record_rng(self.data.seed, position).random(4)
            stride, begin = least + int(random[0] * (most - least + 1)), float(random[1])
            augmentation = self.augmentation(*random[2:])
        clip = self.source.clip(record, count, stride, begin, size)
        frames = np.stack([decode_square(frame, size, **augmentation) for frame in clip.frames])
        if image:
            return {"image": frames[0]}
        motion = motion_score(frames, clip.fps) if clip.motion is None else clip.motion
        return {"frames": frames, "fps": clip.fps, "motion": motion}


def is_image_step(step: int, share: float) -> bool:
    """Whether a step is one of those, `share` of all and evenly spread, that train on images."""
    return math.floor((step + 1) * share) > math.floor(step * share)


def motion_score(frames: np.ndarray, fps: float) -> float:
    """The motion score (see scenes/motion.py) of a clip (F, S, S, 3) uint8, by Farneback's optical flow (2003)."""
    import cv2  # its libraries take a moment to load, and only this needs them
    from PIL import Image

    box, size = Image.Resampling.BOX, (SCORE_SIDE, SCORE_SIDE)
    gray = [np.asarray(Image.fromarray(frame).convert("L").resize(size, box)) for frame in frames]
    # Two levels and windows of 5: on 16 pixels more would only average everything.
    return score(lambda a, b: cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 2, 5, 3, 5, 1.1, 0), gray, fps)
