"""Settings of the data: where records come from, what one gives a batch, and in which order they train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from lumos_jax.config.fields import at_least, between, require
from lumos_jax.data import SAMPLE_TYPES, SOURCES

SourceName = Literal[tuple(sorted(SOURCES))]
SampleType = Literal[tuple(sorted(SAMPLE_TYPES))]


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from, and in which order."""

    source: Annotated[SourceName, "where records come from"] = "scenes"
    path: Annotated[
        str,
        "folder: directory; videos: directory, or WebVid's or OpenVid's csv; objaverse: directory of rendered objects,",
        "<object>/000.png + 000.npy ...; arrayrecord, webdataset (.tar): directory, file or glob; tfds: data_dir (empty: its",
        "default); cached: what `python -m lumos_jax.prepare cache` wrote, latents and features in place of images",
    ] = ""
    name: Annotated[str, 'tfds: the data set\'s name, as "imagenet2012" or "oxford_flowers102:2.1.1"'] = ""
    split: Annotated[str, "tfds: the split, slicing syntax allowed"] = "train"
    num_scenes: Annotated[int, at_least(1), "scenes: how many make an epoch"] = 1_000_000
    sample_type: Annotated[
        SampleType,
        "what one record gives a batch: an image; captioned: with its caption; labeled: with its class; clip (of scenes,",
        "videos); views: two posed views (of scenes, objaverse)",
    ] = "image"
    detailed_caption_prob: Annotated[
        float, between(0, 1), "captioned: probability of the detailed caption; otherwise the raw one"
    ] = 0.5
    clean_captions: Annotated[
        bool, "captioned: clean captions from the web (lower case, no addresses, HTML, odd signs)"
    ] = False
    caption_noise: Annotated[
        float, between(0, 1), "captioned: share of training records with another record's caption (paper Fig. 2a)"
    ] = 0.0
    buckets: Annotated[
        bool,
        "captioned: batches of images of one shape each, in sizes around image_size x image_size (lumos_jax/data/aspect.py)",
    ] = False
    bucket_step: Annotated[
        int, at_least(0), "pixels of which their sides are multiples; 0: image_size / 16, as PixArt's"
    ] = 0
    bucket_ratios: Annotated[tuple[float, float], "smallest and largest height over width"] = (0.25, 4.0)
    bucket_index: Annotated[str, "where sizes read from headers are kept; empty: nowhere"] = "~/.cache/lumos_jax/sizes"
    tar_index: Annotated[str, "webdataset: where the places of records in shards are kept; empty: nowhere"] = (
        "~/.cache/lumos_jax/tars"
    )
    classes: Annotated[int, at_least(0), "labeled: number of classes; compared with what the source has"] = 0
    mixture: Annotated[
        tuple[Mapping[str, Any], ...],
        "mixture: dicts of the fields source, path, name, split and num_scenes, and weight",
    ] = ()
    image_size: Annotated[int, at_least(1), "side in pixels of the square images in a batch"] = 256
    frames: Annotated[int, at_least(1), "clip: frames a clip"] = 16
    frame_stride: Annotated[
        tuple[int, int],
        "clip: frames of the video from one frame of the clip to the next, least and most; random in training, the middle",
        "otherwise",
    ] = (3, 3)
    image_step_fraction: Annotated[
        float, at_least(0), "clip: share of the steps, evenly spread, that train on images: one frame of each record"
    ] = 0.0
    view_turn: Annotated[
        float,
        between(0, 180),
        "views of scenes: degrees that two views of a pair may be turned from each other, at most",
    ] = 180.0
    crop: Annotated[Literal["center", "random"], "random crops keep the shorter side whole; cached: center"] = "center"
    flip: Annotated[bool, "mirror half of the records, chosen from (seed, position); cached: False"] = False
    seed: Annotated[int, "of the global permutation and of crops and flips"] = 0
    holdout: Annotated[
        int, at_least(0), "records kept out of training, for the held-out loss and the sample sheets"
    ] = 0
    workers: Annotated[int, at_least(0), "decoding processes per host; 0 decodes in threads of the main process"] = 0
    threads: Annotated[int, at_least(1), "decoding threads per process"] = 4
    prefetch: ClassVar[int] = 4  # batches read ahead
    max_corrupt_rate: Annotated[
        float, between(0, 1), "share of undecodable records, over the run so far, above which it stops"
    ] = 0.01

    def check(self) -> None:
        self._check_source()
        self._check_sample_type()
        least, most = self.frame_stride
        require(1 <= least <= most, f"config.data.frame_stride={self.frame_stride} must satisfy 1 <= least <= most")
        require(
            self.image_step_fraction == 0 or (self.sample_type == "clip" and self.image_step_fraction < 1),
            f"config.data.image_step_fraction={self.image_step_fraction} must be below 1, and 0 unless "
            "config.data.sample_type=clip",
        )

    def _check_source(self) -> None:
        needed = SOURCES[self.source].needs
        require(not needed or getattr(self, needed), f"config.data.source={self.source} needs config.data.{needed}")
        require(
            self.source != "cached" or (self.crop == "center" and not self.flip),
            f"config.data.crop={self.crop}, flip={self.flip} do not go with config.data.source=cached, which holds one center "
            "crop of each image, not mirrored: set config.data.crop=center and config.data.flip=False",
        )
        require(
            (self.source == "mixture") == bool(self.mixture),
            "config.data.mixture, a tuple of dicts (source, path, ..., weight), goes with config.data.source=mixture",
        )
        if self.source == "scenes":
            require(self.num_scenes < 2**32, f"config.data.num_scenes={self.num_scenes} must be below 2^32")

    def _check_sample_type(self) -> None:
        kind = self.sample_type
        needed = SAMPLE_TYPES[kind].needs
        able = [name for name, source in sorted(SOURCES.items()) if issubclass(source, needed)]
        require(
            self.source in (*able, "cached"),
            f"config.data.source={self.source} does not go with config.data.sample_type={kind}: that goes with "
            f"{', '.join(able)}",
        )
        require(
            kind != "views" or (self.crop == "center" and not self.flip),
            f"config.data.crop={self.crop}, flip={self.flip} do not go with config.data.sample_type=views, whose cameras say "
            "where the center of an image is and which side is left: set config.data.crop=center and config.data.flip=False",
        )
        require(
            kind != "views" or self.source != "cached",
            "config.data.source=cached holds no pairs of views (config.data.sample_type=views), which are drawn anew in each "
            "epoch",
        )
        given = (self.detailed_caption_prob, self.clean_captions, self.caption_noise)
        require(
            kind == "captioned" or given == (0.5, False, 0),
            f"config.data.detailed_caption_prob, clean_captions, caption_noise={given} need config.data.sample_type=captioned",
        )
        require(
            not self.buckets or (kind == "captioned" and self.crop == "center" and self.source != "cached"),
            "config.data.buckets goes with sample_type=captioned and crop=center, and not with a cache, which holds squares; "
            f"not with sample_type={kind}, crop={self.crop}, source={self.source}",
        )
        require(
            self.buckets or (self.bucket_step, self.bucket_ratios) == (0, (0.25, 4.0)),
            "config.data.bucket_step and bucket_ratios need config.data.buckets=True",
        )
        low, high = self.bucket_ratios
        require(low <= 1 <= high, f"config.data.bucket_ratios={self.bucket_ratios} leave out the square")
        step = self.bucket_step or self.image_size // 16
        require(
            not self.buckets or (step > 0 and self.image_size % step == 0),
            f"config.data.image_size={self.image_size} is no multiple of bucket_step={self.bucket_step or 'image_size / 16'}",
        )
        require(
            (kind == "labeled") == (self.classes > 0),
            f"config.data.sample_type={kind} does not go with data.classes={self.classes}: labeled records need the number of "
            "classes, others have none",
        )
