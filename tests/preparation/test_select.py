"""Selection against its rules, row by row; what it writes depends on neither processes nor partitions nor chunks."""

import dataclasses
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from pyarrow import parquet

from lumos_jax.preparation import decontamination, scan_rows, select, selection
from lumos_jax.preparation.settings import Criteria, Decontamination, Duplicates, Write
from tests.fields import replace
from tests.preparation import scans
from tests.preparation.scans import random_row


def planted(rng: np.random.Generator) -> list[tuple[str, list[dict]]]:
    """Rows of 6 files, among which are equal files, equal and near hashes, chains, and images without content."""
    base = [random_row(rng, aesthetic=float(rng.choice([5.0, 6.0, math.nan]))) for _ in range(150)]
    more = []
    for row in base[:100]:
        for _ in range(rng.integers(0, 4)):
            kind = rng.integers(0, 4)
            bits = [0, 0, int(rng.integers(1, 4)), 1][kind]
            phash = row["phash"]
            for bit in rng.choice(64, bits, replace=False):
                phash ^= 1 << int(bit)
            row = random_row(rng, phash=phash, sha256=row["sha256"] if kind == 0 else rng.bytes(32), aesthetic=5.5)
            more.append(row)
    flat = [random_row(rng, phash=0, phash_valid=False) for _ in range(5)]
    flat.append(dict(flat[0]))
    every = base + more + flat
    order = rng.permutation(len(every))
    parts = np.array_split(order, 6)
    return [("ab"[i >= 3], [every[j] for j in part]) for i, part in enumerate(parts)]


def by_the_rule(tasks, priorities: dict[str, int], distance: int) -> dict:
    """(task, row) -> (reason, keeper, distance) of every duplicate, one row after the other."""
    every = [(task, i, name, row) for task, (name, given) in enumerate(tasks) for i, row in enumerate(given)]

    def rank(one):
        task, i, name, row = one
        score = row.get("aesthetic", math.nan)
        area = row["height"] * row["width"]
        return -priorities[name], -area, math.inf if math.isnan(score) else -score, task, i

    kept, found = [], {}
    for task, i, _, row in sorted(every, key=rank):
        same = [one for one in kept if one[2]["sha256"] == row["sha256"]]
        near = [one for one in kept if one[2]["phash_valid"] and row["phash_valid"]]
        near = [one for one in near if (one[2]["phash"] ^ row["phash"]).bit_count() <= distance]
        if same or near:
            first = (same or near)[0]
            bits = (first[2]["phash"] ^ row["phash"]).bit_count()
            found[task, i] = first[:2], bits
        kept += [] if same or near else [(task, i, row)]
    return found


@pytest.mark.parametrize("distance", [0, 2, 4])
def test_duplicates_are_those_of_the_rule(tmp_path, distance):
    tasks = planted(np.random.default_rng(distance))
    wanted = scans.settings(tmp_path, "a", "b", duplicates=Duplicates(phash_distance=distance))
    wanted = dataclasses.replace(
        wanted, sources=(wanted.sources[0], dataclasses.replace(wanted.sources[1], priority=3))
    )
    out = scans.write(tmp_path, wanted, tasks)
    made = select.run(out, wanted, say=scans.silent)
    expected = by_the_rule(tasks, {"a": 0, "b": 3}, distance)
    groups = parquet.read_table(selection.path(out, made.digest, "groups.parquet")).to_pylist()
    # A file that equals one which is dropped for a near one is a duplicate of what is kept.
    assert {(g["task"], g["row"]): ((g["keeper_task"], g["keeper_row"]), g["distance"]) for g in groups} == expected
    assert len(expected) > 60
    assert made.kept == made.rows - len(expected)
    for task, (_, given) in enumerate(tasks):
        rows = [i for i in range(len(given)) if (task, i) not in expected]
        assert selection.kept(out, made.digest, task).tolist() == rows
        codes = selection.reasons(out, made.digest, task)
        assert {made.reasons[c] for c in codes[codes > 0]} <= {"exact_duplicate", "near_duplicate"}
        assert np.flatnonzero(codes == 0).tolist() == rows
    assert sum(sum(one.reasons.values()) + one.kept for one in made.sources.values()) == made.rows
    per_input = selection.inputs(out, made.digest)
    assert per_input[:, 0].tolist() == [len(selection.kept(out, made.digest, task)) for task in range(6)]
    assert per_input[:, 1].tolist() == (per_input[:, 0] * 1000).tolist()


