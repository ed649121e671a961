"""Files on local disks and behind URLs: listed, read and written alike, with errors that name the path."""

import errno
import os
import time
import uuid

import pytest

from lumos_jax.data import storage

CONTENT = bytes(range(256)) * 40


@pytest.fixture(params=["local", "memory"])
def base(request, tmp_path, monkeypatch):
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path / "cache"))
    return str(tmp_path / "d") if request.param == "local" else f"memory://{uuid.uuid4().hex}/d"


def test_files_are_listed_read_and_written(base, tmp_path):
    for name in ("b.tar", "a.tar", ".hidden.tar", "notes.txt", "deep/c.tar"):
        folder, _, file = name.rpartition("/")
        storage.write_whole(storage.join(base, *filter(None, (folder, file))), CONTENT)
    with storage.replacing(storage.join(base, "a.tar")) as partial:  # another content in its place
        partial.write_bytes(CONTENT[:99])

    def names(path, *patterns):
        return [entry.path.removeprefix(base).lstrip("/") for entry in storage.list_files(path, *patterns)]

    assert names(base, "*.tar") == ["a.tar", "b.tar"]
    assert names(base, "**/*.tar", "*.txt") == ["a.tar", "b.tar", "deep/c.tar", "notes.txt"]
    assert names(f"{base}/[b-z].tar", "*.none") == ["b.tar"]
    assert names(f"{base}/notes.txt", "*.tar") == ["notes.txt"]
    one, other = storage.list_files(base, "*.tar")
    assert (one.size, other.size) == (99, len(CONTENT))
    assert storage.stat(one.path) == one

    assert storage.read(other.path) == CONTENT
    assert storage.read(other.path, 7, 20) == CONTENT[7:27]
    assert storage.read(other.path, len(CONTENT) - 5, 20) == CONTENT[-5:]
    assert storage.read(other.path, 9000) == CONTENT[9000:]
    ranges = [(other.path, 100 * i, 50) for i in range(90)] + [(f"{base}/none", 0, 5)]
    *parts, error = storage.read_many(ranges)
    assert parts == [CONTENT[100 * i : 100 * i + 50] for i in range(90)]
    assert (error.errno, error.filename) == (errno.ENOENT, f"{base}/none")
    with storage.open_read(other.path) as file:
        assert file.seek(-6, os.SEEK_END) == len(CONTENT) - 6
        assert file.read() == CONTENT[-6:]
        file.seek(3)
        assert file.read(9) == CONTENT[3:12]

    copy = storage.local_copy(other.path)
    assert storage.local_copy(other.path) == copy
    assert storage.read(copy) == CONTENT
    storage.remove(other.path)
    assert (storage.exists(other.path), storage.exists(one.path), storage.exists(base)) == (False, True, True)
    with pytest.raises(OSError, match=r"b\.tar") as raised:
        storage.read(other.path, 0, 5)
    assert raised.value.errno == errno.ENOENT


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = str(tmp_path / "a")
    storage.write_whole(path, b"old")
    with pytest.raises(FileNotFoundError), storage.replacing(path):
        pass  # nothing is written
    assert os.listdir(tmp_path) == ["a"]
    assert storage.read(path) == b"old"


def test_transient_errors_are_retried_until_the_deadline(tmp_path, monkeypatch):
    path, tries = tmp_path / "a", []
    path.write_bytes(b"x")
    opened = storage.open_regular

    def stale(name):
        tries.append(name)
        if len(tries) < 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
        return opened(name)

    monkeypatch.setattr(storage, "open_regular", stale)
    assert storage.read(str(path)) == b"x"
    assert len(tries) == 3
    monkeypatch.setattr(storage, "DEADLINE", 0.5)
    tries.clear()
    began = time.monotonic()
    monkeypatch.setattr(storage, "open_regular", lambda name: tries.clear() or stale(name))
    with pytest.raises(storage.fileio.RetriesExhausted, match="Stale file handle") as raised:
        storage.read(str(path))
    assert time.monotonic() - began < 2
    assert (raised.value.errno, raised.value.filename) == (errno.ESTALE, str(path))


def test_a_protocol_without_its_package_is_named():
    with pytest.raises((ImportError, ValueError), match=r"nonesuch"):
        storage.read("nonesuch://a/b")
