"""Near-duplicates by features: k-means, then cosine within clusters (SemDeDup, Abbas et al. 2023, arXiv:2303.09540).

Features are the [CLS] tokens that `prepare cache` stores of a prepared data set, whose table of records says by sha256 which
row of the scan each belongs to. Rows without a feature are left as they are. Of two rows in one cluster whose features have a
cosine of config.duplicates.min_cosine or more, the worse is dropped, by the rule of duplicates.py.

Clusters are about sqrt(2 N) records large, where finding the nearest centroid and comparing within clusters cost the same:
2 N^1.5 C multiplications in all, 16 core-hours at 100 GFLOP/s for 190M features of 768. Scratch files: 2 C bytes a record.
Duplicates in different clusters are missed. Sums of floats depend on the linear algebra of the machine, by their last bits.
"""

from __future__ import annotations

import pathlib

import numpy as np

from lumos_jax.data import manifest as manifests
from lumos_jax.data.sources import cached
from lumos_jax.preparation import (
    criteria,
    decontamination,
    engines,
    files,
    record_files,
    select_steps,
    write_arrayrecord,
)
from lumos_jax.preparation.settings import Duplicates

_SAMPLE, _ROUNDS = 64, 10  # records a centroid to fit them, and how often they are moved
_ROWS = 2048  # features that are compared with others at a time
_MATCH = np.dtype([("rank", "<u8"), ("score", "<u4"), ("id", "<u4"), ("known", "?")])
_ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("rank", "<u8"), ("score", "<u4"), ("id", "<u4")])
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("record", "<u8")])


def drop(job: select_steps.Job, run: engines.Run) -> int:
    """Drops rows whose features are close to those of a better one. Returns how many.
    Raises ValueError: the cache is not of that data set, or holds other features than one token an image."""
    settings = job.settings.duplicates
    cache, manifest = cached.read_manifest(settings.embeddings), manifests.read_manifest(settings.embeddings_set)
    if cache.records != manifest.records:
        raise ValueError(
            f"config.duplicates.embeddings={settings.embeddings} has {cache.records:,} records, and embeddings_set="
            f"{settings.embeddings_set} {manifest.records:,}: give the data set that the cache was made of"
        )
    _, shape = cache.arrays.get("feature", ("", ()))
    if len(shape) != 2 or shape[0] != 1:
        raise ValueError(
            f"config.duplicates.embeddings={settings.embeddings} holds features of shape {shape}: cache one token an image, "
            "as with config.encoder.output=cls"
        )
    matched = _match(job, manifest, run)
    if not matched["known"].any():
        raise ValueError(
            f"no record of config.duplicates.embeddings_set={settings.embeddings_set} is among the rows here"
        )
    np.save(job.file("centroids.npy"), _centroids(job, cache, matched))
    shards = range(len(cache.shards))
    run(_spread, [(job, cache, shard) for shard in shards])
    clusters = len(np.load(job.file("centroids.npy"), mmap_mode="r"))
    pairs = np.concatenate(run(_compare, [(job, cluster, len(shards)) for cluster in range(clusters)]))
    records, ends = np.unique(pairs, return_inverse=True)
    found = np.array(matched[records])
    rows, kept = select_steps.worse_of_pairs(found, ends.reshape(-1, 2))
    job.drop(found["id"][rows], found["id"][kept], criteria.SEMANTIC, select_steps.UNKNOWN)
    return len(rows)


def identity(settings: Duplicates) -> list[str]:
    """What tells the data set and the cache of its features from others."""
    return [manifests.read_manifest(settings.embeddings_set).digest(), repr(cached.read_manifest(settings.embeddings))]


def _match(job: select_steps.Job, manifest: manifests.Manifest, run: engines.Run) -> np.ndarray:
    """_MATCH (records of the cache,) on disk: the row that is the record, by sha256, if it is there and kept so far."""
    folder = record_files.directory(job.settings.duplicates.embeddings_set, manifest.build, manifest.version)
    tasks = record_files.tasks(folder, manifest.records)
    files.new_array(job.file("matched.npy"), _MATCH, manifest.records)
    run(_spread_rows, [(job, chunk) for chunk in range(len(job.chunks))])
    run(_spread_records, [(job, folder, task) for task in tasks])
    run(_join, [(job, partition, len(tasks)) for partition in range(1 << job.bits)])
    return np.load(job.file("matched.npy"), mmap_mode="r")


def _spread_rows(job: select_steps.Job, chunk: int) -> None:
    rows = np.load(job.file(f"rows-{chunk:06d}.npy"), mmap_mode="r")
    rows = rows[job.array("reasons")[rows["id"]] == 0]
    _save_by(job, rows[list(_ROW.names)].astype(_ROW), f"match-{chunk:06d}")