def test_switched_off_duplicates_stay(tmp_path):
    row = random_row(np.random.default_rng(0))
    wanted = scans.settings(tmp_path, "a", duplicates=Duplicates(exact=False, phash_distance=-1))
    out = scans.write(tmp_path, wanted, [("a", [row, row, row | {"sha256": bytes(32)}])])
    assert select.run(out, wanted, say=scans.silent).kept == 3
    for fields, kept in (({"exact": True}, 2), ({"phash_distance": 0}, 1)):
        other = replace(wanted, **{f"duplicates__{name}": value for name, value in fields.items()})
        assert select.run(out, other, say=scans.silent).kept == kept


def files_of(out: str, digest: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pathlib.Path(selection.path(out, digest)).iterdir()}


def test_bytes_depend_on_neither_processes_nor_partitions_nor_chunks(tmp_path, monkeypatch):
    tasks = planted(np.random.default_rng(5))
    wanted = scans.settings(tmp_path, "a", "b", duplicates=Duplicates(phash_distance=2))
    wanted = dataclasses.replace(wanted, sources=tuple(dataclasses.replace(s, max_records=80) for s in wanted.sources))
    out = scans.write(tmp_path, wanted, tasks)
    made = select.run(out, wanted, say=scans.silent)
    first = files_of(out, made.digest)
    assert not [name for name in first if "scratch" in name]
    assert all(one.kept == 80 for one in made.sources.values())
    for partitions, chunk, workers in ((8, 100, 1), (3, 1, 2)):
        pathlib.Path(out, "select", made.digest, "selection.json").unlink()
        (pathlib.Path(out, "select", made.digest) / "scratch").mkdir()  # of a process that was killed
        monkeypatch.setattr(select, "ROWS_OF_CHUNK", chunk)
        again = select.run(out, replace(wanted, duplicates__partitions=partitions), workers, scans.silent)
        assert again == made
        assert files_of(out, made.digest) == first


def test_caps_choose_by_hash(tmp_path):
    rng = np.random.default_rng(0)
    rows = [random_row(rng) for _ in range(300)]

    def kept(order, name, seed=0):
        wanted = scans.settings(tmp_path / name, "a", write=Write(seed=seed))
        wanted = dataclasses.replace(wanted, sources=(dataclasses.replace(wanted.sources[0], max_records=100),))
        tasks = [("a", [rows[i] for i in part]) for part in np.array_split(order, 3)]
        there = (tmp_path / name / "out").exists()
        out = str(tmp_path / name / "out") if there else scans.write(tmp_path / name, wanted, tasks)
        made = select.run(out, wanted, say=scans.silent)
        assert made.sources["a"].reasons == {"cap": 200}
        parts = np.array_split(order, 3)
        return {int(part[i]) for task, part in enumerate(parts) for i in selection.kept(out, made.digest, task)}

    chosen = kept(np.arange(300), "x")
    assert len(chosen) == 100
    assert chosen == kept(rng.permutation(300), "y")
    assert 20 < len(chosen & set(range(100))) < 47  # not the first
    assert chosen != kept(np.arange(300), "z", seed=1)
    assert chosen == kept(np.arange(300), "z", seed=0)


REASONS = {
    "aesthetic": {"aesthetic": 4.7}, "watermark": {"watermark": 0.6}, "unsafe": {"unsafe": 0.9},
    "similarity": {"similarity": 0.1}, "short_side": {"height": 255}, "ratio": {"height": 256, "width": 1025},
    "pixels": {"height": 2000, "width": 2001}, "bytes": {"bytes": 9}, "blur": {"blur": 1.9}, "entropy": {"entropy": 0.9},
    "border": {"border": 0.6}, "no_caption": {"caption": "", "detailed": ""}, "repetition": {"caption": "a b A B c"},
    "banned": {"detailed": "Buy NOW, here"}, "undecodable": {"reason": "undecodable"},
}  # fmt: skip
STRICT = Criteria(
    min_similarity=0.2, max_pixels=4_000_000, min_bytes=10, min_blur=2, min_entropy=1, max_border=0.5, need_caption=True,
    min_words=2, max_words=5, max_repetition=0.3, banned=("buy now", "x+y"),
)  # fmt: skip


