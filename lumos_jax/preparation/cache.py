"""Caches frozen features: runs every record of a source through the frozen encoders, once, into shards that training reads.

    record --data--> image --task.encode--> latent moments (or pixels), feature --data.cached--> a record of the cache

Shard i holds the records from i x shard_records on, in the source's order. Process i modulo the number of processes writes it,
on its own devices. A shard is renamed to its name when it is whole, so that an interrupted command continues after the last
whole one. A batch never reaches into the next shard: the content of a shard depends on nothing before it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lumos_jax import config, data, fileio, tasks
from lumos_jax.config.fields import refuse
from lumos_jax.data.sources import cached
from lumos_jax.train import sharding
from lumos_jax.train.cached_features import differences, made_by
from lumos_jax.train.experiment import Experiment, use_compilation_cache

# Fields that decide the content of a source, for messages; its fingerprint is what counts.
_SOURCE_FIELDS = {"scenes": ("scenes.num_scenes",), "tfds": ("tfds.name", "tfds.split")}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a cache is stored. batch_size: records encoded at a time, over all devices of a process."""

    shard_records: int
    batch_size: int
    dtype: str


def write(settings: config.Settings, out: str, options: Options, say: Callable[[str], None]) -> cached.Manifest:
    """Writes the missing shards, then the manifest, and returns it.

    Args:
      settings: data, encoder, autoencoder and task count; crops must be central and not mirrored.
      out: the directory; empty, or with an unfinished cache of the same settings.
      say: called with lines of progress.

    Raises:
      ValueError: a user's mistake; the message says what, where and what to do.
      TooManyCorruptRecords: more than config.data.max_corrupt_rate allows.
    """
    devices = jax.local_devices()  # the encoders run on each process's own, so that none waits for another
    _check_request(settings, options, len(devices))
    use_compilation_cache()
    source = data.make_source(settings.data)
    experiment = Experiment.build(settings, devices, training=False)
    task, mesh = experiment.task, experiment.mesh
    if task.uncacheable:
        raise ValueError(task.uncacheable)
    plan = made_by(settings, task) | {"data.fingerprint": source.fingerprint(), "data.source": settings.data.source}
    named = _SOURCE_FIELDS.get(settings.data.source, ())
    plan |= {f"data.{name}": operator.attrgetter(name)(settings.data) for name in named}
    plan |= {f"cache.{name}": value for name, value in dataclasses.asdict(options).items()}
    directory = pathlib.Path(out).expanduser().absolute()
    shards = _Shards(directory, len(source), options.shard_records)
    _take_directory(directory, plan)

    todo = [i for i in range(jax.process_index(), shards.count, jax.process_count()) if not shards.is_whole(i)]
    say(f"cache       {directory}: {len(source):,} records in {shards.count} shards, {len(todo)} to write here")
    say(
        f"encoders    {', '.join(map(str, task.identity.values()))} on {mesh.size} x {mesh.devices.flat[0].device_kind}"
    )
    if todo:
        if jax.process_index() == 0:
            (directory / cached.MANIFEST).unlink(missing_ok=True)
        _write_shards(experiment, source, options, shards, todo, say)
    multihost_utils.sync_global_devices("all shards are written")
    if jax.process_index() == 0 and not (directory / cached.MANIFEST).exists():
        cached.write_manifest(directory, _survey(source, shards, plan, task))
    multihost_utils.sync_global_devices("the manifest is written")
    return cached.read_manifest(str(directory))


def _check_request(settings: config.Settings, options: Options, devices: int) -> None:
    """Raises ValueError for what cannot be cached, or not so."""
    wanted, size = settings.data, options.batch_size
    refuse({
        "config.data.source=cached is a cache already; name the source that it was made from": wanted.source == "cached",
        f"config.data.sample_type={wanted.sample_type} is drawn anew from a record in each epoch, so there is nothing to "
        "cache: train on the records as they are": wanted.sample_type in ("clip", "views"),
        f"config.data.aspect_ratios={wanted.aspect_ratios}: a cache holds squares, which batches of other shapes have no use "
        "for. Train on them without a cache, or set --config.data.aspect_ratios=(1,1) to cache squares and train on those":
            wanted.has_buckets,
        f"config.data.crop={wanted.crop}, flip={wanted.flip}: a cache holds one image a record, its center crop, not "
        "mirrored. To cache that, set --config.data.crop=center and --config.data.flip=False; to train on random crops "
        "or mirrored images, do without a cache": wanted.crop != "center" or wanted.flip,
        f"--shard_records={options.shard_records} must be at least 1": options.shard_records < 1,
        f"--batch_size={size} must be at least 1": size < 1,
        f"--batch_size={size} does not split over {devices} devices": size % devices,
        f"--dtype={options.dtype} is not one of {', '.join(cached.DTYPES)}": options.dtype not in cached.DTYPES,
    })  # fmt: skip


