"""Checkpoints of a run: Orbax, asynchronous, atomic, restorable on any mesh.

A checkpoint is `checkpoints/<step>/` with `state` (arrays) and `meta` (JSON: settings, fingerprints, a digest of each array,
and what the loop remembers). Orbax writes under a temporary name and renames when all is on disk, so that a kill or a full disk
leaves the earlier checkpoints untouched; leftovers are removed at the next start. The digest detects damage that storage does
not report; a damaged checkpoint is moved aside, never used and never deleted.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from lumos_jax import config, fileio
from lumos_jax.checkpoints.checksums import checksums
from lumos_jax.weights.rules import flatten, unflatten

DIRECTORY = "checkpoints"
DAMAGED = "damaged"  # beside it: what could not be restored
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def quiet_logs() -> None:
    """Silence what Orbax and TensorStore log about failed writes: the error itself is raised, as CheckpointError."""
    shown = sys.excepthook

    def hook(kind, error, trace) -> None:
        if "Event loop is closed" not in str(error):  # TensorStore's writers, as the process ends
            shown(kind, error, trace)

    def has_news(record: logging.LogRecord) -> bool:
        if any(text in record.getMessage() for text in ("read_only=True", "read only=", "preemption sync point")):
            return False  # what the run reports itself, or expects
        if not record.exc_info or record.exc_info[2] is None:
            return True
        frames = traceback.extract_tb(record.exc_info[2])
        return "Event loop is closed" not in str(record.exc_info[1]) and not any("orbax" in f.filename for f in frames)

    sys.excepthook = hook
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).addFilter(has_news)


def _short(error: BaseException) -> str:
    """The first line of an error, which libraries continue with pages about where they were."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, why, and what is still good."""