def test_each_criterion_has_its_reason_and_the_first_counts(tmp_path):
    rng = np.random.default_rng(0)
    good = {"caption": "two words", "aesthetic": 5.0, "watermark": 0.5, "similarity": 0.2}
    rows = [random_row(rng, **good | fields) for fields in REASONS.values()]
    texts = ["one", "a b c d e f", "buy nowhere", "", "see x+y here"]
    rows += [random_row(rng, **good | {"caption": text, "detailed": "a text"}) for text in texts]
    rows.append(random_row(rng, caption="no scores"))
    rows.append(random_row(rng, **good | REASONS["banned"] | REASONS["blur"] | REASONS["entropy"]))
    wanted = scans.settings(tmp_path, "a", criteria=STRICT)
    out = scans.write(tmp_path, wanted, [("a", rows)])
    made = select.run(out, wanted, say=scans.silent)
    found = [made.reasons[code] for code in selection.reasons(out, made.digest, 0)]
    assert found == [*REASONS, "words", "words", "", "", "banned", "", "blur"]
    assert made.sources["a"].reasons["blur"] == 2


def test_a_looser_criterion_is_refused_by_name_and_a_stricter_one_selects_again(tmp_path):
    rng = np.random.default_rng(0)
    wanted = scans.settings(tmp_path, "a")
    out = scans.write(tmp_path, wanted, [("a", [random_row(rng, aesthetic=a) for a in (5.0, 6.0, 7.0)])])
    with pytest.raises(ValueError, match=r"criteria.min_aesthetic was 4.75 and is 4.0"):
        select.run(out, replace(wanted, criteria__min_aesthetic=4.0), say=scans.silent)
    assert select.run(out, wanted, say=scans.silent).kept == 3
    stricter = select.run(out, replace(wanted, criteria__min_aesthetic=5.5), say=scans.silent)
    assert (stricter.kept, selection.read(out)) == (2, stricter)
    said = []
    assert select.run(out, wanted, say=said.append) == selection.read(out)
    assert said == ["selected before: 3 of 3 records"]
    os.unlink(os.path.join(out, "scan", "000000.json"))
    with pytest.raises(ValueError, match="1 of 1 tasks of the scan are not done"):
        select.run(out, wanted, say=scans.silent)


