"""Retries, files written whole, names of directories, and the lock of a run's directory."""

import errno
import json
import os
import subprocess
import sys

import jax
import pytest

from lumos_jax import fileio


def test_transient_errors_are_retried_and_others_are_not(monkeypatch):
    waited = []
    monkeypatch.setattr(fileio.time, "sleep", waited.append)
    errors = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]

    def read():
        if errors:
            raise errors.pop()
        return 7

    assert fileio.with_retries(read) == 7
    assert waited == [1.0, 2.0]
    with pytest.raises(FileNotFoundError):
        fileio.with_retries(lambda: os.stat("/nowhere"))
    assert waited == [1.0, 2.0]
    assert fileio.permanent_reason(OSError(errno.ENOSPC, "No space left on device"))
    assert fileio.permanent_reason(ValueError(json.dumps({"error": "No space left on device"})))
    assert not fileio.permanent_reason(ValueError("connection reset"))
    assert not fileio.permanent_reason(jax.errors.JaxRuntimeError("gone"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    fileio.write_whole(path, "old")

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        fileio.write_whole(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    fileio.write_whole(path, b"new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "name", ["runs/[exp]", "a[b", "a*", "a?b", "a\\b", "gs://bucket/run", "s3:/bucket", "file:///x", "gs:", "a:/b", "", "a\nb"]
)  # fmt: skip
def test_patterns_and_urls_are_no_directories(name):
    with pytest.raises(ValueError, match="must be a"):
        fileio.local_directory("--workdir", name)


@pytest.mark.parametrize("name", ["runs/exp 1", "100%", "a#b,c=d;e", "ünï", "a:b", "{a}", "..x"])
def test_other_names_are(name, tmp_path):
    assert fileio.local_directory("--workdir", str(tmp_path / name)) == tmp_path / name


HOLD = """
import pathlib, sys
from lumos_jax import fileio
try:
    fileio.lock(pathlib.Path(sys.argv[1]))
except ValueError as error:
    sys.exit(str(error))
print("locked", flush=True)
sys.stdin.read()
"""


def test_one_process_holds_a_lock_until_it_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]

    def hold():
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    first = hold()
    assert first.stdout.readline() == "locked\n"
    second = hold()
    _, problem = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"in use by another run (process {first.pid} on " in problem
    first.kill()
    first.communicate()
    third = hold()
    assert third.stdout.readline() == "locked\n"
    third.communicate()
    assert third.returncode == 0


def test_a_lock_of_another_machine_is_waited_for(tmp_path, monkeypatch):
    """A file server frees the lock of a lost machine only after a while, and launchers do not retry code 2."""
    path, waited = tmp_path / "lock", []
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    path.write_text("process 7 on elsewhere\n")

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            holder.kill()
            holder.communicate()

    monkeypatch.setattr(fileio.time, "sleep", sleep)
    fileio.lock(path)
    assert len(waited) == 3
    assert path.read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, OSError), (errno.EDQUOT, OSError), (errno.EIO, OSError), (errno.ESTALE, OSError), (errno.EMFILE, OSError),
     (errno.EACCES, ValueError), (errno.EROFS, ValueError), (errno.ENOTDIR, ValueError), (errno.ENOENT, ValueError)],
)  # fmt: skip
def test_full_or_failing_storage_is_no_mistake_of_the_user(number, kind):
    made = fileio.failure(OSError(number, os.strerror(number)), "--workdir=runs cannot be used")
    assert type(made) is kind
    assert str(made) == "--workdir=runs cannot be used"
