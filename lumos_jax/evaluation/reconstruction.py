"""How near pictures are to what they should show, pixel by pixel: PSNR and SSIM.

    PSNR = 10 log10(L^2 / mean((x - y)^2))                                                                           (1)
    SSIM = mean of (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2))                      (2)

with L = 1 the range of values, C1 = (0.01 L)^2, C2 = (0.03 L)^2, and m, s^2, s_xy the means, variances and the covariance under
a Gaussian window of 11 x 11 pixels and sigma 1.5, at the places where all of the window lies inside the picture. (2) is Wang et
al. 2004, "Image quality assessment"; of a colour picture it is taken channel by channel and averaged, as scikit-image does with
gaussian_weights=True and use_sample_covariance=False. float64 throughout.

Axes: B pictures, H height, W width, 3 colours.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(pictures: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture, (B,) float64 in decibels; infinite where picture and truth are equal.

    Args:
      pictures, truth: (B, H, W, 3), each uint8, or floating in [0, 1].

    Raises:
      ValueError: shapes that differ or are no pictures, another dtype, values outside [0, 1].
    """
    x, y = _pair(pictures, truth)
    error = ((x - y) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)


def ssim(pictures: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of each picture, (B,) float64, at most 1.

    Args:
      pictures, truth: (B, H, W, 3), each uint8, or floating in [0, 1]; at least 11 pixels a side.

    Raises:
      ValueError: as `psnr`; or pictures smaller than the window.
    """
    x, y = _pair(pictures, truth)
    if min(x.shape[1:3]) < WINDOW:
        raise ValueError(f"pictures of {x.shape[1]} x {x.shape[2]} pixels: SSIM needs {WINDOW} x {WINDOW} or more")
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return (above / below).mean((1, 2, 3))


def _pair(pictures: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if np.shape(pictures) != np.shape(truth) or np.ndim(truth) != 4 or np.shape(truth)[3] != 3:
        raise ValueError(f"pictures {np.shape(pictures)} and truth {np.shape(truth)} must both be (B, H, W, 3)")
    return _unit(pictures, "pictures"), _unit(truth, "truth")


def _unit(pictures: np.ndarray, name: str) -> np.ndarray:
    pictures = np.asarray(pictures)
    if pictures.dtype == np.uint8:
        return pictures / 255.0
    if not np.issubdtype(pictures.dtype, np.floating):
        raise ValueError(f"{name} are {pictures.dtype}: give uint8, or floating-point values in [0, 1]")
    pictures = pictures.astype(np.float64)
    if not ((pictures >= 0) & (pictures <= 1)).all():
        low, high = pictures.min(), pictures.max()
        raise ValueError(
            f"{name} have values from {low:.4g} to {high:.4g}: give uint8, or floating-point values in [0, 1]"
        )
    return pictures


def _blur(pictures: np.ndarray) -> np.ndarray:
    """Gaussian means (B, H - 10, W - 10, 3)."""
    radius = WINDOW // 2
    means = ndimage.gaussian_filter(pictures, SIGMA, radius=radius, axes=(1, 2))
    return means[:, radius:-radius, radius:-radius]