def test_one_process_selects_at_a_time(tmp_path):
    wanted = scans.settings(tmp_path, "a")
    out = scans.write(tmp_path, wanted, [("a", [random_row(np.random.default_rng(0))])])
    hold = f"import sys; from lumos_jax.preparation import files; files.lock({out!r}); print(1, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold], cwd=pathlib.Path(__file__).parents[2], **pipes) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match=rf"out is in use by another run \(process {other.pid} on"):
            select.run(out, wanted, say=scans.silent)
        other.kill()
    assert select.run(out, wanted, say=scans.silent).kept == 1


def test_damaged_and_missing_files_are_named_with_a_remedy(tmp_path):
    wanted = scans.settings(tmp_path, "a")
    out = scans.write(tmp_path, wanted, [("a", [random_row(np.random.default_rng(0))])])
    made = select.run(out, wanted, say=scans.silent)
    folder = pathlib.Path(selection.path(out, made.digest))
    for path, call, remedy in (
        (folder / "kept-000000.npy", lambda: selection.kept(out, made.digest, 0), f"remove {folder} and select again"),
        (folder / "selection.json", lambda: selection.read(out), "remove it and select again"),
        (pathlib.Path(scan_rows.path(out, 0)), lambda: select.run(out, wanted, say=scans.silent), "000000.json and scan again"),
        (pathlib.Path(out, "scan/000000.json"), lambda: select.run(out, wanted, say=scans.silent), "remove it and scan again"),
    ):  # fmt: skip
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{path} is damaged \(.*\): .*{remedy}"):
            call()
        if path.suffix != ".json":
            path.unlink()
            with pytest.raises(ValueError, match=rf"{path} is missing: .*{remedy}"):
                call()
        if path != folder / "selection.json":  # so that the next selection begins anew
            path.write_bytes(whole)
    path.write_text(whole.decode().replace('"plan": "', '"plan": "0'))
    with pytest.raises(ValueError, match=r"scan/000000.json is of another plan: remove .*scan and scan again"):
        select.run(out, wanted, say=scans.silent)


@pytest.mark.parametrize("distance", [0, 3, 8, 16])
def test_evaluation_images_are_found_by_file_and_by_hash(distance):
    rng = np.random.default_rng(distance)
    known = rng.integers(0, 2**64, 700, np.uint64)
    rows = np.concatenate([rng.integers(0, 2**64, 2000, np.uint64), np.repeat(known[:200], 3)])
    for i in range(2000, len(rows)):
        for bit in rng.choice(64, rng.integers(0, distance + 3), replace=False):
            rows[i] ^= np.uint64(1) << np.uint64(bit)
    files = rng.integers(0, 2**64, (len(rows), 2), np.uint64)
    valid = rng.random(len(rows)) < 0.9
    sets = decontamination.EvaluationHashes(np.unique(known), np.unique(files[[3, 5]], axis=0))
    matcher = decontamination.Matcher(sets, distance)
    expected = valid & (np.bitwise_count(rows[:, None] ^ known[None]) <= distance).any(1)
    expected[[3, 5]] = True
    assert expected[2000:].sum() > 150
    found = matcher(rows, valid, files)
    np.testing.assert_array_equal(found, expected)
    files[3, 1] += np.uint64(1)  # agrees in the first half
    assert matcher(rows[3:4], valid[3:4], files[3:4]) == (expected[3] and found[3] and (rows[3] in known))


def test_evaluation_sets_of_hashes_and_images(tmp_path):
    from lumos_jax import fileio
    from lumos_jax.preparation import images

    rng = np.random.default_rng(0)
    rows = [random_row(rng) for _ in range(4)]
    pixels = np.kron(rng.integers(0, 256, (8, 8, 3), np.uint8), np.ones((40, 40, 1), np.uint8))
    folder = tmp_path / "images" / "deep"
    fileio.save_png(pixels, folder / "one.png")
    measured = images.measure((folder / "one.png").read_bytes())
    rows[0]["phash"] = measured.phash ^ 5
    (tmp_path / "hashes.txt").write_text(
        f"# a comment\n{rows[1]['phash'] ^ 1:016x} name.jpg\n{rows[2]['sha256'].hex()}\n"
    )
    np.save(tmp_path / "hashes.npy", np.array([rows[3]["phash"] ^ 0xFF], np.uint64))
    names = tuple(str(tmp_path / name) for name in ("images", "hashes.txt", "hashes.npy"))
    wanted = scans.settings(tmp_path, "a", decontamination=Decontamination(sets=names))
    out = scans.write(tmp_path, wanted, [("a", rows)])
    made = select.run(out, wanted, say=scans.silent)
    assert made.sources["a"].reasons == {"evaluation": 3}
    assert selection.kept(out, made.digest, 0).tolist() == [3]  # 8 bits away
    assert [one.hashes for one in made.evaluation_sets] == [1, 1, 1]
    assert len(list(pathlib.Path(out, "evaluation").iterdir())) == 1
    os.utime(folder / "one.png", ns=(1, 1))
    (folder / "one.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"evaluation set .*images: .*one.png cannot be decoded"):
        select.run(out, wanted, say=scans.silent)
    fileio.save_png(pixels, folder / "one.png")
    with pytest.raises(ValueError, match=r"config.decontamination.sets: /nowhere is not there"):
        select.run(out, replace(wanted, decontamination__sets=("/nowhere",)), say=scans.silent)
    (tmp_path / "hashes.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"hashes.txt holds no hashes"):
        select.run(out, wanted, say=scans.silent)
    (tmp_path / "hashes.txt").write_text("abc\n")
    with pytest.raises(ValueError, match=r"hashes.txt, line 1: 'abc' is no hash"):
        select.run(out, wanted, say=scans.silent)
