"""Checkpoints of a run: Orbax, asynchronous, atomic, restorable on any mesh.

A checkpoint is `checkpoints/<step>/` with `state` (arrays) and `meta` (JSON: settings, fingerprints and the little that the
loop itself remembers). Orbax writes under a temporary name and renames when all is on disk, so that a kill or a full disk
leaves the ones before it untouched; temporary leftovers are removed at the next start. `meta` holds a digest of the arrays
too, by which damage is found that storage does not report; a damaged checkpoint is set aside, never used and never deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import pathlib
import sys
import traceback
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from lumos_jax import config
from lumos_jax.checkpoints.digest import digest
from lumos_jax.cluster import peers

DIRECTORY = "checkpoints"
DAMAGED = "damaged"  # beside it: what could not be restored
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


class _TracebackFilter(logging.Filter):
    """Drops the tracebacks of Orbax's threads and tasks: the error itself is raised, as CheckpointError, and told once."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or record.exc_info[2] is None:
            return True
        if "Event loop is closed" in str(record.exc_info[1]):  # its writers, told of the end after it
            return False
        return not any("orbax" in frame.filename for frame in traceback.extract_tb(record.exc_info[2]))


def _not_about_reading(record: logging.LogRecord) -> bool:
    """Drops Orbax's warnings that a manager opened to read only reads."""
    return "read_only=True" not in record.getMessage() and "read only=" not in record.getMessage()


def _not_of_writers(kind, error, trace, shown=sys.excepthook) -> None:
    """Drops what TensorStore's writers print when they are told of the end after it, which no log goes through."""
    if "Event loop is closed" not in str(error):
        shown(kind, error, trace)


sys.excepthook = _not_of_writers
logging.getLogger("absl").addFilter(_not_about_reading)
for _name in ("absl", "asyncio", "concurrent.futures"):
    logging.getLogger(_name).addFilter(_TracebackFilter())


def _short(error: BaseException) -> str:
    """The first line of an error, which libraries continue with pages about where they were."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, why, and what is still good."""


class _Elsewhere(RuntimeError):
    """Another process could not write its part."""


class _Meeting:
    """Orbax's barriers among several processes' background threads, each in the order of its own writing.

    A thread whose write failed goes on to a later barrier than the others are at, where it would wait for them, and they for
    it, for twenty minutes. Here all learn at once that they are not at the same one, and the write ends as failed in all.
    """

    def __init__(self, number: int):
        """`number`: the same in all processes, and another one for each manager."""
        self.number, self.count, self.broken = number, 0, False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        if not self.broken:
            self.count += 1
            self.broken = not peers.barrier(f"checkpoints {self.number}, {self.count}", key, timeout_ms / 1000)
        if self.broken:
            raise _Elsewhere("another process could not write its part; see its log")


