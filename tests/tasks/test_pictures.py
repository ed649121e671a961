"""Sheets of pictures and their file."""

import numpy as np
from PIL import Image

from lumos_jax.tasks import pictures, sampling


def test_sheet_places_rows_and_columns_and_enlarges_small_pictures(tmp_path):
    rows = np.zeros((2, 3, 8, 8, 3), np.uint8)
    rows[1, 2] = (10, 200, 30)
    sheet = pictures.sheet(rows, gap=1, min_side=16)
    assert sheet.shape == (2 * (16 + 2) + 2, 3 * (16 + 2) + 2, 3)
    assert tuple(sheet[-4, -4]) == (10, 200, 30)
    assert tuple(sheet[4, 4]) == (0, 0, 0)
    assert tuple(sheet[0, 0]) == (255, 255, 255)
    pictures.save_png(sheet, tmp_path / "deep" / "sheet.png")
    with Image.open(tmp_path / "deep" / "sheet.png") as image:
        assert np.array_equal(np.asarray(image), sheet)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["sheet.png"]


def test_to_uint8_rounds_and_clips():
    assert list(np.asarray(sampling.to_uint8(np.array([-2.0, -1.0, 0.0, 1.0, 2.0])))) == [0, 0, 128, 255, 255]


def test_titles_stand_above_their_rows_and_are_cut():
    rows = np.zeros((2, 1, 128, 128, 3), np.uint8)
    plain = pictures.sheet(rows)
    titled = pictures.sheet(rows, titles=["short", "far too long a title " * 20])
    assert titled.shape[1] == plain.shape[1]
    assert titled.shape[0] - plain.shape[0] == 2 * 2 + 16 + 3 * 16  # margins, one line, three lines
    assert titled[:18].min() < 100  # something is written there
    assert np.array_equal(titled[18 + 2 : 18 + 130], plain[2:130])
