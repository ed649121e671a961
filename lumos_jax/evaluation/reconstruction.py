"""Samples compared with known true images, pixel by pixel: PSNR and SSIM.

    PSNR = 10 log10(L^2 / mean((x - y)^2))                                                                           (1)
    SSIM = mean of (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2))                      (2)

with L = 1 the range of values, C1 = (0.01 L)^2, C2 = (0.03 L)^2, and m, s^2, s_xy the means, variances and the covariance under
a Gaussian window of 11 x 11 pixels and sigma 1.5, at the positions where the whole window lies inside the image. (2) is Wang et
al. 2004, "Image quality assessment"; for color images it is averaged over channels, as scikit-image does with
gaussian_weights=True and use_sample_covariance=False. float64 throughout.

Axes: B images, F frames, H height, W width, 3 colors.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from lumos_jax.evaluation.flow import end_point_error, has_optical_flow, optical_flow

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
EQUAL_PSNR = 100.0  # decibels, in place of infinity, which would spoil a mean


def psnr(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image, (B,) float64 in decibels; infinite where it equals the truth. images, truth:
    (B, H, W, 3), each uint8, or floating in [0, 1].

    Raises:
      ValueError: shapes that differ or are not images, another dtype, values outside [0, 1].
    """
    x, y = _pair(images, truth)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(((x - y) ** 2).mean((1, 2, 3)))


def ssim(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of each image, (B,) float64, at most 1; else as `psnr`, for sides of 11 pixels or more."""
    x, y = _pair(images, truth)
    if min(x.shape[1:3]) < WINDOW:
        raise ValueError(f"images of {x.shape[1]} x {x.shape[2]} pixels: SSIM needs {WINDOW} x {WINDOW} or more")
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return (above / below).mean((1, 2, 3))


def reconstruction_scores(
    samples: np.ndarray, truth: np.ndarray, names: Collection[str] = ("psnr", "ssim", "flow_error")
) -> dict[str, np.ndarray]:
    """Scores of each sample, (B,) each: `psnr` in decibels (100 where equal); `ssim`, of images of 11 pixels a side or more;
    and of clips, over whose frames both are averaged, `flow_error`: the end-point error between the optical flows, in pixels.

    samples, truth: uint8 (B, H, W, 3), or clips (B, F, H, W, 3). names: of those to compute, where samples can have them.
    """
    rows, flat = len(samples), (-1, *samples.shape[-3:])

    def of_rows(metric):
        return metric(samples.reshape(flat), truth.reshape(flat)).reshape(rows, -1)

    scores = {}
    if "psnr" in names:
        scores["psnr"] = np.minimum(of_rows(psnr), EQUAL_PSNR).mean(axis=1)
    if "ssim" in names and min(samples.shape[-3:-1]) >= WINDOW:
        scores["ssim"] = of_rows(ssim).mean(axis=1)
    if "flow_error" in names and samples.ndim == 5 and has_optical_flow():
        pairs = zip(samples, truth, strict=True)
        flows = [(optical_flow(clip), optical_flow(true)) for clip, true in pairs]
        scores["flow_error"] = np.array([end_point_error(*pair) for pair in flows])
    return scores


def _pair(images: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if np.shape(images) != np.shape(truth) or np.ndim(truth) != 4 or np.shape(truth)[3] != 3:
        raise ValueError(f"images {np.shape(images)} and truth {np.shape(truth)} must both be (B, H, W, 3)")
    return _unit(images, "images"), _unit(truth, "truth")


def _unit(images: np.ndarray, name: str) -> np.ndarray:
    images, rule = np.asarray(images), "give uint8, or floating-point values in [0, 1]"
    if images.dtype == np.uint8:
        return images / 255.0
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{name} are {images.dtype}: {rule}")
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError(f"{name} have values from {images.min():.4g} to {images.max():.4g}: {rule}")
    return images.astype(np.float64)


def _blur(images: np.ndarray) -> np.ndarray:
    """Gaussian means (B, H - 10, W - 10, 3)."""
    from scipy import ndimage  # takes a quarter of a second, which no start of a run need pay

    radius = WINDOW // 2
    means = ndimage.gaussian_filter(images, SIGMA, radius=radius, axes=(1, 2))
    return means[:, radius:-radius, radius:-radius]