def _take_directory(directory: pathlib.Path, plan: Mapping[str, Any]) -> None:
    """Writes plan.json into a new cache; refuses a directory that holds something else."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Listed before the plan is looked for: process 0 may write it, and then shards, at this moment.
        others = sorted(p.name for p in directory.iterdir() if not p.name.endswith(".partial"))
        there = cached.read_json(directory / cached.PLAN)
        if there is None and not others and jax.process_index() == 0:
            fileio.save_json({"format": cached.FORMAT, **plan}, directory / cached.PLAN)
    except OSError as error:
        raise fileio.failure(error, f"--out={directory} cannot be used: {error}") from error
    if there is None and others:
        raise ValueError(f"--out={directory} holds other files, as {others[0]}: give an empty or a new directory")
    field = "data.fingerprint"
    if there and data.same_fingerprint(there.get(field, ""), plan[field]):
        plan = {**plan, field: there[field]}
    if changed := there and differences(there, plan).replace("config.cache.", "--"):
        raise ValueError(
            f"--out={directory} was begun with other settings:\n{changed}\nSet them back, or give another directory"
        )


@dataclasses.dataclass(frozen=True)
class _Shards:
    """The shards of `records` records, `each` a shard."""

    directory: pathlib.Path
    records: int
    each: int

    @property
    def count(self) -> int:
        return -(-self.records // self.each)

    def path(self, shard: int) -> pathlib.Path:
        return self.directory / cached.shard_name(shard, self.count)

    def range(self, shard: int) -> range:
        return range(shard * self.each, min((shard + 1) * self.each, self.records))

    def batches(self, shard: int, size: int) -> list[range]:
        """The last one may be short."""
        return [self.range(shard)[first : first + size] for first in range(0, len(self.range(shard)), size)]

    def is_whole(self, shard: int) -> bool:
        return cached.shard_is_whole(self.path(shard), len(self.range(shard)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(task: tasks.Task, dtype: str, frozen: Any, batch: Any) -> tuple[dict[str, jax.Array], jax.Array]:
    """(arrays as they are stored, finite bool (B,))."""
    found = task.encode(frozen, batch)
    kept = {k: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a for k, a in sorted(found.items())}
    finite = [jnp.isfinite(a.astype(jnp.float32)).all(tuple(range(1, a.ndim))) for a in kept.values()]
    return kept, jnp.stack(finite).all(0)


def _write_shards(experiment: Experiment, source, options: Options, shards: _Shards, todo: list[int], say) -> None:
    settings, task, size = experiment.settings, experiment.task, options.batch_size
    meter = data.CorruptMeter(settings.data.max_corrupt_rate)
    batches = [batch for shard in todo for batch in shards.batches(shard, size)]
    iterator = data.make_record_iterator(settings.data, source, batches, task.host, everything=True)
    began = time.monotonic()

    def records_of(shard: int) -> Iterator[bytes]:
        pending = None  # a batch that is on the device while the one before it is written
        for _ in shards.batches(shard, size):
            host = next(iterator)
            for line in meter.add(host):
                say(line)
            batch = _padded(experiment.mesh, host, size)
            following = host, _encode(task, options.dtype, experiment.frozen, batch)
            if pending is not None:
                yield from _encoded_records(*pending, task, source, options.dtype)
            pending = following
        yield from _encoded_records(*pending, task, source, options.dtype)

    try:
        for done, shard in enumerate(todo, start=1):
            data.write_arrayrecord(shards.path(shard), records_of(shard), compress=False)
            rate = meter.read / (time.monotonic() - began)
            left = sum(len(shards.range(i)) for i in todo[done:]) / rate
            say(f"shard {shard + 1}/{shards.count}  {rate:.0f} records/s  {left / 60:.0f} min left")
    finally:
        iterator.close()


def _padded(mesh: jax.sharding.Mesh, host: Mapping[str, np.ndarray], size: int) -> dict[str, jax.Array]:
    """A host batch on the mesh, padded to `size` rows with zeros (black images, masked tokens): one compiled shape."""

    def pad(array):
        return np.concatenate([array, np.zeros((size - len(array), *array.shape[1:]), array.dtype)])

    arrays = {name: pad(array) for name, array in sharding.device_arrays(host).items()}
    return sharding.global_batch(mesh, arrays, size)


def _encoded_records(host: Mapping[str, np.ndarray], found, task: tasks.Task, source, dtype: str) -> Iterator[bytes]:
    """The records of a batch as the cache stores them. Raises ValueError for one that is not finite in that dtype."""
    kept, finite = jax.tree.map(np.asarray, found)
    texts = sorted(name for name, array in host.items() if array.dtype.hasobject)
    for row, number in enumerate(map(int, host["record"])):
        if not finite[row]:
            raise ValueError(
                f"what the encoders make of record {number} ({source.describe(number)}) is not finite in {dtype}: "
                "use --dtype=bfloat16 or float32 with another --out"
            )
        arrays = {name: array[row] for name, array in kept.items()}
        arrays |= {name: arrays[name][: host[mask][row].sum()] for name, mask in task.ragged.items()}
        arrays |= {name: cached.of_text(host[name][row]) for name in texts}
        weight, problem = float(host["weight"][row]), str(host["problem"][row])
        yield cached.encode_record(cached.Record(number, weight, problem, arrays))


def _survey(source, shards: _Shards, plan: Mapping[str, Any], task: tasks.Task) -> cached.Manifest:
    """The manifest of shards that are all written. Reads every record once: raises ValueError for a damaged shard now."""
    arrays, undecodable, sizes, ragged = None, 0, [], {*task.ragged, "caption", "caption_detailed"}
    for shard in range(shards.count):
        path, numbers = shards.path(shard), shards.range(shard)
        try:
            for number, record in zip(numbers, cached.read_shard(path), strict=True):
                held = cached.described(record.arrays, ragged)
                arrays = held if arrays is None else arrays
                if record.number != number or held != arrays:
                    raise ValueError(f"record {number} is another one")
                undecodable += record.weight == 0
        except (ValueError, OSError, data.CorruptRecord) as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it and run the same command again, which writes it anew (--out must be a "
                "directory that all processes see)"
            ) from error
        sizes.append((path.name, len(numbers), path.stat().st_size))
    parts = tuple((len(part.source), part.weight) for part in source.parts)
    return cached.Manifest(plan, arrays, len(source), undecodable, parts, tuple(sizes))
