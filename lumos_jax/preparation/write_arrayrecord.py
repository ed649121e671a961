"""Layout arrayrecord: the kept images, as they were downloaded, in new ArrayRecord shards.

Inputs are grouped at random; each group is a task. Its files are read side by side, each sequentially and once; a random
permutation decides which file gives the next image. Consecutive images of about shard_bytes become a shard, and are shuffled
within it. A process holds one shard in memory.

Shuffles sort by a hash of (seed, purpose, place), which no version of a library changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lumos_jax.data import shards, storage
from lumos_jax.data.manifest import Shard
from lumos_jax.preparation import record_files, scan_rows, selection
from lumos_jax.preparation.readers.base import READERS, DamagedInput
from lumos_jax.preparation.settings import Write

_SCANNED = (*record_files.COLUMNS, "offset", "height", "width", "caption", "detailed")


@dataclasses.dataclass(frozen=True)
class Groups:
    """inputs: numbers of the inputs of each group. shards: how many it writes. first_shard, first_record: of each group, and
    behind the last. captions: whether records are tf.train.Examples."""

    inputs: tuple[tuple[int, ...], ...]
    shards: tuple[int, ...]
    first_shard: tuple[int, ...]
    first_record: tuple[int, ...]
    captions: bool


def groups(inputs: np.ndarray, write: Write) -> Groups:
    """inputs: selection.inputs. Inputs of which nothing is kept are in no group."""
    kept = np.flatnonzero(inputs[:, 0])
    kept = kept[shuffled(len(kept), f"groups {write.seed}")]
    members = tuple(tuple(kept[i : i + write.group_inputs].tolist()) for i in range(0, len(kept), write.group_inputs))
    counts = [int(inputs[list(group), 0].sum()) for group in members]
    sizes = [int(inputs[list(group), 1].sum()) for group in members]
    number = [min(count, max(1, round(size / write.shard_bytes))) for count, size in zip(counts, sizes, strict=True)]
    firsts = [tuple(np.cumsum([0, *each]).tolist()) for each in (number, counts)]
    return Groups(members, tuple(number), *firsts, bool(inputs[:, 2].any()))


def shuffled(count: int, key: str) -> np.ndarray:
    """A permutation of range(count) that depends on the key alone."""
    salt = np.frombuffer(hashlib.sha256(key.encode()).digest()[:8], "<u8")[0]
    z = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64 (Steele et al. 2014), a bijection
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ z >> np.uint64(31))


def write_group(out: str, plan: Any, selected: selection.Selection, write: Write, group: int) -> record_files.Part:
    """Writes the shards of a group, and its record table at last; skips one that is whole.
    Raises ValueError: an input has changed since it was scanned; OSError."""
    build = record_files.build(selected.digest, write)
    folder = record_files.directory(out, build)
    if (done := record_files.read_part(folder, group)) and all(is_whole(out, shard) for shard in done.shards):
        return done
    made = groups(selection.inputs(out, selected.digest), write)
    numbers = made.inputs[group]
    rows = _kept_rows(out, plan, selected, numbers)
    turns = np.repeat(np.arange(len(numbers)), [len(table) for table in rows])
    turns = turns[shuffled(len(turns), f"turns {write.seed} {group}")]
    # Place of each turn's row in the joined table: the rows of an input come in their own order.
    starts = np.cumsum([0, *map(len, rows)])
    order = np.empty(len(turns), np.int64)
    order[np.argsort(turns, kind="stable")] = np.arange(len(turns))
    streams = [_images(plan.inputs[number], some) for number, some in zip(numbers, rows, strict=True)]
    table = _joined(rows)
    written, places = [], []
    for number, chosen in enumerate(_split(order, table["bytes"].to_numpy()[order], made.shards[group])):
        images = [next(streams[i]) for i in np.searchsorted(starts, chosen, side="right") - 1]
        within = shuffled(len(chosen), f"shard {write.seed} {group} {number}")
        places.append(chosen[within])
        records = _records([images[i] for i in within], table.take(chosen[within]), made.captions)
        lineage = tuple(sorted({numbers[i] for i in np.searchsorted(starts, chosen, side="right") - 1}))
        path = f"{record_files.shard_directory(build)}/" + shard_name(made, made.first_shard[group] + number)
        written.append(write_shard(out, path, records, lineage))
    ordered = table.take(np.concatenate(places))
    return record_files.write_part(
        folder, group, made.first_record[group], ordered, {"sizes": record_files.sizes(ordered)}, written
    )


def _images(given: Any, rows: Any) -> Iterator[bytes]:
    """The encoded images of rows of an input. Raises ValueError: they are not those that were scanned."""
    places = list(zip(*(rows[name].to_pylist() for name in ("row", "offset", "bytes")), strict=True))
    try:
        images = READERS[given.kind].images(given, places)
        for (row, _, _), digest, image in zip(places, rows["sha256"].to_pylist(), images, strict=True):
            if hashlib.sha256(image).digest() != digest:
                raise DamagedInput(f"its image {row} is another one")
            yield image
    except DamagedInput as error:
        raise ValueError(
            f"{given.path} has changed since it was scanned ({error}): plan and scan anew elsewhere"
        ) from error


def shard_name(made: Groups, number: int) -> str:
    return f"shard-{number:05d}-of-{made.first_shard[-1]:05d}.arrayrecord"


def is_whole(out: str, shard: Shard) -> bool:
    """Whether a shard is there with the bytes that it had."""
    path = storage.join(out, shard.path)
    return storage.exists(path) and storage.stat(path).size == shard.bytes


def write_shard(out: str, path: str, records: Iterator[bytes], lineage: tuple[int, ...]) -> Shard:
    """Writes out/path, whole under its name or not at all."""
    with storage.replacing(storage.join(out, path)) as file:
        count = shards.write_arrayrecord(file, records, compress=False)
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        return Shard(path, "arrayrecord", count, os.path.getsize(file), digest, lineage)


def _kept_rows(out: str, plan: Any, selected: selection.Selection, numbers: tuple[int, ...]) -> list[Any]:
    """The kept rows of each of these inputs, as pyarrow.Tables of _SCANNED."""
    import pyarrow.compute

    found, task_of = {}, {number: task for task, inputs in enumerate(plan.tasks) for number in inputs}
    for task in sorted({task_of[number] for number in numbers}):
        here = [number for number in numbers if task_of[number] == task]
        table = scan_rows.read(out, task, _SCANNED).take(selection.kept(out, selected.digest, task))
        for number in here:
            found[number] = table.filter(pyarrow.compute.equal(table["input"], number)).combine_chunks()
    return [found[number] for number in numbers]


def _joined(tables: list[Any]) -> Any:
    import pyarrow as pa

    return pa.concat_tables(tables).combine_chunks()


def _split(order: np.ndarray, sizes: np.ndarray, number: int) -> list[np.ndarray]:
    """`number` runs of about the same bytes, none of them empty."""
    begins = np.cumsum(sizes) - sizes
    wanted = np.arange(1, number) * (int(sizes.sum()) / number)
    edges = np.searchsorted(begins, wanted)
    edges = np.maximum(edges, np.arange(1, number))
    edges = np.minimum(edges, len(order) - np.arange(number - 1, 0, -1))
    return np.split(order, np.maximum.accumulate(edges) if number > 1 else [])


def _records(images: list[bytes], rows: Any, captions: bool) -> Iterator[bytes]:
    if not captions:
        yield from images
        return
    for image, raw, detailed in zip(images, rows["caption"].to_pylist(), rows["detailed"].to_pylist(), strict=True):
        texts = {"caption": raw.encode(), "caption_detailed": detailed.encode()}
        yield example(
            {"image/encoded": image} | {name: text for name, text in texts.items() if text or name == "caption"}
        )


def example(features: Mapping[str, bytes]) -> bytes:
    """A serialized tf.train.Example of features of one byte string each."""

    def field(*parts: bytes) -> bytes:
        """Field 1 of a message."""
        return b"\x0a" + _varint(sum(map(len, parts))) + b"".join(parts)

    entries = []
    for name, value in sorted(features.items()):
        feature = field(field(value))  # Feature.bytes_list, BytesList.value
        entries.append(field(field(name.encode()), b"\x12" + _varint(len(feature)) + feature))
    return field(*entries)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])
