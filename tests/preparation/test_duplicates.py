"""Pairs by bands against all pairs, the rule of which row is kept, and rows that are equal."""

import numpy as np
import pytest

from lumos_jax.preparation import duplicates, engines, hamming


def flipped(rng, hashes: np.ndarray, most: int) -> np.ndarray:
    """The hashes with 0 to `most` bits of each inverted."""
    changed = hashes.copy()
    for i in range(len(changed)):
        for bit in rng.choice(64, rng.integers(0, most + 1), replace=False):
            changed[i] ^= np.uint64(1) << np.uint64(bit)
    return changed


def sample(rng, count: int = 3000) -> np.ndarray:
    base = rng.integers(0, 2**64, count, np.uint64)
    alike = np.uint64(0xABCD << 48) | rng.integers(0, 2**12, 400, np.uint64)  # agree in whole bands
    return rng.permutation(np.unique(np.concatenate([base, flipped(rng, base[:600], 7), alike])))


def all_pairs(hashes: np.ndarray, distance: int) -> set:
    left, right = np.nonzero(np.triu(np.bitwise_count(hashes[:, None] ^ hashes[None]) <= distance, 1))
    return {(min(a, b), max(a, b)) for a, b in zip(hashes[left].tolist(), hashes[right].tolist(), strict=True)}


@pytest.mark.parametrize("distance", [1, 2, 3, 4])
def test_bands_find_every_pair_once(distance, tmp_path, monkeypatch):
    hashes = sample(np.random.default_rng(distance))
    expected = all_pairs(hashes, distance)
    assert len(expected) > 50
    parts = [str(tmp_path / f"{i}.npy") for i in range(3)]
    for part, some in zip(parts, np.array_split(hashes, 3), strict=True):
        np.save(part, some)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for rows, large in ((500, 1 << 15), (10**6, 1 << 15), (10**6, 20)):  # the last: tables within tables
        monkeypatch.setattr(hamming, "_LARGE", large)
        with engines.processes(1) as run:
            pairs = hamming.near_pairs(parts, distance, str(scratch), run, rows)
        assert sorted(near_list(pairs)) == sorted(expected)
        assert not list(scratch.iterdir())


def near_list(pairs: np.ndarray) -> list:
    return [tuple(pair) for pair in pairs.tolist()]


@pytest.mark.parametrize(
    ("distance", "count", "number", "bits"), [(2, 10**8, 3, 21), (4, 5 * 10**8, 15, 20), (3, 1000, 4, 16)]
)
def test_tables_are_those_of_the_pigeonhole_rule(distance, count, number, bits):
    plan = hamming.tables(distance, count)
    assert len(plan) == number
    assert min(table.bits for table in plan) == bits
    hashes = np.random.default_rng(0).integers(0, 2**64, 100, np.uint64)
    for table in plan:
        words = hamming.rearranged(hashes, table)
        np.testing.assert_array_equal(hamming.restored(words, table), hashes)
        top = np.uint64(2**64 - 2 ** (64 - table.bits))
        np.testing.assert_array_equal(np.bitwise_count(words & top), np.bitwise_count(hashes & np.uint64(table.mask)))


def test_many_table_sets_find_the_same_pairs():
    hashes = sample(np.random.default_rng(9))
    small, large = hamming.tables(3, 1000), hamming.tables(3, 10**9)
    assert (len(small), len(large)) == (4, 10)
    found = []
    for plan in (small, large):
        words = [np.sort(hamming.rearranged(hashes, table)) for table in plan]
        pairs = [hamming.pairs_of_table(w, plan, i, 3) for i, w in enumerate(words)]
        found.append(sorted(near_list(np.concatenate(pairs))))
    assert found[0] == found[1] == sorted(all_pairs(hashes, 3))


def test_chains_are_not_followed():
    # 0 - 1 - 2 - 3 - 4, each close to the next only: every other one is kept
    np.testing.assert_array_equal(duplicates.keepers(np.arange(4), np.arange(1, 5), 6), [-1, 0, -1, 2, -1, -1])
    # 2 is close to 1, which is dropped for 0, and to 3, which it ranks above
    np.testing.assert_array_equal(duplicates.keepers(np.array([0, 1, 2]), np.array([1, 2, 3]), 4), [-1, 0, -1, 2])
    # close to two that are kept: the one that ranks first
    np.testing.assert_array_equal(duplicates.keepers(np.array([1, 0]), np.array([2, 2]), 3), [-1, -1, 0])


def test_keepers_are_those_of_the_rule_one_by_one():
    rng = np.random.default_rng(1)
    edges = np.unique(np.sort(rng.integers(0, 300, (900, 2)), axis=1), axis=0)
    edges = rng.permutation(edges[edges[:, 0] < edges[:, 1]])
    expected = []
    for node in range(300):
        kept = [a for a, b in edges.tolist() if b == node and expected[a] == -1]
        expected.append(min(kept, default=-1))
    np.testing.assert_array_equal(duplicates.keepers(edges[:, 0], edges[:, 1], 300), expected)


def test_equal_rows_by_rank():
    keys = [np.array([5, 7, 5, 5, 9, 5], np.uint64), np.array([1, 1, 1, 2, 1, 1], np.uint64)]
    ranks = [np.array([3, 0, 1, 0, 0, 1]), np.arange(6)]
    rows, first = duplicates.equal_rows(keys, ranks)
    assert dict(zip(rows.tolist(), first.tolist(), strict=True)) == {0: 2, 5: 2}
    assert [len(found) for found in duplicates.equal_rows([keys[0][:0]], [ranks[0][:0]])] == [0, 0]
