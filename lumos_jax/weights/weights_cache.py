"""Converted weights kept for the next start: what a config names directly is converted once for each state of its files.

An entry is a directory as `frozen_files` writes it, named by a hash of the source (resolved path, sizes and times of its files;
a hub's snapshots have their revision in the path) and of the code that converts. It appears whole or not at all, so that
processes need not know of each other; its content is hashed as it is read, as any network's is, and a damaged one is made
again. Only PyTorch's files and .npz are kept: for safetensors a second copy saves too little (docs/weights.md).

The directory is ~/.cache/lumos_jax/weights, or what the environment variable LUMOS_JAX_WEIGHTS_CACHE says; empty, nothing is
kept. It may be removed at any time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lumos_jax.weights import files, frozen_files
from lumos_jax.weights import rules as name_rules
from lumos_jax.weights.placement import Take

VARIABLE, DEFAULT = "LUMOS_JAX_WEIGHTS_CACHE", "~/.cache/lumos_jax/weights"
_ABANDONED = 24 * 3600  # seconds after which a half-written entry has nobody who writes it

_log = logging.getLogger(__name__)
_said: set[str] = set()  # cache directories that cannot be written, each told once


def load(
    path: pathlib.Path, kind: str, network_class: Callable, convert: Callable, take: Take | None, key: Any = None
) -> tuple[Any, dict[str, Any]]:
    """(network, {path: what `take` kept}) of weights in anyone's form: our own directory, a kept conversion, or converted now.

    Args:
      path: as `files.locate` gives it.
      kind: as of frozen_files.Frozen.
      network_class: makes the network of its fields.
      convert: take -> (network, {path: what was kept}, account).
      take: takes every array as it is read; None keeps the arrays.
      key: what else decides the conversion.

    Raises:
      ValueError: as `convert` and `frozen_files.load`. Never because of the cache.
    """
    take = Take() if take is None else take
    own = frozen_files.load(path, kind, network_class, take)
    if own is not None:
        return own
    entry = _entry(path, [kind, key])
    found = None if entry is None else _read(entry, kind, network_class, take)
    if found is not None:
        return found
    keep = None if entry is None else _Keep(entry, take)
    try:
        network, flat, account = convert(take if keep is None else keep)
        if keep is not None:
            keep.finish(kind, network, str(path))
    finally:
        if keep is not None:
            keep.clean()
    _log.info("%s\n%s", path, account.table())
    return network, flat


def _entry(path: pathlib.Path, key: list) -> pathlib.Path | None:
    """Where the conversion of `path` is kept; None if it is not."""
    directory = os.environ.get(VARIABLE, DEFAULT)
    if not directory or not files.is_slow(path):
        return None
    path = path.resolve()
    parts = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    stats = [(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    told = json.dumps([str(path), stats, key, _code()])
    name = hashlib.blake2b(told.encode(), digest_size=12).hexdigest()
    return pathlib.Path(directory).expanduser() / f"{path.name[:40]}-{name}"


@functools.cache
def _code() -> str:
    """A hash of the modules that convert: other rules, other entries."""
    digest = hashlib.blake2b(digest_size=8)
    for module in (pathlib.Path(name_rules.__file__), *sorted(pathlib.Path(__file__).parent.glob("*.py"))):
        digest.update(module.read_bytes())
    return digest.hexdigest()


def _read(entry: pathlib.Path, kind: str, network_class: Callable, take: Take) -> tuple[Any, dict[str, Any]] | None:
    if not entry.exists():
        return None
    try:
        found = frozen_files.load(entry, kind, network_class, take)
        told = None if found is None else json.loads((entry / frozen_files.DESCRIPTION).read_text())["content"]
        if told != take.total():
            raise ValueError("its content is not what was written")
    except (ValueError, LookupError, TypeError, OSError) as error:
        _log.warning("%s, kept from an earlier start, is damaged (%s): converting again", entry, error)
        take.reset()
        _remove(entry)
        return None
    _log.info("taken from %s", entry)
    return found


def _remove(entry: pathlib.Path) -> None:
    """Out of the way at once, then gone; readers have their files open."""
    aside = entry.with_name(f".{entry.name}.{os.getpid()}.damaged")
    try:
        entry.rename(aside)
    except OSError as error:
        _tell(entry.parent, error)
    shutil.rmtree(aside, ignore_errors=True)


def _tell(directory: pathlib.Path, error: Exception) -> None:
    if str(directory) not in _said:
        _said.add(str(directory))
        _log.warning(
            "converted weights cannot be kept in %s (%s), so every start converts them; set %s to another directory, or to "
            "nothing to keep none", directory, error, VARIABLE,
        )  # fmt: skip


class _Keep(Take):
    """A Take that also writes what it takes, until it cannot."""

    def __init__(self, entry: pathlib.Path, take: Take):
        self._entry, self._take, self._partial, self._writer = entry, take, None, None
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            for left in entry.parent.glob(".*.partial"):
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(left, ignore_errors=True)
            made = tempfile.mkdtemp(prefix=f".{entry.name}.", suffix=".partial", dir=entry.parent)
            self._partial = pathlib.Path(made)
            self._writer = files.Writer(self._partial / frozen_files.WEIGHTS)
        except OSError as error:
            self._give_up(error)

    def __call__(self, path: str, array: np.ndarray) -> Any:
        if self._writer is not None:
            try:
                self._writer.add(path, array)
            except OSError as error:
                self._give_up(error)
        return self._take(path, array)

    def finish(self, kind: str, network: Any, origin: str) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
            frozen_files.describe(self._partial, kind, network, origin, content=self._take.total())
            self._partial.rename(self._entry)
        except OSError as error:
            if not self._entry.exists():  # else another process was first, and its entry is as good
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _tell(self._entry.parent, error)
        self.clean()

    def clean(self) -> None:
        """Leaves nothing half-written."""
        if self._writer is not None:
            self._writer.abandon()
        self._writer = None
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
