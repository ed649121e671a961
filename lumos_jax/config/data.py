"""Settings of the data: where records come from, what one gives a batch, and in which order they train."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from lumos_jax.config.fields import Rule, at_least, between
from lumos_jax.data import SAMPLE_TYPES, SOURCES

SourceName = Literal[tuple(sorted(SOURCES))]
SampleType = Literal[tuple(sorted(SAMPLE_TYPES))]


@dataclasses.dataclass(frozen=True)
class Scenes:
    """The embedded scenes, data.source=scenes."""

    num_scenes: Annotated[int, between(1, 2**32 - 1), "how many make an epoch"] = 1_000_000
    max_view_angle: Annotated[float, between(0, 180), "degrees between the two views of a pair, at most"] = 180.0
    motion: Annotated[
        Literal["any", "turntable"],
        "of clips. any: the camera turns either way, or solids move, which the first frame does not tell; turntable: the",
        "camera turns counterclockwise, so that first frame and motion id tell what follows",
    ] = "any"


@dataclasses.dataclass(frozen=True)
class Tfds:
    """TensorFlow Datasets, data.source=tfds; data.path is its data_dir (empty: its default)."""

    name: Annotated[str, 'of the data set, as "imagenet2012" or "oxford_flowers102:2.1.1"'] = ""
    split: Annotated[str, "slicing syntax allowed"] = "train"


@dataclasses.dataclass(frozen=True)
class Captions:
    """Which caption of a record trains, data.sample_type=captioned."""

    detailed_caption_prob: Annotated[float, between(0, 1), "of the detailed caption; otherwise the raw one"] = 0.5
    clean: Annotated[bool, "clean captions from the web (lower case, no addresses, HTML, odd signs)"] = False
    noise: Annotated[
        float, between(0, 1), "share of training records with another record's caption (paper Fig. 2a)"
    ] = 0.0


@dataclasses.dataclass(frozen=True)
class Clips:
    """Frames of videos, data.sample_type=clip."""

    frames: Annotated[int, at_least(1), "of a clip"] = 16
    frame_stride: Annotated[
        tuple[int, int],
        Rule(lambda stride: 1 <= stride[0] <= stride[1], "1 <= least <= most"),
        "frames of the video from one frame of the clip to the next, least and most; random in training, the middle otherwise",
    ] = (3, 3)
    image_step_fraction: Annotated[
        float,
        Rule(lambda share: 0 <= share < 1, "at least 0 and below 1"),
        "share of the steps, evenly spread, that train on images: one frame of each record",
    ] = 0.0


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from, and in which order."""

    source: Annotated[SourceName, "where records come from"] = "scenes"
    path: Annotated[
        str,
        "folder: directory; videos: directory, or WebVid's or OpenVid's csv; objaverse: directory of rendered objects,",
        "<object>/000.png + 000.npy ...; arrayrecord, webdataset (.tar): directory, file or glob; tfds: data_dir (empty: its",
        "default); prepared: directory or URL, what `python -m lumos_jax.prepare write` wrote; cached: what",
        "`python -m lumos_jax.prepare cache` wrote, latents and features in place of images",
    ] = ""
    sample_type: Annotated[
        SampleType,
        "what one record gives a batch: an image; captioned: with its caption; labeled: with its class; clip (of scenes,",
        "videos); views: two posed views (of scenes, objaverse)",
    ] = "image"
    mixture: Annotated[
        tuple[Mapping[str, Any], ...],
        "mixture: dicts of the fields source, path, name, split and num_scenes, and weight",
    ] = ()
    image_size: Annotated[int, at_least(1), "side in pixels of the square images in a batch"] = 256
    aspect_ratios: Annotated[
        tuple[float, float],
        Rule(lambda ratios: ratios[0] <= 1 <= ratios[1], "least <= 1 <= most"),
        "captioned: height over width, least and most, of batches of one shape each around image_size x image_size",
        "(lumos_jax/data/aspect.py); (1, 1): all images are square",
    ] = (1.0, 1.0)
    num_classes: Annotated[int, at_least(0), "labeled: compared with what the source has"] = 0
    crop: Annotated[Literal["center", "random"], "random crops keep the shorter side whole; cached: center"] = "center"
    flip: Annotated[bool, "mirror half of the records, chosen from (seed, position); cached: False"] = False
    seed: Annotated[int, "of the order and of crops and flips"] = 0
    order: Annotated[
        Literal["global", "block"],
        "global: a permutation of all records; block: of blocks of consecutive records, shuffled within a window, so that each",
        "block is read at once, with few requests of remote storage; depends on the batch size too",
    ] = "global"
    block_records: Annotated[int, at_least(1), "order=block: consecutive records of a block"] = 128
    block_window: Annotated[int, at_least(1), "order=block: blocks whose records are shuffled together"] = 128
    holdout: Annotated[
        int, at_least(0), "records kept out of training, for the held-out loss and the sample sheets"
    ] = 0
    workers: Annotated[int, at_least(0), "decoding processes per host; 0 decodes in threads of the main process"] = 0
    prefetch: ClassVar[int] = 4  # batches read ahead
    max_corrupt_rate: Annotated[
        float, between(0, 1), "share of undecodable records, over the run so far, above which it stops"
    ] = 0.01
    max_failed_shards: Annotated[
        float,
        between(0, 1),
        "arrayrecord, webdataset: share of shards that may be unreadable; they are left out and named",
    ] = 0.001
    scenes: Scenes = Scenes()
    tfds: Tfds = Tfds()
    captions: Captions = Captions()
    clips: Clips = Clips()

    @property
    def has_buckets(self) -> bool:
        """Whether batches have several shapes."""
        return self.aspect_ratios != (1, 1)

    def check(self) -> dict[str, bool]:
        kind, needed = self.sample_type, SOURCES[self.source].needs
        able = [name for name, source in sorted(SOURCES.items()) if issubclass(source, SAMPLE_TYPES[kind].needs)]
        moved, cached = self.crop != "center" or self.flip, self.source == "cached"
        here = f"config.data.crop={self.crop}, flip={self.flip} do not go with config.data"
        back = "set config.data.crop=center and config.data.flip=False"
        return {
            f"config.data.source={self.source} needs config.data.{needed}":
                bool(needed) and not operator.attrgetter(needed)(self),
            f"{here}.source=cached, which holds one center crop of each image, not mirrored: {back}": cached and moved,
            "config.data.mixture, a tuple of dicts (source, path, ..., weight), goes with config.data.source=mixture":
                (self.source == "mixture") != bool(self.mixture),
            f"config.data.source={self.source} does not go with config.data.sample_type={kind}: that goes with "
            f"{', '.join(able)}": self.source not in (*able, "cached"),
            f"{here}.sample_type=views, whose cameras say where the center of an image is and which side is left: {back}":
                kind == "views" and moved,
            "config.data.source=cached holds no pairs of views (config.data.sample_type=views), which are drawn anew in each "
            "epoch": kind == "views" and cached,
            f"config.data.captions={dataclasses.asdict(self.captions)} needs config.data.sample_type=captioned":
                kind != "captioned" and self.captions != Captions(),
            f"config.data.aspect_ratios={self.aspect_ratios} go with sample_type=captioned and crop=center, and not with a "
            f"cache, which holds squares; not with sample_type={kind}, crop={self.crop}, source={self.source}":
                self.has_buckets and (kind != "captioned" or self.crop != "center" or cached),
            "config.data.order=block does not go with config.data.aspect_ratios: the records of a bucket do not lie together. "
            "Set config.data.order=global": self.has_buckets and self.order == "block",
            f"config.data.sample_type={kind} does not go with data.num_classes={self.num_classes}: labeled records need "
            "the number of classes, others have none": (kind == "labeled") != (self.num_classes > 0),
            f"config.data.clips.image_step_fraction={self.clips.image_step_fraction} must be 0 unless "
            "config.data.sample_type=clip": self.clips.image_step_fraction > 0 and kind != "clip",
        }  # fmt: skip
