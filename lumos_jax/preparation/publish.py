"""The end of `write` and of a compaction: arrays of all records, tombstones, and at last the manifest that names them."""

from __future__ import annotations

import dataclasses

import numpy as np

from lumos_jax.data import manifest as manifests
from lumos_jax.data import storage
from lumos_jax.preparation import indexed, layout, tombstones


def publish(out: str, manifest: manifests.Manifest) -> manifests.Manifest:
    """Joins the arrays that the tasks left, gives tombstones to what was taken out before, and writes the manifest.

    Meanwhile there is no manifest, so that nobody reads the arrays of one data set with the shards of another.
    """
    folder = layout.directory(out, manifest.build, manifest.version)
    tasks = layout.count_tasks(folder)
    if storage.exists(storage.join(out, manifests.MANIFEST)):
        storage.remove(storage.join(out, manifests.MANIFEST))
    sizes = (layout.read_arrays(folder, task)["sizes"] for task in range(tasks))
    layout.write_array(storage.join(out, manifests.SIZES), sizes, np.uint16, (manifest.records, 2))
    if manifest.layout == "index":
        indexed.write_arrays(out, folder, tasks, manifest)
    else:
        layout.remove_leftovers(storage.join(out, layout.shard_directory(manifest.build, manifest.version)))
    manifest = dataclasses.replace(manifest, tombstones=tombstones.write_numbers(out, folder))
    manifests.write_manifest(out, manifest)
    return manifest
