"""Plan and scan: rows that depend on the plan alone, what is refused by name, failed inputs, and images that kill workers."""

import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys

import pytest
from pyarrow import parquet

from lumos_jax import cli, prepare
from lumos_jax.preparation import engines, plan, scan, scan_rows, settings
from tests.preparation import collections_of as made
from tests.running import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
PHOTOS = [made.photo(number) for number in range(4)]


def quiet(_):
    pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four shards of a collection, one of them truncated."""
    folder = tmp_path_factory.mktemp("collection")
    for shard in range(4):
        files = []
        for number in range(4):
            key = f"{shard}{number}"
            fields = {"url": f"u{key}", "caption": f"caption {key}", "aesthetic": 5.0 if number else 3.0}
            files += [
                (f"{key}.jpg", PHOTOS[number][: 900 if number == 2 else None]),
                (f"{key}.json", json.dumps(fields).encode()),
            ]
        data = made.tar(files)
        (folder / f"{shard}.tar").write_bytes(data[:5000] if shard == 3 else data)
    return folder


def wanted(shards, **changes):
    source = settings.Source(kind="tars", path=str(shards))
    return settings.Prepare(sources=(source,), task_bytes=1, max_failed_shards=0.5, **changes)


def scanned(out, shards, how=engines.Execution(), **changes):  # noqa: B008
    planned = plan.make(str(out), wanted(shards, **changes), quiet)
    engines.run(scan.run_task, str(out), scan.tasks(planned), how, lambda: scan.finished(str(out)), "scan")
    return scan.finish(str(out))


def digests(out):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "scan").glob("*.parquet"))]


def test_every_candidate_has_a_row_with_its_reason(tmp_path, shards):
    found = scanned(tmp_path, shards)
    assert [dict(one.reasons) for one in found] == [{"": 2, "aesthetic": 1, "undecodable": 1}] * 3 + [{}]
    assert [pathlib.Path(one["path"]).name for one in found[3].failed] == ["3.tar"]
    table = parquet.read_table(scan_rows.path(str(tmp_path), 1))
    assert table.schema == scan_rows.schema()
    low, good, broken, _ = table.to_pylist()
    assert [low["reason"], good["reason"], broken["reason"]] == ["aesthetic", "", "undecodable"]
    assert (low["height"], low["phash"], low["sha256"]) == (0, 0, hashlib.sha256(PHOTOS[0]).digest())
    assert (good["input"], good["row"], good["key"], good["url"]) == (1, 1, "11", "u11")
    assert (good["height"], good["width"], good["format"], good["caption"]) == (160, 200, "JPEG", "caption 11")
    data = (shards / "1.tar").read_bytes()
    assert data[good["offset"] :][: good["bytes"]] == PHOTOS[1]
    assert digests(tmp_path)[1] == found[1].sha256


def test_rows_do_not_depend_on_workers_processes_or_interruptions(tmp_path, shards):
    scanned(tmp_path / "one", shards)
    scanned(tmp_path / "pool", shards, engines.Execution(workers=2))
    planned = plan.make(str(tmp_path / "array"), wanted(shards), quiet)
    out = str(tmp_path / "array")
    scan.run_task(out, 2)
    for process in (1, 0):
        how = engines.Execution(processes=2, process=process)
        if not process:
            with pytest.raises(ValueError, match="1 of 4 tasks of the scan are not done, as 0"):
                scan.finish(out)
        engines.run(scan.run_task, out, scan.tasks(planned), how, lambda: 0, "scan")
    (tmp_path / "array" / "scan" / "000001.json").unlink()  # killed before it was done
    scan.run_task(out, 1)
    assert digests(tmp_path / "one") == digests(tmp_path / "pool") == digests(tmp_path / "array")


def test_the_plan_is_found_again_and_changes_are_refused_by_name(tmp_path, shards):
    out = str(tmp_path)
    first = plan.make(out, wanted(shards), quiet)
    tighter = dataclasses.replace(settings.Criteria(), min_aesthetic=6.0, short_side=100)
    assert plan.make(out, wanted(shards, criteria=tighter), quiet).digest == first.digest == plan.read(out).digest
    for change, message in (
        ({"sample": 0.5}, r"config\.sample was 1\.0 and is 0\.5"),
        ({"criteria": settings.Criteria(min_aesthetic=4.0)}, r"config\.criteria\.min_aesthetic was 4\.75 and is 4\.0"),
        (
            {"sources": (settings.Source(kind="folder", path="x"),)},
            r"config\.sources was \('tars',\) and is \('folder',\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            plan.make(out, dataclasses.replace(wanted(shards), **change), quiet)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="remove it, and plan again"):
        plan.read(out)


def test_changed_inputs_are_refused(tmp_path, shards):
    copy = tmp_path / "copy"
    copy.mkdir()
    for shard in "01":
        (copy / f"{shard}.tar").write_bytes((shards / f"{shard}.tar").read_bytes())
    out = str(tmp_path / "out")
    plan.make(out, wanted(copy), quiet)
    (copy / "1.tar").write_bytes((shards / "2.tar").read_bytes())
    with pytest.raises(ValueError, match=r"1\.tar changed since it was planned"):
        scan.run_task(out, 1)
    assert not list((tmp_path / "out" / "scan" / "attempts").iterdir())
    with pytest.raises(ValueError, match=r"input .*1\.tar changed since .*plan\.json was written"):
        plan.make(out, wanted(copy), quiet)
    (copy / "1.tar").unlink()
    scan.run_task(out, 0)
    scan.run_task(out, 1)
    assert len(scan.finish(out)[1].failed) == 1
    strict = dataclasses.replace(wanted(copy), max_failed_shards=0.001)
    with pytest.raises(
        ValueError, match=r"1 of 2 input files cannot be read, more than config\.max_failed_shards=0\.001"
    ):
        scan.finish(out, strict)


def test_a_sample_takes_the_same_images_everywhere(tmp_path, shards):
    whole = scanned(tmp_path / "whole", shards)
    half = scanned(tmp_path / "half", shards, sample=0.6)
    sums = [hashlib.sha256(PHOTOS[number]).digest() for number in (0, 1, 3)]
    share = {one for one in sums if int.from_bytes(one[:8]) < 0.6 * 2**64}
    tables = [parquet.read_table(scan_rows.path(str(tmp_path / "half"), task)) for task in range(3)]
    kept = [row["sha256"] for table in tables for row in table.to_pylist() if row["reason"] != "undecodable"]
    assert set(kept) == share
    assert [one.read for one in half] == [one.read for one in whole]
    few = plan.make(str(tmp_path / "few"), wanted(shards, sample_inputs=0.5), quiet)
    assert len(few.inputs) == 2
    assert few.totals == {"tars": (4, sum(path.stat().st_size for path in shards.iterdir()))}


KILLER = """
import os, signal
from lumos_jax.preparation import images
measure = images.measure
def deadly(data):
    if data == open(os.environ["DEADLY"], "rb").read():
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(data)
images.measure = deadly
"""


def test_an_image_that_kills_its_workers_is_put_in_quarantine(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    (tmp_path / "deadly").write_bytes(PHOTOS[3])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("DEADLY", str(tmp_path / "deadly"))
    (tmp_path / "a.tar").write_bytes(made.tar([("0.jpg", PHOTOS[0]), ("1.jpg", PHOTOS[3])]))
    out, source = tmp_path / "out", settings.Source(kind="tars", path=str(tmp_path / "a.tar"))
    made_plan = plan.make(str(out), settings.Prepare(sources=(source,)), quiet)
    for mark in ("a", "b"):  # two workers were killed before
        (out / "scan" / "attempts").mkdir(parents=True, exist_ok=True)
        (out / "scan" / "attempts" / f"000000-{mark}").touch()
    engines.run(scan.run_task, str(out), scan.tasks(made_plan), engines.Execution(workers=2), lambda: 0, "scan")
    (found,) = scan.finish(str(out))
    assert dict(found.reasons) == {"": 1, "crash": 1}
    last = parquet.read_table(scan_rows.path(str(out), 0)).to_pylist()[1]
    assert (last["reason"], last["sha256"]) == ("crash", hashlib.sha256(PHOTOS[3]).digest())
    assert not list((out / "scan" / "attempts").iterdir())


def test_workers_and_the_command_line_load_no_jax():
    code = (
        "import sys; from lumos_jax import prepare; from lumos_jax.preparation import scan\n"
        "print([m for m in ('jax', 'grain', 'tensorflow', 'apache_beam') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["scan", "--workers=0"], "--workers=0 must be at least 1"),
        (["scan", "--processes=2", "--process=2"], "--process=2 must be from 0 to 1"),
        (["scan", "--region=x"], "unexpected argument '--region=x'"),
        (["scan", "--runner=Spark"], "--runner=Spark is not one of"),
        (["scan", "--config.sampl=1"], "unknown field sampl"),
        (["plan", "--config=configs/prepare/web.py", "--source=foldr:x"], "kind='foldr' is not one of"),
        (["plan", "--config=configs/prepare/web.py:all"], "there is no 'all'"),
        (["plan"], "--config"),
        ([], "VERB"),
    ],
)
def test_mistakes_are_one_line_and_code_2(tmp_path, shards, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(ROOT)
    plan.make(str(tmp_path), wanted(shards), quiet)
    arguments = [*flags, f"--out={tmp_path}"] if flags else []
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])  # where ml_collections looks
    assert cli.call(lambda: prepare.main(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_command_line_scans_and_says_what_it_found(tmp_path, shards, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    given = ["--config=configs/prepare/web.py", f"--source=tars:{shards}", "--config.max_failed_shards=0.5"]
    for arguments in (["plan", *given], ["scan", "--config.criteria.min_aesthetic=6.0"]):
        monkeypatch.setattr(sys, "argv", ["prepare", *arguments, f"--out={tmp_path}"])
        prepare.main(sys.argv[1:])
    said = capsys.readouterr().err
    assert "source tars: 4 input files" in said
    assert "scanned 12 of 12 images" in said
    assert "cannot be read: " in said
