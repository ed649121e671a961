"""Settings of preparation: sources, criteria, duplicates, decontamination and layout. `config.fields` builds and checks them.

The paper's criteria are unknown; the defaults are those of similar works: short side >= 256, ratio <= 4, aesthetic >= 4.75,
watermark < 0.5, unsafe < 0.5 (LAION-Aesthetics, PixArt), duplicates dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from lumos_jax.config import fields
from lumos_jax.config.fields import Rule, above, at_least, between

Kind = Literal[
    "scenes", "img2dataset", "tars", "sa1b", "journeydb", "imagenet", "tfds", "arrayrecord", "folder", "parquet"
]


@dataclasses.dataclass(frozen=True)
class Source:
    """One collection of images, in the form in which it was downloaded."""

    kind: Annotated[
        Kind,
        "img2dataset: .tar + .parquet; tars: plain WebDataset shards; sa1b: sa_*.tar; journeydb: .tgz + .jsonl; imagenet:",
        "class .tar files, the .tar of those, or class folders; tfds: prepared ArrayRecord or TFRecord files; arrayrecord;",
        "folder: image files; parquet: a column of struct<bytes, path> (Hugging Face); scenes: rendered here, to try it",
    ] = "scenes"
    path: Annotated[str, "directory, file or glob, local or an fsspec URL; searched recursively"] = ""
    name: Annotated[str, "in reports; default: the kind"] = ""
    priority: Annotated[int, "of duplicates, the one from the source with the highest is kept"] = 0
    metadata: Annotated[
        str, "parquet files with scores to join (LAION, COYO), or JourneyDB's .jsonl: directory, file or glob"
    ] = ""
    join: Annotated[Literal["url", "key"], "by which column `metadata` is joined"] = "url"
    max_records: Annotated[int, at_least(0), "cap on records kept, chosen by hash value; 0: none"] = 0
    num_scenes: Annotated[int, at_least(1), "kind=scenes: how many are rendered"] = 240

    @property
    def label(self) -> str:
        """The name in reports."""
        return self.name or self.kind

    def check(self) -> dict[str, bool]:
        return {
            f"config.sources: {self.label} needs a path": not self.path and self.kind != "scenes",
            f"config.sources: {self.label} takes neither path nor metadata, it is rendered here":
                bool(self.path or self.metadata) and self.kind == "scenes",
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Criteria:
    """What a record must satisfy. The four scores are compared before an image is decoded, where the metadata has
    them; a record without a score satisfies its criterion."""

    min_aesthetic: Annotated[float, "LAION's aesthetic predictor, 0 .. 10"] = 4.75
    max_watermark: Annotated[float, "probability of a watermark"] = 0.5
    max_unsafe: Annotated[float, "probability of unsafe content"] = 0.5
    min_similarity: Annotated[float, "CLIP similarity of image and caption, -1 .. 1; -1: any"] = -1.0
    short_side: Annotated[int, at_least(1), "pixels, at least"] = 256
    max_ratio: Annotated[float, at_least(1), "longer over shorter side, at most"] = 4.0
    max_pixels: Annotated[int, at_least(1), "height x width, at most"] = 1 << 28
    min_bytes: Annotated[int, at_least(0), "of the encoded image, at least"] = 0
    min_blur: Annotated[
        float, at_least(0), "variance of the Laplacian at a short side of 128 to 255 pixels, at least"
    ] = 0.0
    min_entropy: Annotated[float, between(0, 8), "bits of the histogram of luma, at least"] = 0.0
    max_border: Annotated[float, between(0, 1), "share of the area in borders of one shade, at most"] = 1.0
    need_caption: Annotated[bool, "whether records without a caption are rejected"] = False
    min_words: Annotated[int, at_least(0), "of a caption, where there is one, at least"] = 0
    max_words: Annotated[int, at_least(1), "of a caption, at most"] = 1000
    max_repetition: Annotated[
        float, between(0, 1), "share of a caption's words that repeat an earlier one, at most"
    ] = 1.0
    banned: Annotated[tuple[str, ...], "words and phrases that no caption may contain; case is ignored"] = ()


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Of records that show the same, one is kept: highest source priority, then area, aesthetic score, lowest identity."""

    exact: Annotated[bool, "drop equal files (sha256)"] = True
    phash_distance: Annotated[
        int, between(-1, 4), "drop images whose perceptual hashes differ in at most so many of 64 bits; -1: off"
    ] = 4
    embeddings: Annotated[
        str, "directory of features cached by `prepare cache`, for near-duplicates by cosine; empty: off"
    ] = ""
    embeddings_set: Annotated[str, "the prepared data set whose records that cache holds, matched by sha256"] = ""
    min_cosine: Annotated[float, between(0, 1), "similarity from which features are duplicates"] = 0.95
    partitions: Annotated[
        int,
        between(0, 1 << 16),
        "number of partitions by hash, one in memory a process; 0: so many that each has 4M rows at most",
    ] = 0

    def check(self) -> dict[str, bool]:
        return {
            "config.duplicates.embeddings and embeddings_set go together: a cache, and the prepared set that it was made of":
                bool(self.embeddings) != bool(self.embeddings_set),
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Decontamination:
    """Records that are in an evaluation set are dropped."""

    sets: Annotated[
        tuple[str, ...],
        "evaluation sets: folders of images, or files of hashes: .npy of perceptual ones (uint64), .txt of those or of sha256,",
        "a hash in hexadecimal at the start of each line",
    ] = ()
    phash_distance: Annotated[int, between(0, 16), "bits in which a record may differ from an evaluation image"] = 6


@dataclasses.dataclass(frozen=True)
class Write:
    """The layout of the prepared data set."""

    layout: Annotated[
        Literal["arrayrecord", "index"],
        "arrayrecord: compacted shards; index: where records lie in the original shards",
    ] = "arrayrecord"
    shard_bytes: Annotated[int, at_least(1), "of an output shard, about"] = 512 << 20
    group_inputs: Annotated[int, at_least(1), "input files, chosen at random, whose records are shuffled together"] = 64
    seed: Annotated[int, at_least(0), "of these random choices, and of the one of max_records"] = 0


@dataclasses.dataclass(frozen=True)
class Prices:
    """For the forecast, in US dollars. The defaults are in the range of today's large clouds; set your own."""

    core_hour: Annotated[float, at_least(0), "of one core for one hour"] = 0.04
    gb_month: Annotated[float, at_least(0), "of one GB stored for a month"] = 0.02
    gb_read: Annotated[float, at_least(0), "of one GB read; 0 within a region"] = 0.0


@dataclasses.dataclass(frozen=True)
class Prepare:
    """All settings of a prepared data set; DIR/plan.json holds them."""

    sources: Annotated[tuple[Source, ...], "of records"] = (Source(),)
    criteria: Criteria = Criteria()
    duplicates: Duplicates = Duplicates()
    decontamination: Decontamination = Decontamination()
    write: Write = Write()
    prices: Prices = Prices()
    max_failed_shards: Annotated[float, between(0, 1), "share of input files that may be unreadable"] = 0.001
    sample: Annotated[
        float,
        Rule(lambda share: 0 < share <= 1, "above 0 and at most 1"),
        "share of the records that are scanned, those of the lowest sha256: duplicates are in together",
    ] = 1.0
    sample_inputs: Annotated[
        float,
        Rule(lambda share: 0 < share <= 1, "above 0 and at most 1"),
        "share of the input files that are read; below 1, duplicates in files that are not read are missed",
    ] = 1.0
    task_bytes: Annotated[int, above(0), "of the input files of one task, about"] = 1 << 30

    def check(self) -> dict[str, bool]:
        labels = [source.label for source in self.sources]
        return {
            "config.sources: name at least one": not self.sources,
            "config.sources: one source of kind=scenes at most, as they share a folder":
                sum(source.kind == "scenes" for source in self.sources) > 1,
            f"config.sources: several are named {max(labels, key=labels.count, default='')!r}; set `name`":
                len(set(labels)) < len(labels),
        }  # fmt: skip


def to_dict(settings: Prepare) -> dict[str, Any]:
    """Nested dicts of plain values; `from_dict` is its inverse."""
    return dataclasses.asdict(settings)


def from_dict(tree: Mapping[str, Any]) -> Prepare:
    """Builds and validates. Raises ValueError: an unknown field, a value of the wrong type or outside its range."""
    settings = fields.build(Prepare, tree)
    fields.validate(settings)
    return settings
