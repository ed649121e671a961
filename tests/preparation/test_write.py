"""Prepared data sets from the embedded scenes, in both layouts: what is written, after kills too, verification, tombstones."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import tarfile

import numpy as np
import pytest
from PIL import Image

from lumos_jax.data import CorruptRecord
from lumos_jax.data import manifest as manifests
from lumos_jax.data.sources.prepared import PreparedSource
from lumos_jax.preparation import (
    compact,
    plan,
    record_files,
    report,
    scan,
    scan_rows,
    select,
    selection,
    tombstones,
    verify,
    write,
    write_arrayrecord,
)
from lumos_jax.preparation.settings import Criteria, Prepare, Source, Write
from tests.fields import replace
from tests.preparation.scans import silent
from tests.running import finish, start

COMPACTED, INDEXED = Write(shard_bytes=30_000, group_inputs=2), Write(layout="index")


def tar_of_images(path: pathlib.Path, rng: np.random.Generator, count: int) -> None:
    """Images (40, 48) with captions; every fifth is a copy of the one before."""
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            if number % 5 != 4:
                shades = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
                file = io.BytesIO()
                shades.resize((48, 40), Image.Resampling.BICUBIC).save(file, "JPEG")
            key = f"{path.stem}-{number:04d}"
            fields = json.dumps({"url": f"https://example.org/{key}"}).encode()
            for ending, data in (("jpg", file.getvalue()), ("txt", f"caption {key}".encode()), ("json", fields)):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def scanned(tmp_path_factory) -> pathlib.Path:
    root, rng = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    for number in range(3):
        tar_of_images(root / f"{number:05d}.tar", rng, 60)
    source = Source(kind="tars", path=str(root))
    settings = Prepare(sources=(source,), criteria=Criteria(short_side=16), task_bytes=1)
    made = plan.make(str(root / "out"), settings, silent)
    for number in scan.tasks(made):
        scan.run_task(str(root / "out"), number)
    select.run(str(root / "out"), settings, say=silent)
    return root / "out"


@pytest.fixture
def out(scanned, tmp_path) -> str:
    """A copy of the selected scan; inputs stay where they are."""
    shutil.copytree(scanned, tmp_path / "out")
    return str(tmp_path / "out")


def begun(out: str, settings: Write) -> list[int]:
    return write.tasks(out, dataclasses.replace(plan.read(out).settings, write=settings))


def written(out: str, settings: Write) -> manifests.Manifest:
    for number in begun(out, settings):
        write.run_task(out, number)
    return write.finish(out, silent)


def selected(out: str) -> list[tuple[bytes, str]]:
    """(sha256, caption) of the rows that are kept, in the order of the scan."""
    from pyarrow import parquet

    digest, found = selection.read(out).digest, []
    for task in range(3):
        table = parquet.read_table(scan_rows.path(out, task), columns=["sha256", "caption"]).to_pylist()
        found += [(table[row]["sha256"], table[row]["caption"]) for row in selection.kept(out, digest, task)]
    return found


def records(source: PreparedSource) -> list[tuple[bytes, str]]:
    return [(hashlib.sha256(source.read(i)).digest(), source.captions(i)[0]) for i in range(len(source))]


def test_compacted_shards_hold_the_selected_images_shuffled(out):
    made, expected = written(out, COMPACTED), selected(out)
    assert len(made.shards) >= 6
    found = records(PreparedSource(out, captioned=True))
    assert sorted(found) == sorted(expected)
    assert found != expected
    places = [expected.index(one) for one in found[: made.shards[0].records]]
    assert np.abs(np.diff(places)).max() > 20  # from different files, side by side
    for shard in made.shards:
        assert shard.bytes == os.path.getsize(os.path.join(out, shard.path))
        assert shard.sha256 == hashlib.sha256(pathlib.Path(out, shard.path).read_bytes()).hexdigest()
        assert shard.bytes < 200_000
    assert made.sources == selection.read(out).sources
    assert verify.run(out, say=silent) == []
    assert list(pathlib.Path(out).rglob(".*.partial*")) == []


def test_the_index_reads_the_original_files(out):
    made = written(out, INDEXED)
    assert [shard.kind for shard in made.shards] == ["tar"] * 3
    assert records(PreparedSource(out, captioned=True)) == selected(out)
    source = PreparedSource(out)
    assert source.sizes(np.arange(2)).tolist() == [[40, 48]] * 2
    index = pathlib.Path(out, "index")
    size = sum(np.load(index / f"{name}.npy").nbytes for name in ("offsets", "lengths"))
    assert size == 12 * made.records
    assert verify.run(out, say=silent) == []


def tree(out: str) -> dict[str, str]:
    parts = ("data", "records", "manifest.json", "sizes.npy")
    files = [path for path in pathlib.Path(out).rglob("*") if path.is_file()]
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files if path.relative_to(out).parts[0] in parts
    }  # fmt: skip


def test_killed_writers_and_their_order_change_no_byte(out, program, tmp_path):
    other = str(tmp_path / "other")
    shutil.copytree(out, other)
    written(out, COMPACTED)
    numbers = begun(other, COMPACTED)
    for number, writes in zip(reversed(numbers), (2, 1), strict=True):
        finish(start(program("tests.preparation.killed_writer", other, str(number), str(writes))), code=-signal.SIGKILL)
    assert list(pathlib.Path(other).rglob(".*.partial*"))
    with pytest.raises(ValueError, match="2 of 2 tasks are not written"):
        write.finish(other, silent)
    for number in reversed(numbers):
        write.run_task(other, number)
        write.run_task(other, number)
    write.finish(other, silent)
    assert tree(other) == tree(out)


def test_what_is_wrong_is_named(out):
    made = written(out, COMPACTED)
    path = pathlib.Path(out, made.shards[1].path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert [line.partition(" is damaged: its sha256")[0] for line in verify.run(out, say=silent)] == [str(path)]
    path.write_bytes(whole[:-1])
    assert f"{path} has {len(whole) - 1:,} bytes, not {len(whole):,}" in verify.run(out, say=silent)
    path.write_bytes(whole)
    sizes = np.load(os.path.join(out, "sizes.npy"))
    np.save(os.path.join(out, "sizes.npy"), sizes[:-1])
    assert verify.run(out, say=silent) == [
        f"sizes.npy has {made.records - 1} entries, the manifest {made.records} records"
    ]
    sizes[:] = 7
    np.save(os.path.join(out, "sizes.npy"), sizes)
    found = verify.run(out, 5, say=silent)
    assert len(found) == 5
    assert "it has 40 x 48 pixels, sizes.npy says [7, 7]" in found[0]


def test_inputs_that_changed_are_refused(out, scanned):
    tar = scanned.parent / "00000.tar"
    whole = tar.read_bytes()
    written_at = tar.stat().st_mtime_ns
    tar.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    message = r"00000.tar has changed since it was scanned \(its image 0 is another one\)"
    try:
        with pytest.raises(ValueError, match=message):
            written(out, Write(group_inputs=3))
    finally:
        tar.write_bytes(whole)
        os.utime(tar, ns=(written_at, written_at))


@pytest.mark.parametrize("settings", [COMPACTED, INDEXED], ids=["arrayrecord", "index"])
def test_tombstones_leave_the_others_where_they_are(out, settings):
    made = written(out, settings)
    before, source = records(PreparedSource(out, captioned=True)), PreparedSource(out)
    folder = record_files.directory(out, made.build)
    rows = [
        row
        for task in range(record_files.count_tasks(folder))
        for row in record_files.read_records(folder, task, record_files.COLUMNS).to_pylist()
    ]
    hashed = next(i for i, row in enumerate(rows) if row["phash_valid"] and i > 5)
    tombstones.add(out, "url", [rows[3]["url"], "https://elsewhere.org"], silent)
    tombstones.add(out, "sha256", [rows[0]["sha256"].hex().upper()], silent)
    tombstones.add(out, "key", [rows[4]["key"]], silent)
    last = tombstones.add(out, "phash", [f"{rows[hashed]['phash'] ^ 0b101:016x}"], silent, distance=2)
    gone = [0, 3, 4, hashed]
    assert (last.tombstones.version, last.tombstones.count) == (4, 4)
    assert tombstones.numbers(out).tolist() == gone
    assert PreparedSource(out).fingerprint() == source.fingerprint()
    for number, kept in enumerate(before):
        if number in gone:
            with pytest.raises(CorruptRecord):
                PreparedSource(out).read(number)
        else:
            assert hashlib.sha256(PreparedSource(out).read(number)).digest() == kept[0]
    assert verify.run(out, say=silent) == []
    assert write.finish(out, silent).tombstones == last.tombstones  # what was taken out stays out

    for number in compact.tasks(out):
        compact.run_task(out, number)
    compacted = compact.finish(out, silent)
    assert (compacted.version, compacted.records, compacted.tombstones.count) == (2, len(before) - 4, 0)
    assert records(PreparedSource(out, captioned=True)) == [one for i, one in enumerate(before) if i not in gone]
    assert verify.run(out, say=silent) == []
    with pytest.raises(ValueError, match=r"no record in .* has a tombstone"):
        compact.tasks(out)

    written(out, settings)  # version 1 again, with the requests from before, and one more
    tombstones.add(out, "key", [rows[1]["key"]], silent)
    for number in compact.tasks(out):
        compact.run_task(out, number)
    again = compact.finish(out, silent)
    assert (again.version, again.records, again.tombstones.count) == (2, len(before) - 5, 0)
    assert verify.run(out, say=silent) == []


def test_settings_are_those_of_the_selection(out):
    planned, chosen = plan.read(out).settings, selection.read(out)
    stricter = replace(planned, criteria__short_side=20)
    with pytest.raises(ValueError, match=r"config.criteria.short_side was 16 and is 20. Run select with these"):
        write.tasks(out, stricter)
    with pytest.raises(ValueError, match=r"config.criteria.short_side was 16 and is 20"):
        report.write(out, stricter, silent)
    assert selection.settings(stricter, chosen) == planned
    capped = dataclasses.replace(planned, sources=(dataclasses.replace(planned.sources[0], max_records=50),))
    made = select.run(out, replace(capped, write__seed=3), say=silent)
    assert selection.settings(planned, made) == replace(capped, write__seed=3)


def test_mistakes_in_requests_are_named(out, tmp_path):
    with pytest.raises(ValueError, match=r"has no manifest.json"):
        tombstones.add(out, "url", ["x"], silent)
    written(out, INDEXED)
    for kind, values, message in (
        ("name", ["x"], "by url, key, sha256, phash, not by 'name'"),
        ("sha256", ["abc"], "'abc' is no sha256: 64 hexadecimal digits"),
        ("url", [], "no url is given"),
    ):
        with pytest.raises(ValueError, match=message):
            tombstones.add(out, kind, values, silent)
    for distance in (-1, 17):
        with pytest.raises(ValueError, match=rf"distance of {distance} bits must be from 0 to 16"):
            tombstones.add(out, "phash", ["0" * 16], silent, distance=distance)
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbfhttps://example.org/a\r\n\n b \n")
    assert tombstones.read_values(str(tmp_path / "list")) == ["https://example.org/a", "b"]
    with pytest.raises(ValueError, match=r"--file=/nowhere must be a UTF-8 text file"):
        tombstones.read_values("/nowhere")
    name = record_files.name(record_files.directory(out, manifests.read_manifest(out).build), 1, "json")
    part = pathlib.Path(name).rename(tmp_path / "part")
    with pytest.raises(ValueError, match=r"the tables in .* hold .* records: write again"):
        tombstones.add(out, "url", ["x"], silent)
    part.rename(name)
    said = []
    tombstones.add(out, "url", ["https://elsewhere.org"], said.append)
    assert "no other record matches (1 values given)" in said[1]


def test_groups_have_each_input_once_and_few_records_fill_fewer_shards():
    inputs = np.array([[100, 10**6, 0], [0, 0, 0], [1, 10**6, 0], [3, 9 * 10**6, 0], [50, 10**6, 0]])
    made = write_arrayrecord.groups(inputs, Write(shard_bytes=10**6, group_inputs=2))
    assert sorted(sum(made.inputs, ())) == [0, 2, 3, 4]
    assert made.first_record[-1] == 154
    assert made.first_shard[-1] == sum(made.shards)
    for group, number in zip(made.inputs, made.shards, strict=True):
        assert 1 <= number <= inputs[list(group), 0].sum()
    assert write_arrayrecord.groups(inputs, Write(seed=1, group_inputs=2)).inputs != made.inputs


def test_examples_are_those_of_tensorflow():
    # written by hand from the wire format: features { feature { key "b" value { bytes_list { value "xy" } } } }
    assert write_arrayrecord.example({"b": b"xy"}) == bytes.fromhex("0a0d 0a0b 0a0162 1206 0a04 0a02 7879")
    from lumos_jax.data.sources.arrayrecord import byte_features

    long = {"image/encoded": bytes(70_000), "caption": "é".encode(), "caption_detailed": b""}
    assert byte_features(write_arrayrecord.example(long)) == long


def test_a_url_holds_the_same_bytes(scanned, out, tmp_path, monkeypatch):
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path / "cache"))
    memory = pytest.importorskip("fsspec").filesystem("memory")
    url = "memory://prepared/out"
    try:
        for path in [scanned / "plan.json", *(scanned / "scan").glob("*.*")]:
            memory.pipe_file(f"/prepared/out/{path.relative_to(scanned)}", path.read_bytes())
        select.run(url, plan.read(url).settings, say=silent)
        written(url, COMPACTED)
        written(out, COMPACTED)
        expected = tree(out)
        assert len(expected) > 8
        for name, digest in expected.items():
            assert hashlib.sha256(memory.cat_file(f"/prepared/out/{name}")).hexdigest() == digest, name
        tombstones.add(url, "sha256", [selected(out)[0][0].hex()], silent)
        assert verify.run(url, say=silent) == []
        for number in compact.tasks(url):
            compact.run_task(url, number)
        assert compact.finish(url, silent).records == len(selected(out)) - 1
    finally:
        memory.rm("/prepared", recursive=True)
