"""The forecast of a sample: what it counts, scaled by what it left out."""

import dataclasses

import numpy as np
import pytest

from lumos_jax.preparation import forecast
from lumos_jax.preparation.plan import Plan
from lumos_jax.preparation.readers import Input
from lumos_jax.preparation.scan import Done
from lumos_jax.preparation.settings import Prepare, Prices, Source


def test_a_sample_of_inputs_and_of_images_is_scaled_to_the_whole():
    settings = Prepare(
        sources=(Source(kind="folder", path="/a", name="a"), Source(kind="folder", path="/b", name="b")), sample=0.25
    )
    inputs = tuple(Input(i, "a" if i < 2 else "b", "folder", f"/{i}", 100, "") for i in range(3))
    # Of a, two of eight input files of 100 bytes: 10 + 30 images, of which 3 + 9 are in the sample; 6 are kept.
    made = Plan(settings, inputs, ((0,), (1,), (2,)), "", {"a": (8, 800), "b": (1, 100)})
    blank = Done(rows=0, read=0, sha256="", reasons={}, bytes=0, failed=(), seconds=0.0, decode_seconds=0.0)
    done = [
        dataclasses.replace(blank, rows=3, read=10, seconds=5.0, decode_seconds=1.0),
        dataclasses.replace(blank, rows=9, read=30, seconds=7.0, decode_seconds=2.0),
        dataclasses.replace(blank, rows=1, read=4, seconds=1.0, decode_seconds=1.0),
    ]
    a, b, all_of_them = forecast.make(made, done, np.array([[2, 20], [4, 70], [0, 0]]))
    assert (a.files, a.read_bytes, a.candidates) == (8, 800, 160)
    assert (a.kept, a.kept_bytes) == (160 * 6 / 12, 160 * 90 / 12)
    # Reading is the same for a sample, measuring is four times as much for the whole.
    assert a.core_hours * 3600 == pytest.approx(4 * (4 + 5 + 4 * (1 + 2)))
    assert (b.candidates, b.kept) == (4, 0)
    assert all_of_them.candidates == 164
    assert all_of_them.core_hours == a.core_hours + b.core_hours
    once, monthly = dataclasses.replace(a, core_hours=2, read_bytes=3e9, kept_bytes=5e9).dollars(Prices(0.5, 0.1, 1.0))
    assert (once, monthly) == (2 * 0.5 + 3 * 1.0, 5 * 0.1)
