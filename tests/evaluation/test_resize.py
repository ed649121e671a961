"""Resizing as the reference implementations do it."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lumos_jax.evaluation.networks import resize as resizes


@pytest.mark.parametrize(("height", "width"), [(20, 12), (70, 9)])
def test_bicubic_is_pillow_s(height, width):
    # Sizes at which Pillow 13, too, resizes widths first.
    image = np.random.default_rng(0).integers(0, 256, (37, 24, 3), np.uint8)
    made = resizes.resize(jnp.asarray(image, jnp.float32), height, width, "bicubic", round_uint8=True)
    theirs = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(made - theirs).max() <= 1  # Pillow's weights have 22 bits: a tie may go the other way
    assert (made != theirs).mean() < 1e-3
    made = resizes.resize(jnp.asarray(image, jnp.float32), height, width, "bicubic")
    for channel in range(3):
        one = Image.fromarray(image[..., channel].astype(np.float32))
        theirs = np.asarray(one.resize((width, height), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(made[..., channel], theirs, atol=1e-3)


@pytest.mark.parametrize(
    ("kernel", "source", "expected"),
    [
        ("tf1", [0, 8], [0, 4, 8, 8]),
        ("bilinear", [0, 8], [0, 2, 6, 8]),
        ("tf1", [0, 8, 16, 24, 32, 40], [0, 12, 24, 36]),
        ("bilinear", [0, 8, 16, 24, 32, 40], [2, 14, 26, 38]),
    ],
)
def test_bilinear_kernels_take_two_neighbors(kernel, source, expected):
    column = jnp.asarray(source, jnp.float32)[:, None, None]
    np.testing.assert_allclose(resizes.resize(column, 4, 1, kernel)[:, 0, 0], expected, atol=1e-5)
    row = column.transpose(1, 0, 2)
    np.testing.assert_allclose(resizes.resize(row, 1, 4, kernel)[0, :, 0], expected, atol=1e-5)


def test_crops_are_centered():
    image = jnp.arange(4 * 7, dtype=jnp.float32).reshape(4, 7, 1)
    np.testing.assert_array_equal(resizes.center_square(image), image[:, 1:5])
    assert resizes.shorter_side(image, 8).shape == (8, 14, 1)
