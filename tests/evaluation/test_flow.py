"""Flow of images that move in known ways, and its error by hand."""

import sys

import numpy as np
import pytest

from lumos_jax.evaluation import flow
from lumos_jax.scenes.render import render
from lumos_jax.scenes.scene import make_scene


def turned(angle, side=64):
    """A smooth pattern turned about the middle by `angle`, and the pixels' coordinates from the middle."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = cos * x + sin * y, cos * y - sin * x
    gray = 127 + 60 * np.sin(u / 3.1) * np.cos(v / 3.7) + 50 * np.sin((u + 2 * v) / 5.3)
    return np.repeat(gray.astype(np.uint8)[..., None], 3, -1), x, y


def test_flow_of_a_shifted_scene():
    scene = make_scene(12)
    large = render(scene, 72)
    for right, down in ((2, 1), (-3, 0), (0, 2)):
        frames = np.stack([large[4:68, 4:68], large[4 - down : 68 - down, 4 - right : 68 - right]])
        found = flow.optical_flow(frames)
        assert found.shape == (1, 64, 64, 2)
        solid = np.zeros((1, 64, 64), bool)
        solid[:, 16:48, 16:48] = True  # a plain ground around it has no texture to follow
        truth = np.broadcast_to(np.array([right, down], np.float32), found.shape)
        assert flow.end_point_error(found[solid], truth[solid]) < 0.35
        assert flow.end_point_error(np.zeros_like(found)[solid], truth[solid]) == pytest.approx(np.hypot(right, down))


def test_flow_of_a_turning_pattern():
    angle = 0.05
    (first, x, y), (second, _, _) = turned(0), turned(angle)
    truth = np.stack([(np.cos(angle) - 1) * x - np.sin(angle) * y, np.sin(angle) * x + (np.cos(angle) - 1) * y], -1)
    found = flow.optical_flow(np.stack([first, second]))[0]
    inside = np.hypot(x, y) < 26
    assert flow.end_point_error(found[inside], truth[inside]) < 0.15
    assert flow.end_point_error(found[inside], -truth[inside]) > 1


def test_end_point_error_by_hand():
    a, b = np.zeros((2, 2, 2)), np.zeros((2, 2, 2))
    b[0, 0], b[1, 1] = (3, 4), (0, 1)
    assert flow.end_point_error(a, b) == 1.5


def test_what_is_no_flow_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="two frames or more"):
        flow.optical_flow(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"must both be \(\.\.\., 2\), and not empty"):
        flow.end_point_error(np.zeros((8, 8, 2)), np.zeros((8, 9, 2)))
    with pytest.raises(ValueError, match="not empty"):
        flow.end_point_error(np.zeros((0, 2)), np.zeros((0, 2)))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ModuleNotFoundError, match="needs OpenCV"):
        flow.optical_flow(np.zeros((2, 8, 8, 3), np.uint8))
