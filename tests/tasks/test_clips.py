"""Clips: what is written is what a decoder reads back."""

import importlib.util

import av
import numpy as np
import pytest
from PIL import Image

from lumos_jax.tasks import clips


@pytest.fixture
def frames():
    """Six frames of a ramp that gets brighter, with sides that H.264 cannot have."""
    ramp = np.linspace(0, 120, 33)[None, None, :, None] + 20 * np.arange(6)[:, None, None, None]
    return np.broadcast_to(ramp, (6, 35, 33, 3)).astype(np.uint8)


def test_gif_keeps_frames_and_their_time(frames, tmp_path):
    clips.save_gif(frames, tmp_path / "deep" / "a.gif", fps=5)
    with Image.open(tmp_path / "deep" / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"], image.info["loop"]) == (6, (33, 35), 200, 0)
        image.seek(4)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frames[4]).max() <= 4
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.gif"]


def test_mp4_plays_back(frames, tmp_path):
    clips.save_mp4(frames, tmp_path / "a.mp4", fps=12.5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 12.5)
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert read.shape == (6, 36, 34, 3)
    assert np.abs(read[:, :35, :33].astype(int) - frames).mean() < 4


def test_without_pyav_there_is_a_gif_and_a_line_that_says_so(frames, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    assert clips.save(frames, str(tmp_path / "a.png")) == [f"{tmp_path}/a.gif"]
    assert capsys.readouterr().err == f"{tmp_path}/a.mp4 is not written: MP4 needs PyAV, pip install '.[video]'\n"
    with pytest.raises(ValueError, match=r"a\.mp4 is not written: .*'\.\[video\]'; .*a\.gif holds the same"):
        clips.save(frames, str(tmp_path / "a.mp4"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]
