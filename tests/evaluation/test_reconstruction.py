"""PSNR and SSIM against values worked out by hand and against the window written out in full."""

import math

import numpy as np
import pytest

from lumos_jax.evaluation import reconstruction


def noise(seed, *shape):
    return np.random.default_rng(seed).random(shape)


def test_psnr_of_known_errors():
    truth = np.full((2, 4, 5, 3), 100, np.uint8)
    images = truth + np.array([51, 1], np.uint8)[:, None, None, None]  # a fifth of the range, and the least step
    np.testing.assert_allclose(reconstruction.psnr(images, truth), [10 * math.log10(25), 20 * math.log10(255)])
    half = truth.copy()
    half[0, :2] = 151  # the same error on half of the pixels: 3.01 dB more
    np.testing.assert_allclose(reconstruction.psnr(half, truth)[0], 10 * math.log10(50))
    assert reconstruction.psnr(truth, truth)[0] == math.inf


def test_bytes_and_floats_are_the_same_images():
    a, b = ((noise(i, 2, 16, 16, 3) * 255).astype(np.uint8) for i in range(2))
    for metric in (reconstruction.psnr, reconstruction.ssim):
        np.testing.assert_allclose(metric(a, b / 255), metric(a, b), rtol=1e-12)


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b = np.full((1, 11, 13, 3), 0.2), np.full((1, 11, 13, 3), 0.7)
    expected = (2 * 0.2 * 0.7 + 1e-4) / (0.2**2 + 0.7**2 + 1e-4)
    np.testing.assert_allclose(reconstruction.ssim(a, b), [expected], rtol=1e-9)


def test_ssim_by_its_definition():
    """Every window summed pixel by pixel, with moments about the mean."""
    a, b = noise(0, 1, 13, 12, 3), noise(1, 1, 13, 12, 3)
    b = 0.6 * a + 0.4 * b
    offsets = [(i, j) for i in range(11) for j in range(11)]
    weights = np.array([math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for i, j in offsets])
    weights /= weights.sum()
    values = []
    for top in range(3):
        for left in range(2):
            for channel in range(3):
                x, y = (np.array([p[0, top + i, left + j, channel] for i, j in offsets]) for p in (a, b))
                mx, my = weights @ x, weights @ y
                vx, vy, cov = weights @ (x - mx) ** 2, weights @ (y - my) ** 2, weights @ ((x - mx) * (y - my))
                values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    np.testing.assert_allclose(reconstruction.ssim(a, b), [np.mean(values)], rtol=1e-9)
    np.testing.assert_allclose(reconstruction.ssim(a, a), [1.0], rtol=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 16, 16, 3)), np.zeros((1, 16, 17, 3)), r"must both be \(B, H, W, 3\)"),
        (np.zeros((16, 16, 3)), np.zeros((16, 16, 3)), r"must both be \(B, H, W, 3\)"),
        (np.zeros((1, 16, 16, 3)), np.full((1, 16, 16, 3), -1.0), "truth have values from -1 to -1"),
        (np.zeros((1, 16, 16, 3), np.int32), np.zeros((1, 16, 16, 3)), "images are int32"),
        (np.zeros((1, 10, 16, 3)), np.zeros((1, 10, 16, 3)), "10 x 16 pixels: SSIM needs 11 x 11"),
    ],
)
def test_what_is_no_pair_of_images_is_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        reconstruction.ssim(a, b)


def test_scores_of_clips_are_averaged_over_frames():
    truth = np.random.default_rng(0).integers(0, 200, (2, 3, 16, 16, 3)).astype(np.uint8)  # two clips of three frames
    near = truth.copy()
    near[1] += np.uint8(10)
    scores = reconstruction.reconstruction_scores(near, truth)
    np.testing.assert_allclose(scores["psnr"], [100, 20 * math.log10(25.5)], rtol=1e-6)
    assert scores["ssim"][0] == 1
    assert 0.9 < scores["ssim"][1] < 1
    assert scores["flow_error"][0] == 0
    assert set(reconstruction.reconstruction_scores(near[:, 0, :8], truth[:, 0, :8])) == {"psnr"}
