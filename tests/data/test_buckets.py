"""Aspect buckets: the table, where records go, the order of batches, and the pictures."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from lumos_jax import config, data
from lumos_jax.data import aspect, decode, order
from lumos_jax.data.sources.scenes import ScenesSource
from tests.fields import data_settings

# Height over width of the tables that PixArt trains 256, 512 and 1024 px with, and some of their sizes at 1024 px.
RATIOS = [
    0.25, 0.26, 0.27, 0.28, 0.32, 0.33, 0.35, 0.4, 0.42, 0.48, 0.5, 0.52, 0.57, 0.6, 0.68, 0.72, 0.78, 0.82, 0.88, 0.94, 1.0,
    1.07, 1.13, 1.21, 1.29, 1.38, 1.46, 1.67, 1.75, 2.0, 2.09, 2.4, 2.5, 2.89, 3.0, 3.11, 3.62, 3.75, 3.88, 4.0,
]  # fmt: skip
SIZES = {
    0.25: (512, 2048),
    0.4: (640, 1600),
    0.52: (704, 1344),
    0.94: (960, 1024),
    1.29: (1152, 896),
    3.62: (1856, 512),
}


@pytest.mark.parametrize("base", [256, 512, 1024])
def test_the_table_is_the_reference_one(base):
    table = aspect.make_buckets(base)
    assert [bucket.ratio for bucket in table] == RATIOS
    sizes = {bucket.ratio: (bucket.height, bucket.width) for bucket in table}
    for ratio, (height, width) in SIZES.items():
        assert sizes[ratio] == (height * base // 1024, width * base // 1024)
    assert table[aspect.square(table)] == aspect.Bucket(base, base)


def test_a_coarser_table_and_what_is_none():
    table = aspect.make_buckets(16, (0.5, 2.0))
    assert [(b.height, b.width) for b in table] == [(12, 20), (16, 16), (20, 12)]
    assert list(aspect.nearest(table, np.array([0.1, 0.75, 1.3, 1.4, 9.0]))) == [0, 0, 1, 2, 2]
    with pytest.raises(ValueError, match=r"image_size=18 .* no multiple of 4 px"):
        aspect.make_buckets(18)


def settings(**fields):
    return data_settings(**{
        "sample_type": "captioned", "image_size": 16, "scenes__num_scenes": 300, "holdout": 30, "aspect_ratios": (0.5, 2.0),
    } | fields)  # fmt: skip


def steps_of(chosen, source, batch_size=8, rows=range(8), start_step=0):
    """The batches' (position, record) pairs, each record's bucket, and the steps of an epoch."""
    bucket_of = aspect.assign(chosen, source, batch_size)
    buckets = aspect.BucketOrder(chosen, source, bucket_of, batch_size)
    steps = order.host_steps(buckets.batch_of, batch_size=batch_size, rows=rows, start_step=start_step)
    return steps, bucket_of, buckets.steps_per_epoch


def test_every_record_goes_to_the_nearest_ratio():
    source = data.make_source(settings())
    sizes = source.sizes(np.arange(300))
    ratios = sizes[:, 0] / sizes[:, 1]
    assert ratios.min() < 0.6 < 1.8 < ratios.max()
    assert np.abs(sizes.prod(1) / 256 - 1).max() < 0.1
    buckets = aspect.table(settings())
    expected = [min(range(3), key=lambda i: abs(buckets[i].ratio - r)) for r in ratios]
    assert list(aspect.assign(settings(), source, 8)) == expected


def test_batches_are_of_one_bucket_and_an_epoch_holds_every_record():
    chosen = settings()
    source = data.make_source(chosen)
    steps, bucket_of, epoch = steps_of(chosen, source)
    assert abs(epoch - 270 / 8) <= 1.5
    seen, turns = [], []
    for step in range(epoch):
        positions, records = zip(*steps(step), strict=True)
        assert list(positions) == list(range(step * 8, step * 8 + 8))
        assert len(set(bucket_of[list(records)])) == 1
        turns.append(bucket_of[records[0]])
        seen += records
    assert not set(seen) & set(order.holdout_records(chosen, source))
    assert len(set(seen)) > 270 - 3 * 8  # but for what does not fill a batch
    assert len({tuple(turns[i : i + 3]) for i in range(epoch - 2)}) > 6  # the buckets take turns in no fixed pattern
    share = np.bincount(turns, minlength=3) / epoch
    np.testing.assert_allclose(share, np.bincount(bucket_of, minlength=3) / 300, atol=0.06)


def test_order_is_a_function_of_seed_and_step():
    chosen = settings()
    source = data.make_source(chosen)
    whole, *_ = steps_of(chosen, source)
    later, *_ = steps_of(chosen, source, start_step=50)
    other, *_ = steps_of(settings(seed=1), source)
    for step in (50, 51, 90):
        assert later(step - 50) == whole(step)
        for host in range(2):
            half, *_ = steps_of(chosen, source, rows=range(host * 4, host * 4 + 4))
            assert half(step) == whole(step)[host * 4 : host * 4 + 4]
    assert [whole(s) for s in range(9)] != [other(s) for s in range(9)]


def test_small_buckets_are_closed_and_their_records_stay():
    source = data.make_source(settings(scenes__num_scenes=40, holdout=0))
    open_all = aspect.assign(settings(scenes__num_scenes=40, holdout=0), source, 4)
    closed = aspect.assign(settings(scenes__num_scenes=40, holdout=0), source, 40)
    assert set(open_all) == {0, 1, 2}
    assert set(closed) == {1}


def test_mixtures_keep_their_weights():
    parts = tuple({"source": "scenes", "num_scenes": n, "weight": w} for n, w in ((200, 1.0), (50, 3.0)))
    chosen = settings(source="mixture", mixture=parts, holdout=0)
    source = data.make_source(chosen)
    steps, bucket_of, epoch = steps_of(chosen, source)
    seen = np.array([record for step in range(2 * epoch) for _, record in steps(step)])
    assert abs(np.mean(seen >= 200) - 0.75) < 0.05
    weights = np.where(np.arange(250) < 200, 0.25 / 200, 0.75 / 50)
    expected = np.bincount(bucket_of, weights=weights)
    np.testing.assert_allclose(np.bincount(bucket_of[seen]) / len(seen), expected, atol=0.05)


def test_order_stays_as_it_was():
    # These numbers are the contract with runs that resume.
    parts = tuple({"source": "scenes", "num_scenes": n, "weight": w} for n, w in ((200, 1.0), (50, 3.0), (333, 0.1)))
    for chosen, expected in (
        (settings(), [23, 244, 5, 71, 254]),
        (settings(source="mixture", mixture=parts, seed=4), [45, 14, 228, 66, 242]),
    ):
        steps, _, epoch = steps_of(chosen, data.make_source(chosen), batch_size=12, rows=range(12))
        assert [epoch, *(steps(step)[row][1] for step, row in ((0, 0), (7, 11), (21, 3), (1000, 5)))] == expected


def test_large_sets_are_kept_in_a_file_and_in_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path))
    chosen = settings()
    source = data.make_source(chosen)
    steps, plain, _ = steps_of(chosen, source)
    expected = [steps(step) for step in range(40)]
    monkeypatch.setattr(aspect, "_KEPT_FROM", 1)
    monkeypatch.setattr(aspect, "_CHUNK", 16)
    for _ in range(2):
        steps, kept, _ = steps_of(chosen, source)
        assert [steps(s) for s in range(40)] == expected
        assert np.array_equal(kept[:], plain)
        [file] = (tmp_path / "buckets").iterdir()
        assert len(pickle.dumps(kept)) < 300
        monkeypatch.setattr(aspect, "record_sizes", None)  # not asked again
    file.write_bytes(file.read_bytes()[:-9])
    monkeypatch.undo()
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(aspect, "_KEPT_FROM", 1)
    assert np.array_equal(aspect.assign(chosen, source, 8)[:], plain)  # a truncated file is made again


def test_batches_have_their_bucket_s_shape_and_sizes():
    chosen = settings()
    source = data.make_source(chosen)
    batches = data.make_train_iterator(chosen, source, batch_size=8, rows=[1, 6], start_step=0)
    shapes = set()
    for _ in range(12):
        batch = next(batches)
        height, width = batch["image"].shape[1:3]
        shapes.add((height, width))
        np.testing.assert_array_equal(batch["size"][:, :2], source.sizes(batch["record"]))
        np.testing.assert_allclose(batch["size"][:, 2], round(height / width, 2))
        assert batch["weight"].all()
        assert all(batch["caption"])
    batches.close()
    assert shapes == {(12, 20), (16, 16), (20, 12)}
    held = data.read_batch(chosen, source, order.holdout_records(chosen, source)[:4])
    assert held["image"].shape == (4, 16, 16, 3)
    assert set(held["size"][:, 2]) == {1.0}


def test_scenes_with_shapes_see_more_and_squares_are_as_before():
    wide = ScenesSource(9, 32, ratios=(0.5, 0.5)).read(3)
    assert wide.shape == (23, 45, 3)
    square = ScenesSource(9, 32).read(3)
    assert np.array_equal(ScenesSource(9, 32, ratios=(1.0, 1.0)).read(3), square)
    middle = Image.fromarray(wide[:, 11:34]).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(middle, int) - square).mean() < 12  # the middle of it is the square picture


def png(height, width, orientation=1):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, format="PNG", exif=exif)
    return buffer.getvalue()


def test_pictures_are_covered_and_cut_in_the_middle():
    pixels, own = decode.decode_cover(png(20, 80), 10, 20)
    assert (pixels.shape, own) == ((10, 20, 3), (20, 80))
    ramp = pixels[5, :, 0].astype(int)
    assert 60 < ramp[0] < 70 < 185 < ramp[-1] < 195  # the middle half of 0 .. 255
    turned, own = decode.decode_cover(png(20, 80, orientation=6), 20, 10)
    assert (turned.shape, own) == ((20, 10, 3), (80, 20))
    assert 60 < turned[0, 5, 0] < turned[-1, 5, 0] < 195
    larger, own = decode.decode_cover(png(4, 8), 16, 16)
    assert (larger.shape, own) == ((16, 16, 3), (4, 8))


def test_sizes_come_from_headers_once(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in {
        "a": png(10, 40),
        "b": png(10, 40, orientation=6),
        "c": b"no picture",
        "d": png(9, 9),
    }.items():
        (folder / f"{name}.png").write_bytes(content)
        (folder / f"{name}.txt").write_text(name)
    chosen = settings(source="folder", path=str(folder), holdout=0)
    monkeypatch.setenv("LUMOS_JAX_CACHE", str(tmp_path / "index"))
    source = data.make_source(chosen)
    sizes = aspect.record_sizes(source)(0, 4)
    assert sizes.tolist() == [[10, 40], [40, 10], [0, 0], [9, 9]]
    assert aspect.assign(chosen, source, 1).tolist() == [0, 2, 1, 1]
    assert [p.name for p in (tmp_path / "index" / "sizes").iterdir()] == [f"{source.fingerprint()}.npy"]
    monkeypatch.setattr(aspect, "size_of", None)  # not asked again
    assert np.array_equal(aspect.record_sizes(source)(0, 4), sizes)
    records = [(folder / "a.png").read_bytes(), (folder / "d.png").read_bytes()]
    monkeypatch.undo()
    data.write_arrayrecord(tmp_path / "x.arrayrecord", records)
    shards = settings(source="arrayrecord", path=str(tmp_path), holdout=0)
    assert aspect.record_sizes(data.make_source(shards))(0, 2).tolist() == [[10, 40], [9, 9]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_type": "image"}, "go with sample_type=captioned"),
        ({"crop": "random"}, "crop=center, and not with a cache"),
        ({"source": "cached", "path": "x"}, "not with a cache"),
        ({"aspect_ratios": (1.2, 2.0)}, "least <= 1 <= most"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config.validate(config.Settings(data=settings(**fields)))
