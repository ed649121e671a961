"""The end of `write` and of a compaction: arrays of all records, tombstones, and at last the manifest that names them."""

from __future__ import annotations

import dataclasses

import numpy as np

from lumos_jax.data import manifest as manifests
from lumos_jax.data import storage
from lumos_jax.preparation import files, record_files, tombstones, write_index


def publish(out: str, manifest: manifests.Manifest) -> manifests.Manifest:
    """Concatenates the arrays of the tasks, applies all requests for tombstones, and writes the manifest.

    There is no manifest meanwhile, so that no reader takes the arrays of one data set with the shards of another.
    """
    files.lock(out, wait=True)
    folder = record_files.directory(out, manifest.build, manifest.version)
    tasks = record_files.tasks(folder, manifest.records)
    if storage.exists(storage.join(out, manifests.MANIFEST)):
        storage.remove(storage.join(out, manifests.MANIFEST))
    sizes = (record_files.read_arrays(folder, task)["sizes"] for task in tasks)
    files.write_concatenated(storage.join(out, manifests.SIZES), sizes, np.uint16, (manifest.records, 2))
    if manifest.layout == "index":
        write_index.write_arrays(out, folder, tasks, manifest)
    else:
        files.remove_leftovers(storage.join(out, record_files.shard_directory(manifest.build, manifest.version)))
    manifest = dataclasses.replace(manifest, tombstones=tombstones.write_numbers(out, folder, tasks))
    manifests.write_manifest(out, manifest)
    return manifest