def _spread_records(job: select_steps.Job, folder: str, task: int) -> None:
    table = record_files.read_records(folder, task, ("record", "sha256"))
    records = np.zeros(len(table), _RECORD)
    records["record"] = table["record"].to_numpy()
    records["high"], records["low"] = decontamination.leading(decontamination.sha256_of(table)).T
    _save_by(job, records, f"records-{task:06d}")


def _save_by(job: select_steps.Job, rows: np.ndarray, name: str) -> None:
    """Saves rows by partitions of the values of `high`."""
    job.save_parts(name, rows, rows["high"] >> np.uint64(64 - job.bits), 1 << job.bits)


def _join(job: select_steps.Job, partition: int, tasks: int) -> None:
    rows = job.part("match", partition, len(job.chunks))
    rows = rows[np.argsort(rows["high"], kind="stable")]
    records = job.part("records", partition, tasks)
    place = np.minimum(np.searchsorted(rows["high"], records["high"]), len(rows) - 1)
    if len(rows) and len(records):
        found = rows[place]
        same = (found["high"] == records["high"]) & (found["low"] == records["low"])
        matches = np.zeros(int(same.sum()), _MATCH)
        for name in ("rank", "score", "id"):
            matches[name] = found[name][same]
        matches["known"] = True
        np.load(job.file("matched.npy"), mmap_mode="r+")[records["record"][same]] = matches


def _features(job: select_steps.Job, cache: cached.Manifest, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """(numbers (n,), features (n, C) float32 of length 1) of the records of a shard that could be encoded."""
    path = pathlib.Path(job.settings.duplicates.embeddings).expanduser() / cache.shards[shard][0]
    records = [record for record in cached.read_shard(path) if record.weight]
    if not records:
        return np.zeros(0, np.int64), np.zeros((0, cache.arrays["feature"][1][1]), np.float32)
    features = np.stack([record.arrays["feature"][0].astype(np.float32) for record in records])
    return np.array([record.number for record in records]), _unit(features)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _centroids(job: select_steps.Job, cache: cached.Manifest, matched: np.ndarray) -> np.ndarray:
    """(K, C) float32 of length 1: spherical k-means over a sample."""
    known = np.flatnonzero(matched["known"])
    count = max(1, round((len(known) / 2) ** 0.5))
    chosen = np.sort(known[write_arrayrecord.shuffled(len(known), "k-means")[: count * _SAMPLE]])
    sample, first = [], 0
    for shard, (_, records, _) in enumerate(cache.shards):
        here = chosen[(chosen >= first) & (chosen < first + records)]
        if len(here):
            numbers, features = _features(job, cache, shard)
            sample.append(features[np.isin(numbers, here)].astype(np.float16))
        first += records
    points = np.concatenate(sample)
    centroids = points[write_arrayrecord.shuffled(len(points), "centroids")[:count]].astype(np.float32)
    for _ in range(_ROUNDS):
        nearest = _nearest(points, centroids)
        order = np.argsort(nearest, kind="stable")
        used, begins = np.unique(nearest[order], return_index=True)
        for cluster, members in zip(used, np.split(order, begins[1:]), strict=True):
            centroids[cluster] = _unit(points[members].sum(0, dtype=np.float32))
    return centroids


def _nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    blocks = range(0, len(points), _ROWS)
    return np.concatenate([(points[i : i + _ROWS].astype(np.float32) @ centroids.T).argmax(1) for i in blocks])


def _spread(job: select_steps.Job, cache: cached.Manifest, shard: int) -> None:
    """Saves the features of a shard by cluster, of records that are known rows."""
    centroids = np.load(job.file("centroids.npy"))
    numbers, features = _features(job, cache, shard)
    known = np.load(job.file("matched.npy"), mmap_mode="r")["known"][numbers]
    numbers, features = numbers[known], features[known]
    nearest = _nearest(features, centroids) if len(numbers) else numbers
    job.save_parts(f"features-{shard:06d}", features.astype(np.float16), nearest, len(centroids))
    job.save_parts(f"numbers-{shard:06d}", numbers, nearest, len(centroids))


def _compare(job: select_steps.Job, cluster: int, shards: int) -> np.ndarray:
    """Pairs (P, 2) of records of a cluster that are close."""
    numbers = job.part("numbers", cluster, shards)
    features = _unit(job.part("features", cluster, shards).astype(np.float32))
    found = [np.zeros((0, 2), np.int64)]
    for first in range(0, len(numbers), _ROWS):
        cosine = features[first : first + _ROWS] @ features[first:].T
        left, right = np.nonzero(np.triu(cosine >= job.settings.duplicates.min_cosine, 1))
        found.append(np.stack([numbers[first + left], numbers[first + right]], 1))
    return np.concatenate(found)
