"""Object stores over their real protocols: the records of a local copy, in its order, through latency and refusals."""

import io
import pathlib
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from lumos_jax import config, data
from lumos_jax.data import remote, storage
from tests import servers

pytestmark = [  # of the protocols' libraries, whose connections live as long as the process
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def png(level):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(level).integers(0, 255, (24, 24, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The same 24 captioned images in three forms."""
    root = tmp_path_factory.mktemp("shards")
    for form in ("arrayrecord", "webdataset", "folder"):
        (root / form).mkdir()
    for shard in range(3):
        numbers = range(8 * shard, 8 * shard + 8)
        data.write_arrayrecord(root / f"arrayrecord/a-{shard}-of-3.arrayrecord", map(png, numbers), compress=shard > 0)
        with tarfile.open(root / f"webdataset/{shard:05}.tar", "w") as tar:
            for i in numbers:
                for name, content in ((f"{i:03}.png", png(i)), (f"{i:03}.txt", f"number {i}".encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                    (root / "folder" / name).write_bytes(content)
    return root


def epoch(path, form):
    captioned = form != "arrayrecord"
    settings = config.Data(
        source=form, path=str(path), image_size=16, seed=5, sample_type="captioned" if captioned else "image"
    )
    source = data.make_source(settings)
    records = np.random.default_rng(0).permutation(24).reshape(3, 8).tolist()
    return source, list(data.make_record_iterator(settings, source, records))


def use(kind, port, monkeypatch):
    """URLs of that kind are at that port."""
    for name, value in servers.environment(kind, port).items():
        monkeypatch.setenv(name, value)
    remote._made.cache_clear()


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_store_that_refuses_some_requests_gives_what_the_disk_gives(kind, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path))
    with servers.store(kind, "pictures") as port, servers.proxy(port, latency=0.005, failures=0.05) as proxy:
        use(kind, port, monkeypatch)
        for file in filter(pathlib.Path.is_file, shards.rglob("*")):
            storage.write_whole(f"{kind}://pictures/{file.relative_to(shards)}", file.read_bytes())
        use(kind, proxy, monkeypatch)
        for form in ("arrayrecord", "webdataset", "folder"):
            source, found = epoch(f"{kind}://pictures/{form}", form)
            local, expected = epoch(shards / form, form)
            assert source.fingerprint() == local.fingerprint()
            for one, other in zip(found, expected, strict=True):
                assert not "".join(one["problem"])
                for name in other.keys() - {"problem"}:
                    assert np.array_equal(one[name], other[name])
        counted = servers.counts(proxy)
        assert counted["refused"] > 3
        assert storage.exists(f"{kind}://pictures/folder/000.png")
        assert not storage.exists(f"{kind}://pictures/folder/none.png")
        with storage.open_read(f"{kind}://pictures/webdataset/00001.tar") as file, tarfile.open(fileobj=file) as tar:
            assert tar.getnames()[:2] == ["008.png", "008.txt"]
        assert pathlib.Path(storage.local_copy(f"{kind}://pictures/folder/007.png")).read_bytes() == png(7)
        storage.remove(f"{kind}://pictures/arrayrecord/a-1-of-3.arrayrecord")
        with pytest.raises(ValueError, match=rf"1 of 3 shards are missing, as {kind}://pictures/arrayrecord/a-1-of-3"):
            epoch(f"{kind}://pictures/arrayrecord", "arrayrecord")


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_store_that_is_not_there_is_named_at_the_deadline(kind, monkeypatch):
    use(kind, servers.free_port(), monkeypatch)
    monkeypatch.setattr(storage, "DEADLINE", 1.0)
    began = time.monotonic()
    for form in ("arrayrecord", "webdataset", "folder"):
        with pytest.raises(OSError, match=f"config.data.path='{kind}://pictures/none' cannot be listed"):
            epoch(f"{kind}://pictures/none", form)
    assert time.monotonic() - began < 15
