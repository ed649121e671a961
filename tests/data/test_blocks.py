"""Block order: permutations of blocks and of records within a window, whatever the sizes, and what hosts read of it."""

import numpy as np
import pytest

from lumos_jax import config, data
from lumos_jax.data import order
from tests.fields import data_settings


def settings(count=1000, holdout=0, block=8, window=4, **fields):
    fields = {"scenes__num_scenes": count, "holdout": holdout} | fields
    return data_settings(order="block", block_records=block, block_window=window, **fields)


def epochs(chosen, batch_size, count, first=0, number=1):
    positions = order.training_order(chosen, data.make_source(chosen), batch_size)
    return [[positions(e * count + i) for i in range(count)] for e in range(first, first + number)]


@pytest.mark.parametrize(
    ("count", "holdout", "block", "window", "batch"),
    [
        (1000, 0, 8, 4, 16), (1003, 17, 8, 4, 16), (1003, 17, 8, 4, 5), (999, 1, 128, 256, 64), (50, 3, 64, 2, 128),
        (300, 0, 1, 7, 3), (301, 5, 10, 1, 70), (4200, 11, 1, 512, 32), (7, 2, 3, 2, 1), (5300, 1, 5000, 1, 2),
    ],
)  # fmt: skip
def test_every_epoch_holds_each_record_once_in_another_order(count, holdout, block, window, batch):
    chosen = settings(count, holdout, block, window)
    held = data.holdout_records(chosen, data.make_source(chosen))
    found = epochs(chosen, batch, count - holdout, number=3)
    for epoch in found:
        assert sorted([*epoch, *held]) == list(range(count))
    assert len({*map(tuple, found)}) == 3
    assert epochs(config.replace(chosen, {"seed": 1}), batch, count - holdout)[0] not in found
    assert data.holdout_records(config.replace(chosen, {"seed": 1}), data.make_source(chosen)) == held


def test_order_stays_as_it_was():
    # These numbers are the contract with runs that resume.
    chosen = settings(100_000, 10, seed=3)
    positions = order.training_order(chosen, data.make_source(chosen), 16)
    assert [positions(2 * 99_990 + i) for i in (0, 1, 31, 32, 99_989)] == [12182, 12183, 75430, 3366, 97007]


def test_a_window_is_of_few_blocks_and_well_mixed():
    chosen = settings(100_000, block=50, window=20)
    positions = order.training_order(chosen, data.make_source(chosen), 40)
    epoch = [positions(i) for i in range(20_000)]
    for window in np.reshape(epoch[:10_000], (10, 1000)):
        assert len({record // 50 for record in window}) == 20
    blocks = [set(np.array(epoch[i : i + 40]) // 50) for i in range(0, 10_000, 40)]
    assert min(map(len, blocks)) == 20  # a batch has records of every block of its window
    assert np.mean(np.abs(np.diff(epoch)) == 1) < 0.05
    assert np.isclose(np.mean(epoch), 50_000, rtol=0.1)


@pytest.mark.parametrize("batch", [16, 48, 64])
def test_hosts_read_different_blocks(batch):
    chosen = settings(20_000, holdout=100, block=32, window=16)
    source = data.make_source(chosen)
    positions = order.training_order(chosen, source, batch)
    [(_, blocks)] = order.training_blocks(chosen, source)
    assert len(blocks) == 19_900
    window = np.reshape([positions(i) for i in range(32 * 16 // batch * batch)], (-1, batch))
    hosts = [{blocks.block_of(int(record)) for record in rows.flat} for rows in np.split(window, 4, axis=1)]
    assert sum(map(len, hosts)) <= len(set.union(*hosts)) + 3  # one at each boundary between two hosts at most
    for block in set.union(*hosts):
        assert 32 <= len(block) <= 32 + 100
        inside = [record for record in block if record not in set(data.holdout_records(chosen, source))]
        assert len(inside) == 32


def test_mixtures_keep_their_weights_in_every_batch_and_their_epochs():
    parts = tuple({"source": "scenes", "num_scenes": n, "weight": w} for n, w in ((120, 0.75), (500, 0.25)))
    chosen = settings(source="mixture", mixture=parts, holdout=20)
    source = data.make_source(chosen)
    held = set(data.holdout_records(chosen, source))
    positions = order.training_order(chosen, source, 16)
    drawn = np.array([positions(i) for i in range(1600)])
    assert not set(drawn) & held
    assert (np.abs((drawn.reshape(-1, 16) < 120).sum(1) - 12) <= 1).all()
    first = drawn[drawn < 120][: 105 * 11]
    assert set(np.bincount(first)[np.unique(first)]) == {11}
    np.testing.assert_array_equal([positions(i) for i in range(700, 800)], drawn[700:800])


def test_batches_are_those_of_the_order_on_any_hosts():
    chosen = settings(200, holdout=9, image_size=8)
    source = data.make_source(chosen)
    expected = epochs(chosen, 8, 191, number=2)
    expected = np.reshape(np.concatenate(expected)[:376], (47, 8))
    for rows, start in ((range(8), 3), (range(3, 8), 20)):
        batches = data.make_train_iterator(chosen, source, batch_size=8, rows=rows, start_step=start)
        for step in range(start, start + 5):
            np.testing.assert_array_equal(next(batches)["record"], expected[step][list(rows)])
        batches.close()


def test_buckets_are_refused():
    with pytest.raises(ValueError, match=r"order=block does not go with config\.data\.aspect_ratios"):
        config.validate(config.Settings(data=settings(sample_type="captioned", aspect_ratios=(0.5, 2.0))))
