"""Caching frozen features: every record of a source through the frozen encoders, once, into shards that training reads.

    record --data--> image --task.encode--> latent moments (or pixels), feature --data.cached--> a record of the cache

Shard i holds the records from i x shard_records on, in the source's order, and is written by process i modulo the number of
processes, each on its own devices. A shard appears under its name when it is whole, so that an interrupted command goes on
after the last whole one. Batches never reach from one shard into the next: what a shard holds depends on nothing before it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lumos_jax import config, data, fileio, tasks
from lumos_jax.data import cached
from lumos_jax.train import sharding
from lumos_jax.train.experiment import Experiment, use_compilation_cache

# Fields of the networks that do not change what a cache holds: where weights are found (their content is compared instead), and
# what is applied when a record is read, or to samples only.
_FREE = frozenset(
    {
        "encoder.weights",
        "autoencoder.weights",
        "autoencoder.scaling_factor",
        "autoencoder.posterior",
        "autoencoder.tile",
    }
)
# Fields that decide what a source holds, for messages; its fingerprint is what counts.
_SOURCE_FIELDS = {"scenes": ("num_scenes",), "tfds": ("name", "split")}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a cache is stored. batch_size: records encoded at a time, over all devices of a process."""

    shard_records: int
    batch_size: int
    dtype: str


def networks(settings: config.Settings, task: tasks.Task) -> dict[str, Any]:
    """What of the frozen networks and their input decides the content of a cache, as "group.field" -> value."""
    made_by: dict[str, Any] = {"data.image_size": settings.data.image_size}
    for group, identity in task.identity.items():
        made_by[f"{group}.identity"] = identity
        fields = dataclasses.asdict(getattr(settings, group))
        if identity == fields["kind"]:  # a map without parameters
            fields = {"kind": identity}
        made_by |= {k: v for k, v in config.flatten({group: fields}).items() if k not in _FREE}
    if settings.data.sample_type != "image":
        made_by["data.sample_type"] = settings.data.sample_type
    if settings.data.sample_type == "captioned":
        made_by["data.clean_captions"] = settings.data.clean_captions
    if settings.data.sample_type == "labeled":
        made_by["data.classes"] = settings.data.classes
    return made_by


def check(settings: config.Settings, task: tasks.Task) -> None:
    """Raises ValueError unless the cache at config.data.path was made by the networks that the config names."""
    made_by = cached.read_manifest(settings.data.path).made_by
    changed = _differences(made_by, networks(settings, task))
    if changed:
        raise ValueError(
            f"config.data.path={settings.data.path!r} was cached with other networks than the config names:\n{changed}\n"
            "Set them back, or make another cache"
        )


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in now if there.get(name) != now[name]]
    return "\n".join(f"  config.{name}: {there.get(name)!r} in the cache, {now[name]!r} now" for name in names)


def write(settings: config.Settings, out: str, options: Options, say: Callable[[str], None]) -> cached.Manifest:
    """Writes the shards that are not there yet, then the manifest, and returns it.

    Args:
      settings: data, encoder, autoencoder and task count; crops must be central and not mirrored.
      out: the directory; empty, or with an unfinished cache of the same settings.
      options: as the command line gives them.
      say: takes lines of progress.

    Raises:
      ValueError: a user's mistake; the message says what, where and what to do.
      TooManyCorruptRecords: more than config.data.max_corrupt_rate allows.
    """
    _check_request(settings, options)
    use_compilation_cache(settings)
    # The encoders are on this process's devices alone, so processes need not wait for each other.
    devices = jax.local_devices()
    if options.batch_size % len(devices):
        raise ValueError(f"--batch_size={options.batch_size} does not split over {len(devices)} devices")
    source = data.make_source(settings.data)
    experiment = Experiment.build(settings, devices, training=False)
    task, frozen, mesh = experiment.task, experiment.frozen, experiment.mesh
    if task.uncacheable:
        raise ValueError(task.uncacheable)
    plan = networks(settings, task) | {"data.fingerprint": source.fingerprint(), "data.source": settings.data.source}
    plan |= {f"data.{name}": getattr(settings.data, name) for name in _SOURCE_FIELDS.get(settings.data.source, ())}
    plan |= {f"cache.{name}": value for name, value in dataclasses.asdict(options).items()}
    directory = pathlib.Path(out).expanduser().absolute()
    shards = _Shards(directory, len(source), options.shard_records)
    _take_directory(directory, plan)

    todo = [i for i in range(jax.process_index(), shards.count, jax.process_count()) if not shards.whole(i)]
    say(f"cache       {directory}: {len(source):,} records in {shards.count} shards, {len(todo)} to write here")
    say(
        f"encoders    {', '.join(map(str, task.identity.values()))} on {mesh.size} x {mesh.devices.flat[0].device_kind}"
    )
    if todo:
        if jax.process_index() == 0:
            (directory / cached.MANIFEST).unlink(missing_ok=True)
        _write_shards(settings, source, task, frozen, mesh, options, shards, todo, say)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all shards are written")
    if jax.process_index() == 0 and not (directory / cached.MANIFEST).exists():
        cached.write_manifest(directory, _survey(source, shards, plan, task))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the manifest is written")
    return cached.read_manifest(str(directory))