class _Barrier:
    """Orbax's barrier among processes, for its background threads. One whose write failed comes to a later barrier, where it
    would wait for the others, and they for it, for twenty minutes: it raises that error there instead."""

    def __init__(self):
        self.error: BaseException | None = None

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        self.error = self.error or sys.exc_info()[1]
        if self.error is not None:
            raise self.error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class Checkpoints:
    """The checkpoints of one run directory. Methods that write raise CheckpointError if this or the previous write failed, as
    on a full disk; those that read, if there is nothing or something else to read."""

    def __init__(self, workdir: str | pathlib.Path, settings: config.Checkpoint | None = None):
        """Opens `workdir`/checkpoints: for writing by the rules in `settings`, or read-only when None."""
        self.directory = pathlib.Path(workdir).absolute() / DIRECTORY
        self._barrier = _Barrier()
        several = jax.process_count() > 1
        if settings is None:
            options = {"read_only": True, "create": False}
        else:
            every = [policies.EveryNSteps(settings.keep_every)] if settings.keep_every else []
            options = {
                "preservation_policy": policies.AnyPreservationPolicy([policies.LatestN(settings.keep), *every]),
                "cleanup_tmp_directories": True,
                "async_options": ocp.options.AsyncOptions(barrier_sync_fn=self._barrier) if several else None,
            }
        self._options = ocp.CheckpointManagerOptions(single_host_load_and_broadcast=several, **options)
        self._manager = self._open()
        # What was saved and is to be read back: step, a parameter, digest.
        self._unread: tuple[Any, Any, Any] = (None, None, None)

    def _open(self) -> ocp.CheckpointManager:
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.directory, options=self._options, item_handlers=handlers)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise self.failed(error) from error

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[pathlib.Path]:
        """Yields the checkpoint's directory."""
        path = self.directory / str(step)
        try:
            yield path
        except _UNREADABLE as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {_short(error)}") from error

    def steps(self) -> list[int]:
        """All complete checkpoints' steps, the newest first."""
        return sorted(
            map(int, self._manager.all_steps()), reverse=True
        )  # NumPy's int32 in other processes than the first

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return next(iter(self.steps()), None)

    def find(self, step: int | None = None) -> int:
        """That step, or the newest. Raises ValueError if there is no such checkpoint."""
        found = self.latest() if step is None else step
        if found is None or not (self.directory / str(found)).is_dir():
            wanted = "" if step is None else f" {step}"
            hint = "" if found is not None else "; of exported weights `lumos_jax.convert import` makes a run directory"
            raise ValueError(f"there is no checkpoint{wanted} in {self.directory}{hint}")
        return found

    # Writing.

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts writing; returns as soon as the arrays are copied off the devices."""
        meta = {**meta, "digest": checksums(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        with self._writing():
            self._probe()
            self._manager.save(step, args=items, force=True)
            self._manager.check_for_errors()
        name, leaf = min(flatten(state["params"]).items(), key=lambda item: item[1].size)
        self._unread = (step, unflatten({name: np.empty(leaf.shape, leaf.dtype)}), meta["digest"])

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            self._read_back()

    def check(self) -> bool:
        """Whether all that was saved is on disk."""
        with self._writing():
            self._manager.check_for_errors()
            if self._barrier.error is not None:
                raise RuntimeError(_short(self._barrier.error)) from self._barrier.error
            if self._manager.is_saving_in_progress():
                return False
            self._read_back()
        return True

    def _read_back(self) -> None:
        """Compares the meta and the smallest parameter on disk with what was saved last. Process 0 does.

        Raises ValueError if they are not there or not the same.
        """
        (step, smallest, expected), self._unread = self._unread, (None, None, None)
        if smallest is None or jax.process_index() > 0:
            return
        try:
            found = checksums({"params": self.restore_subtree(step, "params", smallest)})
            if self.meta(step)["digest"] != expected or any(expected[name] != value for name, value in found.items()):
                raise ValueError("it reads back otherwise than it was written")
        except _UNREADABLE as error:
            if jax.process_count() == 1:  # else the next start does
                self.set_aside([step])
            raise ValueError(f"step {step} cannot be read back: {_short(error)}") from error

    def _probe(self) -> None:
        """Writes a small file beside the checkpoints: where that fails, so would Orbax's threads, some only after minutes."""
        path = self.directory / f".probe.{jax.process_index()}"
        with open(path, "wb") as file:
            path.unlink()  # nothing is left of it, whatever comes
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())

    def reopen(self) -> None:
        """Opens the directory anew after a write that failed, as Orbax keeps some failures."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # reported before
            self._manager.close()
        with self._writing():
            self._manager = self._open()

    def close(self) -> None:
        """Waits for writes under way and releases threads."""
        self._manager.close()

    def failed(self, error: BaseException, what: str = "a checkpoint") -> CheckpointError:
        """The error to raise where `what` could not be written: why, what is left, and what to do."""
        good = []
        with contextlib.suppress(OSError):  # the storage that fails
            good = [int(path.name) for path in self.directory.iterdir() if path.name.isdecimal()]
        reason = fileio.permanent_reason(error) or _short(error)
        last = f"the last good checkpoint is {max(good)}" if good else "there is no earlier checkpoint"
        full = reason in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
        advice = "Free some space (or lower config.checkpoint.keep) and run" if full else "Run"
        return CheckpointError(
            f"writing {what} into {self.directory} failed ({reason}); {last}. {advice} the same command again"
        )

    # Reading.

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        with self._reading(step) as path:
            meta = ocp.JsonCheckpointHandler().restore(path / "meta")
            return {"settings": meta["settings"], "fingerprints": meta["fingerprints"], **meta}

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The arrays, laid out as `abstract` (ShapeDtypeStructs with shardings) says, whatever mesh wrote them.

        Of several processes each reads its devices' parts and none waits for others, so that one may fail alone.
        """
        with self._reading(step) as path:
            return ocp.StandardCheckpointHandler().restore(path / "state", args=ocp.args.StandardRestore(abstract))

    def shapes(self, step: int, name: str) -> Any:
        """ShapeDtypeStructs of one entry of the state ("ema" or "params"), as the checkpoint holds it; empty if it has none."""
        tree = self._manager.item_metadata(step)["state"].tree.get(name, {})
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

    def restore_subtree(self, step: int, name: str, abstract: Any) -> Any:
        """One entry of the state ("ema" or "params") without reading the others, laid out as `abstract` says."""
        item = {name: abstract}
        how = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        return ocp.PyTreeCheckpointHandler().restore(self.directory / str(step) / "state", args=args)[name]

    def verify(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Raises CheckpointError unless what was restored is what was saved, by the digest in `meta`, if it has one."""
        expected = meta.get("digest") or {}  # none of a version that kept none
        found = checksums(state) if expected else {}
        wrong = [name for name in expected if found.get(name) != expected[name]]
        if wrong:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} is damaged: {len(wrong)} of {len(expected)} arrays are not what was "
                f"written, {wrong[0]} among them"
            )

    def set_aside(self, steps: list[int]) -> pathlib.Path:
        """Moves checkpoints to `damaged/`, beside the good ones; process 0 does, and all must call. Returns that directory."""
        aside = self.directory.with_name(DAMAGED)
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            for step in steps:
                names = (aside / f"{step}{f'.{n}' * (n > 0)}" for n in itertools.count())
                (self.directory / str(step)).rename(next(path for path in names if not path.exists()))
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()
        return aside
