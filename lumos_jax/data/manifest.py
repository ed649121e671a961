"""The manifest of a prepared data set: what `python -m lumos_jax.prepare write` made, from what, and by which settings.

    DIR/manifest.json    everything below; written last, so that a set with a manifest is complete
    DIR/data/            layout arrayrecord: compacted shards of encoded images or tf.train.Examples
    DIR/index/           layout index: where each record lies in the original shards, arrays of (records,) as .npy:
                         offsets uint64 (a byte in a .tar, the number of the record in an ArrayRecord), lengths uint32 (bytes),
                         and with captions caption_offsets uint64, caption_lengths uint32, caption_kinds uint8 (CAPTION_KINDS)
    DIR/sizes.npy        uint16 (records, 2): height and width of each image, upright; 0 where unknown
    DIR/tombstones.npy   uint64 (count,): numbers of the records that were taken out later, ascending; absent: none

Records are numbered shard after shard, in the order of `shards`, and keep their numbers when others get a tombstone.
Plain data: this module needs neither pyarrow nor JAX.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from lumos_jax.data import storage
from lumos_jax.data.base import digest

FORMAT = 1
MANIFEST, SIZES, TOMBSTONES, INDEX = "manifest.json", "sizes.npy", "tombstones.npy", "index"
CAPTION_KINDS = ("", ".txt", ".json")  # of caption_kinds: none, a text file, a field of a JSON file
Layout = Literal["arrayrecord", "index"]


@dataclasses.dataclass(frozen=True)
class Input:
    """A file that was read. etag: of the storage, the time of change of a local file. sha256: None if it was not computed."""

    path: str
    bytes: int
    etag: str
    source: str
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file with records. path: relative to the directory of the manifest; absolute or a URL for an original shard.
    lineage: numbers of the inputs that its records come from."""

    path: str
    kind: Literal["arrayrecord", "tar"]
    records: int
    bytes: int
    sha256: str | None = None
    lineage: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class SourceCounts:
    """Candidates of a source. reasons: why the others were not kept -> how many."""

    read: int
    kept: int
    reasons: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Images whose duplicates were taken out. digest: of their hashes, of which there are `hashes`."""

    path: str
    digest: str
    hashes: int


@dataclasses.dataclass(frozen=True)
class Tombstones:
    """version: raised with each change of the file, 0 without one."""

    version: int = 0
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A prepared data set.

    Attributes:
      plan: digest of the plan that it was made by.
      build: with `version`, names the folders of its shards (data/<build>-v<version>) and tables of records (records/...).
      version: 1, and one more after each compaction, which leaves tombstoned records out and numbers the others anew.
      settings: all settings of the preparation.
      captions: whether records have captions.
      sources: name -> its counts.
      failed_inputs: inputs that could not be read, each with at least "path" and "problem".
    """

    plan: str
    layout: Layout
    records: int
    captions: bool
    inputs: tuple[Input, ...]
    shards: tuple[Shard, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, SourceCounts] = dataclasses.field(default_factory=dict)
    evaluation_sets: tuple[EvaluationSet, ...] = ()
    tombstones: Tombstones = Tombstones()
    failed_inputs: tuple[Mapping[str, Any], ...] = ()
    build: str = ""
    version: int = 1
    format: int = FORMAT

    def digest(self) -> str:
        """A hash of all but the tombstones: it decides numbering and order, which tombstones leave as they are."""
        tree = dataclasses.asdict(self)
        del tree["tombstones"]
        return digest([json.dumps(tree, sort_keys=True)])


def write_manifest(directory: str, manifest: Manifest) -> None:
    """Write DIR/manifest.json as a whole; DIR is a directory or a URL. Raises OSError."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    storage.write_whole(storage.join(directory, MANIFEST), text.encode())


def read_manifest(directory: str) -> Manifest:
    """The manifest in a directory or at a URL.
    Raises ValueError: there is none, it is damaged or of another format; OSError: storage."""
    path = storage.join(directory, MANIFEST)
    try:
        tree = json.loads(storage.read(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{directory} has no {MANIFEST}: no prepared data set is there, or its preparation has not finished; "
            f"python -m lumos_jax.prepare write --out={directory} writes it last"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): write it again with python -m lumos_jax.prepare"
        ) from error
    return _from_tree(tree, path)


def _from_tree(tree: Any, path: str) -> Manifest:
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise ValueError(f"{path} has format {found!r}, and this version reads {FORMAT}: prepare the data set again")
    try:
        manifest = Manifest(**tree | {
            "inputs": tuple(Input(**one) for one in tree["inputs"]),
            "shards": tuple(Shard(**one | {"lineage": tuple(one.get("lineage", ()))}) for one in tree["shards"]),
            "sources": {name: SourceCounts(**one) for name, one in tree.get("sources", {}).items()},
            "evaluation_sets": tuple(EvaluationSet(**one) for one in tree.get("evaluation_sets", ())),
            "tombstones": Tombstones(**tree.get("tombstones", {})),
            "failed_inputs": tuple(tree.get("failed_inputs", ())),
        })  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks a field or has an unknown one ({error}): prepare the data set again") from error
    if manifest.records != sum(shard.records for shard in manifest.shards):
        held = sum(shard.records for shard in manifest.shards)
        raise ValueError(
            f"{path} counts {manifest.records} records, its shards hold {held}: prepare the data set again"
        )
    return manifest