def _check_request(settings: config.Settings, options: Options) -> None:
    wanted = settings.data
    if wanted.source == "cached":
        raise ValueError("config.data.source=cached is a cache already; name the source that it was made from")
    if wanted.sample_type in ("clip", "views"):
        raise ValueError(
            f"config.data.sample_type={wanted.sample_type} is drawn anew from a record in each epoch, so there is nothing to "
            "cache: train on the records as they are"
        )
    if wanted.buckets:
        raise ValueError(
            "config.data.buckets=True: a cache holds squares, which batches of other shapes have no use for. Train on buckets "
            "without a cache, or set --config.data.buckets=False to cache squares and train on those"
        )
    if wanted.crop != "center" or wanted.flip:
        raise ValueError(
            f"config.data.crop={wanted.crop}, flip={wanted.flip}: a cache holds one picture a record, its centre "
            "crop, not mirrored. To cache that, set --config.data.crop=center and --config.data.flip=False; to train on random "
            "crops or mirrored pictures, do without a cache"
        )
    for name in ("shard_records", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)} must be at least 1")
    if options.dtype not in cached.DTYPES:
        raise ValueError(f"--dtype={options.dtype} is not one of {', '.join(cached.DTYPES)}")


def _take_directory(directory: pathlib.Path, plan: Mapping[str, Any]) -> None:
    """Writes plan.json into a new cache; refuses a directory that holds something else."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Listed before the plan is looked for: process 0 may write it, and then shards, at this moment.
        others = sorted(p.name for p in directory.iterdir() if not p.name.endswith(".partial"))
        there = cached.read_json(directory / cached.PLAN)
        if there is None:
            if others:
                raise ValueError(
                    f"--out={directory} holds other files, as {others[0]}: give an empty or a new directory"
                )
            if jax.process_index() == 0:
                fileio.save_json({"format": cached.FORMAT, **plan}, directory / cached.PLAN)
            return
    except OSError as error:
        raise ValueError(f"--out={directory} cannot be used: {error}") from error
    changed = _differences(there, plan).replace("config.cache.", "--")
    if changed:
        raise ValueError(
            f"--out={directory} was begun with other settings:\n{changed}\nSet them back, or give another directory"
        )


@dataclasses.dataclass(frozen=True)
class _Shards:
    """Which records stand in which shard."""

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

    def whole(self, shard: int) -> bool:
        return cached.shard_is_whole(self.path(shard), len(self.range(shard)))


@dataclasses.dataclass(frozen=True)
class _Batches(Sequence):
    """The batches of some shards, one shard after the other; the last batch of a shard may be short."""

    shards: _Shards
    todo: Sequence[int]
    size: int

    def of(self, shard: int) -> int:
        return -(-len(self.shards.range(shard)) // self.size)

    def __len__(self) -> int:
        return self.of(self.todo[0]) * (len(self.todo) - 1) + self.of(self.todo[-1])  # only the last shard is short

    def __getitem__(self, index: int) -> range:
        which, number = divmod(index, self.of(self.todo[0]))
        records = self.shards.range(self.todo[which])
        return records[number * self.size : (number + 1) * self.size]


def _make_encode(task: tasks.Task, dtype: str) -> Callable:
    """The jitted (frozen, batch) -> (arrays as they are stored, finite bool (B,))."""

    @jax.jit
    def encode(frozen, batch):
        found = task.encode(frozen, batch)
        kept = {k: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a for k, a in sorted(found.items())}
        finite = [jnp.isfinite(a.astype(jnp.float32)).all(tuple(range(1, a.ndim))) for a in kept.values()]
        return kept, jnp.stack(finite).all(0)

    return encode


def _write_shards(settings, source, task, frozen, mesh, options: Options, shards: _Shards, todo, say) -> None:
    batches = _Batches(shards, todo, options.batch_size)
    meter = data.CorruptMeter(settings.data.max_corrupt_rate)
    encode = _make_encode(task, options.dtype)
    iterator = data.make_record_iterator(settings.data, source, batches, task.host, everything=True)
    begun = time.monotonic()

    def start(host):
        # Filled up with zeros, which are black pictures and words without weight: one compiled shape.
        whole = {}
        for name, array in sharding.device_arrays(host).items():
            whole[name] = np.zeros((options.batch_size, *array.shape[1:]), array.dtype)
            whole[name][: len(array)] = array
        on_mesh = sharding.global_batch(mesh, whole, range(options.batch_size), options.batch_size)
        return host, encode(frozen, on_mesh)

    def finish(host, found) -> Iterator[bytes]:
        kept, finite = jax.tree.map(np.asarray, found)
        for row, number in enumerate(map(int, host["record"])):
            if not finite[row]:
                raise ValueError(
                    f"what the encoders make of record {number} ({source.describe(number)}) is not finite in {options.dtype}: "
                    "use --dtype=bfloat16 or float32 with another --out"
                )
            arrays = {name: array[row] for name, array in kept.items()}
            arrays |= {name: arrays[name][: host[mask][row].sum()] for name, mask in task.ragged.items()}
            arrays |= {name: cached.of_text(host[name][row]) for name in _texts(host)}
            weight, problem = float(host["weight"][row]), str(host["problem"][row])
            yield cached.encode_record(cached.Record(number, weight, problem, arrays))

    def records_of(shard: int) -> Iterator[bytes]:
        pending = None  # one batch is on the device while the one before it is written
        for _ in range(batches.of(shard)):
            host = next(iterator)
            for line in meter.add(host):
                say(line)
            following = start(host)
            if pending is not None:
                yield from finish(*pending)
            pending = following
        yield from finish(*pending)

    try:
        for done, shard in enumerate(todo, start=1):
            data.write_arrayrecord(shards.path(shard), records_of(shard), compress=False)
            rate = meter.read / (time.monotonic() - begun)
            left = sum(len(shards.range(i)) for i in todo[done:]) / rate
            say(f"shard {shard + 1}/{shards.count}  {rate:.0f} records/s  {left / 60:.0f} min left")
    finally:
        iterator.close()


def _texts(batch: Mapping[str, np.ndarray]) -> list[str]:
    """The names of what a record has in words."""
    return sorted(name for name, array in batch.items() if array.dtype.hasobject)


def _survey(source, shards: _Shards, plan: Mapping[str, Any], task: tasks.Task) -> cached.Manifest:
    """The manifest of shards that are all written; reads every record once, so that a damaged one is found now.

    Raises:
      ValueError: a shard is missing or damaged.
    """
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
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it and run the same command again, which writes it anew (--out must be a "
                "directory that all processes see)"
            ) from error
        sizes.append((path.name, len(numbers), path.stat().st_size))
    if isinstance(source, data.MixtureSource):
        parts = tuple(zip(map(len, source.sources), source.weights, strict=True))
    else:
        parts = ((len(source), 1.0),)
    return cached.Manifest(plan, arrays, len(source), undecodable, parts, tuple(sizes))
