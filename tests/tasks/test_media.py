"""Image grids, and files: a decoder reads back what was written."""

import importlib.util

import av
import numpy as np
import pytest
from PIL import Image

from lumos_jax import fileio
from lumos_jax.tasks import media, sampling


@pytest.fixture
def frames():
    """Six frames of a ramp that gets brighter, with sides that H.264 cannot have."""
    ramp = np.linspace(0, 120, 33)[None, None, :, None] + 20 * np.arange(6)[:, None, None, None]
    return np.broadcast_to(ramp, (6, 35, 33, 3)).astype(np.uint8)


def test_gif_keeps_frames_and_their_time(frames, tmp_path):
    media.save_gif(frames, tmp_path / "deep" / "a.gif", fps=5)
    with Image.open(tmp_path / "deep" / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"], image.info["loop"]) == (6, (33, 35), 200, 0)
        image.seek(4)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frames[4]).max() <= 4
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.gif"]


def test_mp4_plays_back(frames, tmp_path):
    media.save_mp4(frames, tmp_path / "a.mp4", fps=12.5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 12.5)
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert read.shape == (6, 36, 34, 3)
    assert np.abs(read[:, :35, :33].astype(int) - frames).mean() < 4


def test_a_grid_places_rows_and_columns_and_enlarges_small_images(tmp_path):
    rows = np.zeros((2, 3, 8, 8, 3), np.uint8)
    rows[1, 2] = (10, 200, 30)
    sheet = media.image_grid(rows, gap=1, min_side=16)
    assert sheet.shape == (2 * (16 + 2) + 2, 3 * (16 + 2) + 2, 3)
    assert tuple(sheet[-4, -4]) == (10, 200, 30)
    assert tuple(sheet[4, 4]) == (0, 0, 0)
    assert tuple(sheet[0, 0]) == (255, 255, 255)
    fileio.save_png(sheet, tmp_path / "deep" / "sheet.png")
    with Image.open(tmp_path / "deep" / "sheet.png") as image:
        assert np.array_equal(np.asarray(image), sheet)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["sheet.png"]


def test_to_uint8_rounds_and_clips():
    assert list(np.asarray(sampling.to_uint8(np.array([-2.0, -1.0, 0.0, 1.0, 2.0])))) == [0, 0, 128, 255, 255]


def test_titles_stand_above_their_rows_and_are_cut():
    rows = np.zeros((2, 1, 128, 128, 3), np.uint8)
    plain = media.image_grid(rows)
    titled = media.image_grid(rows, titles=["short", "far too long a title " * 20])
    assert titled.shape[1] == plain.shape[1]
    assert titled.shape[0] - plain.shape[0] == 2 * 2 + 16 + 3 * 16  # margins, one line, three lines
    assert titled[:18].min() < 100  # something is written there
    assert np.array_equal(titled[18 + 2 : 18 + 130], plain[2:130])


def test_without_pyav_there_is_a_gif_and_a_line_that_says_so(frames, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    assert media.save_clip(frames, str(tmp_path / "a.png")) == [f"{tmp_path}/a.gif"]
    assert capsys.readouterr().err == "no MP4 is written: it needs PyAV, pip install '.[video]'\n"
    with pytest.raises(ValueError, match=r"a\.mp4: MP4 needs PyAV, pip install '.\[video\]'"):
        media.clip_files(str(tmp_path / "a.mp4"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


def test_what_cannot_be_written_is_refused_before(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out=x cannot be written: File exists"):
        media.check_writable(tmp_path / "file" / "x.png", "--out=x")
    with pytest.raises(ValueError, match=r"is a folder; give the name of a file"):
        media.check_writable(tmp_path, "--out=x")
    media.check_writable(tmp_path / "new" / "x.png", "--out=x")
    assert list((tmp_path / "new").iterdir()) == []