_numbers = itertools.count()


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, workdir: str | pathlib.Path, settings: config.Checkpoint | None = None):
        """Opens `workdir`/checkpoints: for writing by the rules in `settings`, or read-only when None."""
        self.directory = pathlib.Path(workdir).absolute() / DIRECTORY
        common = dict(single_host_load_and_broadcast=jax.process_count() > 1)
        if settings is None:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, **common)
        else:
            keep = [policies.LatestN(settings.keep)]
            if settings.keep_every:
                keep.append(policies.EveryNSteps(settings.keep_every))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True, **common
            )
        self._options = options
        self._meeting: _Meeting | None = None
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = self._options
        if peers.several() and not options.read_only:
            self._meeting = _Meeting(next(_numbers))
            options = dataclasses.replace(
                options, async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._meeting)
            )
        return ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return next(iter(self.steps()), None)

    def steps(self) -> list[int]:
        """All complete checkpoints' steps, the newest first."""
        return sorted(
            map(int, self._manager.all_steps()), reverse=True
        )  # NumPy's int32 where process 0 told the others

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts writing; returns as soon as the arrays are copied off the devices.

        Raises:
          CheckpointError: this or the previous write failed (a full disk, say).
        """
        meta = {**meta, "digest": digest(state)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
                force=True,
            )
            self._manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:
            raise self.failed(error) from error

    def wait(self) -> None:
        """Returns when all that was saved is on disk. Raises CheckpointError as `save` does."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:
            raise self.failed(error) from error

    def check(self) -> bool:
        """Whether all that was saved is on disk. Raises CheckpointError if a write under way has failed."""
        if self._meeting is not None and self._meeting.broken:
            self.wait()
        try:
            self._manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:
            raise self.failed(error) from error
        return not self._manager.is_saving_in_progress()

    def probe(self) -> None:
        """Raises CheckpointError unless a file can be written beside the checkpoints."""
        path = self.directory / f".probe.{jax.process_index()}"
        try:
            with open(path, "wb") as file:
                path.unlink()  # nothing is left of it, whatever comes
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self.failed(error) from error

    def forget_failure(self) -> None:
        """After a write that failed: opens the directory anew, as Orbax keeps some failures. Raises as `save`."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # told before
            self._manager.close()
        try:
            self._manager = self._open()
        except OSError as error:
            raise self.failed(error) from error

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint. Raises CheckpointError if it cannot be read."""
        try:
            meta = ocp.JsonCheckpointHandler().restore(self.directory / str(step) / "meta")
            return {"settings": meta["settings"], "fingerprints": meta["fingerprints"], **meta}
        except _UNREADABLE as error:
            raise CheckpointError(f"checkpoint {self.directory / str(step)} cannot be read: {_short(error)}") from error

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The arrays, laid out as `abstract` (ShapeDtypeStructs with shardings) says, whatever mesh wrote them.

        Of several processes each reads its devices' parts and none waits for others, so that one may fail alone.

        Raises:
          CheckpointError: the checkpoint does not hold these arrays, or cannot be read.
        """
        try:
            where = self.directory / str(step) / "state"
            return ocp.StandardCheckpointHandler().restore(where, args=ocp.args.StandardRestore(abstract))
        except _UNREADABLE as error:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be restored: {_short(error)}"
            ) from error

    def verify(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Raises CheckpointError unless what was restored is what was saved, by the digest in `meta`, if it has one."""
        expected = meta.get("digest")
        if expected is None:  # of a version that kept none
            return
        found = digest(state)
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
                free = next(
                    name for n in itertools.count() if not (name := aside / f"{step}{f'.{n}' * (n > 0)}").exists()
                )
                (self.directory / str(step)).rename(free)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()
        return aside

    def shapes(self, step: int, name: str) -> Any:
        """ShapeDtypeStructs of one entry of the state ("ema" or "params"), as the checkpoint holds it; empty if it has none."""
        tree = self._manager.item_metadata(step)["state"].tree.get(name, {})
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

    def restore_subtree(self, step: int, name: str, abstract: Any) -> Any:
        """One entry of the state ("ema" or "params") without reading the others, laid out as `abstract` says."""
        handler = ocp.PyTreeCheckpointHandler()
        args = ocp.args.PyTreeRestore(
            item={name: abstract},
            restore_args=ocp.checkpoint_utils.construct_restore_args({name: abstract}),
            partial_restore=True,
        )
        return handler.restore(self.directory / str(step) / "state", args=args)[name]

    def close(self) -> None:
        """Waits for writes under way and releases threads."""
        self._manager.close()

    def failed(self, error: BaseException, what: str = "a checkpoint") -> CheckpointError:
        """The error to raise where `what` could not be written: why, what is left, and what to do."""
        while isinstance(error, _Elsewhere) and error.__context__ is not None:
            error = error.__context__  # why this process came late to the meeting
        try:
            good = [int(path.name) for path in self.directory.iterdir() if path.name.isdecimal()]
        except OSError:  # the storage that fails
            good = []
        last = f"the last good checkpoint is {max(good)}" if good else "there is no earlier checkpoint"
        return CheckpointError(
            f"writing {what} into {self.directory} failed ({error}); {last}. "
            "Free some space (or lower config.checkpoint.keep) and run the same command again"
        )
