"""Clips: of scenes, with their exact motion, and of real video files, whole and damaged."""

import csv
import dataclasses
import errno
import importlib.util
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from lumos_jax import data, fileio
from lumos_jax.data.records import clip as clips
from lumos_jax.scenes import motion as scene_motion
from lumos_jax.scenes import render as scene_render
from lumos_jax.scenes import scene as scenes
from tests.fields import data_settings

SIZE = 16
GRAY = 4  # of frame n: GRAY * n


def write_video(path, count, fps=24, size=(64, 48), **options):
    """A video whose frame n is gray of value GRAY n; key frames every 12."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "1", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        container.start_encoding()
        for number in range(count):
            frame = np.full((size[1], size[0], 3), GRAY * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def settings(**fields):
    return data_settings(
        **{"sample_type": "clip", "image_size": SIZE, "clips__frames": 4, "clips__frame_stride": (2, 2), **fields}
    )


def videos(path, **fields):
    return settings(source="videos", path=str(path), **fields)


def load(data_settings, records, *, training=False, first=0):
    loader = data.make_loader(data_settings, data.make_source(data_settings), training=training)
    return loader.load_batch([(first + i, record) for i, record in enumerate(records)])


def numbers(frames):
    """Which frames of `write_video` these are."""
    return np.round(frames.mean((-3, -2, -1)) / GRAY).astype(int).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "a.mp4", 50)
    write_video(root / "b.mkv", 50, fps=12)  # this container does not say how many frames it has
    return root


def test_frames_of_videos_are_the_ones_asked_for(folder):
    batch = load(videos(folder), [0, 1])
    assert batch["frames"].shape == (2, 4, SIZE, SIZE, 3)
    assert [numbers(clip) for clip in batch["frames"]] == [[0, 2, 4, 6]] * 2
    assert batch["fps"].tolist() == [12.0, 6.0]
    assert not batch["problem"].any()


def test_training_begins_anywhere_by_the_records_own_numbers(folder):
    wanted = videos(folder, clips__frame_stride=(1, 5))
    batch = load(wanted, [0] * 12 + [1] * 12, training=True)
    found = [numbers(clip) for clip in batch["frames"]]
    strides = {clip[1] - clip[0] for clip in found}
    assert all(np.ptp(np.diff(clip)) == 0 for clip in found)  # evenly spaced, exactly, also after a seek
    assert strides == {1, 2, 3, 4, 5}
    assert len({clip[0] for clip in found}) > 12
    assert max(clip[-1] for clip in found) <= 49
    again = load(wanted, [0], training=True, first=5)
    assert np.array_equal(again["frames"][0], batch["frames"][5])


def test_videos_give_pictures_too(folder):
    batch = load(dataclasses.replace(videos(folder), sample_type="image"), [0])
    assert batch["image"].shape == (1, SIZE, SIZE, 3)
    assert batch["image"].max() == 0


@pytest.fixture(scope="module")
def damaged(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged")
    whole = (folder / "a.mp4").read_bytes()
    (root / "0-whole.mp4").write_bytes(whole)
    (root / "1-empty.mp4").write_bytes(b"")
    (root / "2-text.mp4").write_bytes(b"this is no video" * 99)
    (root / "3-cut.mp4").write_bytes(whole[: len(whole) // 2])
    write_video(root / "4-short.mp4", 6)
    write_video(root / "5-nothing.mkv", 0)
    with av.open(str(root / "6-sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return root


def test_damaged_videos_are_named_and_do_not_count(damaged):
    batch = load(videos(damaged), range(7))
    assert batch["weight"].tolist() == [1, 0, 0, 0, 0, 0, 0]
    for row, reason in {4: "6 frames are too few for 4 with a stride of 2", 5: "no", 6: "no video in it"}.items():
        assert reason in batch["problem"][row]
    for row in range(1, 7):
        assert f"/{row}-" in batch["problem"][row]
    assert not batch["frames"][1:].any()


def numbered_video(path, codec="libx264", rate=24, first=0.0, audio=0.0, count=48):
    """As `write_video`; it begins at `first` seconds, and has a sound track of `audio` seconds."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=rate)
        video.width, video.height, video.pix_fmt, video.codec_context.gop_size = 64, 48, "yuv420p", 12
        if first:
            video.codec_context.time_base = Fraction(1, 1000)
        if audio:
            sound = container.add_stream("aac", rate=16000, layout="mono")
            for at in range(0, int(16000 * audio), 1024):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 16000, at, Fraction(1, 16000)
                container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), GRAY * number, np.uint8), format="rgb24")
            if first:
                frame.pts, frame.time_base = round(1000 * (first + number / rate)), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.mp4", {}), ("x.mov", {"audio": 3.0}), ("x.mp4", {"first": 10.0}), ("x.avi", {"codec": "mpeg4"}),
        ("x.mkv", {}), ("x.mkv", {"audio": 3.0}), ("x.mkv", {"first": 10.0}), ("x.webm", {"codec": "libvpx"}),
        ("x.webm", {"codec": "libvpx", "first": 7.0}), ("x.flv", {"codec": "flv1", "audio": 2.5}),
        ("x.ts", {}), ("x.ts", {"audio": 3.0}), ("x.ts", {"first": 10.0}),
        ("x.mpg", {"codec": "mpeg2video", "rate": 25}), ("x.wmv", {"codec": "wmv2"}),
    ],
)  # fmt: skip
def test_clips_of_any_container_are_where_they_should_be(tmp_path, name, options):
    numbered_video(tmp_path / name, **options)
    source = data.make_source(videos(tmp_path))
    found = [numbers(np.stack(source.clip(0, 4, 3, share / 12, 0).frames)) for share in range(12)]
    gaps = np.diff(found)
    assert np.abs(gaps - 3).max() <= 1, found  # gray levels are rounded by lossy codecs
    starts = [clip[0] for clip in found]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert 30 <= starts[-1] <= 38  # MPEG program streams state a length that is two frames short


def boxes(content, begin, end):
    """name -> bytes of the boxes of an MP4 file."""
    found = {}
    while begin < end:
        size, name = struct.unpack(">I4s", content[begin : begin + 8])
        found[name] = content[begin : begin + size]
        begin += size
    return found


def test_covers_and_missing_decoders(tmp_path):
    numbered_video(tmp_path / "x.mp4")
    with av.open(str(tmp_path / "cover.mp4"), "w") as out, av.open(str(tmp_path / "x.mp4")) as given:
        copy = out.add_stream_from_template(given.streams.video[0])
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        image = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8), format="rgb24")
        out.mux(cover.encode(image.reformat(format="yuvj420p")) + cover.encode(None))
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
    whole = (tmp_path / "cover.mp4").read_bytes()
    movie = boxes(whole, 0, len(whole))[b"moov"]
    inner = boxes(movie, 8, len(movie))
    assert b"covr" in inner[b"udta"]
    first = movie[:8] + b"".join(inner.pop(name) for name in (b"mvhd", b"udta")) + b"".join(inner.values())
    (tmp_path / "cover.mp4").write_bytes(whole.replace(movie, first))  # the cover stands before the video
    with av.open(str(tmp_path / "cover.mp4")) as given:
        assert given.streams.video[0].width == 32
    (tmp_path / "z.mp4").write_bytes((tmp_path / "x.mp4").read_bytes().replace(b"avc1", b"zzzz"))
    batch = load(videos(tmp_path, clips__frame_stride=(3, 3)), range(3))
    assert batch["weight"].tolist() == [1, 1, 0], batch["problem"]
    assert [numbers(clip) for clip in batch["frames"][:2]] == [[0, 3, 6, 9]] * 2
    assert "z.mp4: FFmpeg has no decoder" in batch["problem"][2]


def test_videos_never_wait_and_a_failing_system_is_no_corrupt_record(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.mp4")
    table = write_csv(tmp_path / "list.csv", ("video",), ("pipe.mp4",), ("playlist.ts",))
    # FFmpeg would open what a playlist names.
    (tmp_path / "playlist.ts").write_text("#EXTM3U\n#EXTINF:1,\nhttp://192.0.2.1/a.ts\n")
    batch = load(videos(table), [0, 1])
    assert batch["weight"].tolist() == [0, 0]
    assert "a pipe or a device" in batch["problem"][0]
    (tmp_path / "pipe.mp4").unlink()
    write_video(tmp_path / "pipe.mp4", 20)

    def full(*arguments, **more):
        raise av.FFmpegError(errno.EMFILE, "Too many open files", "pipe.mp4")

    monkeypatch.setattr(fileio, "delays", lambda retries: [0.0])
    monkeypatch.setattr(av, "open", full)
    with pytest.raises(OSError, match=r"pipe\.mp4 cannot be read: Too many open files"):
        load(videos(table), [0])


def write_csv(path, columns, *rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_webvid_and_openvid_tables(tmp_path):
    (tmp_path / "videos" / "p0").mkdir(parents=True)
    write_video(tmp_path / "videos" / "p0" / "7.mp4", 10)
    write_video(tmp_path / "videos" / "x.mp4", 10)
    webvid = write_csv(
        tmp_path / "webvid.csv", ("videoid", "name", "page_dir"), (7, "a\ncaption", "p0"), (8, "b", "p1")
    )
    batch = load(videos(webvid), [0, 1])
    assert batch["weight"].tolist() == [1, 0]
    assert "p1/8.mp4" in batch["problem"][1]
    columns = ("video", "caption", "aesthetic score", "motion score", "fps", "seconds")
    openvid = write_csv(tmp_path / "openvid.csv", columns, ("x.mp4", "c", 5.1, 3.25, 24, 0.4))
    assert load(videos(openvid), [0])["motion"].tolist() == [3.25]
    assert data.make_source(videos(webvid)).fingerprint() != data.make_source(videos(openvid)).fingerprint()


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        (("id", "caption"), (1, "a"), "has the columns id, caption; needed are videoid and page_dir"),
        (("video", "motion score"), ("x.mp4", "fast"), "line 2: motion score is 'fast', not a number"),
        (("videoid", "page_dir"), (7, ""), "line 2: videoid and page_dir must not be empty"),
    ],
)
def test_tables_of_other_columns_are_refused(tmp_path, columns, row, message):
    path = write_csv(tmp_path / "table.csv", columns, row)
    with pytest.raises(ValueError, match=message):
        data.make_source(videos(path))


def test_folders_without_videos_point_at_the_table(tmp_path):
    write_csv(tmp_path / "table.csv", ("video",), ("x.mp4",))
    with pytest.raises(ValueError, match=r"holds? no videos.*as .*table\.csv"):
        data.make_source(videos(tmp_path))
    with pytest.raises(ValueError, match="neither a directory nor a csv"):
        data.make_source(videos(tmp_path / "absent"))


def test_sources_without_clips_are_refused(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    parts = ({"source": "scenes", "weight": 1}, {"source": "folder", "path": str(tmp_path), "weight": 1})
    mixed = settings(source="mixture", mixture=parts)
    with pytest.raises(ValueError, match=r"a\.png \.\.\. have no clips"):
        data.make_loader(mixed, data.make_source(mixed), training=True)
    long = settings(clips__frames=16, clips__frame_stride=(2, 4))
    with pytest.raises(ValueError, match="a scene's clip has 49 frames"):
        data.make_loader(long, data.make_source(long), training=True)


def test_pictures_in_between_come_at_the_same_steps_wherever_a_run_begins():
    wanted = settings(scenes__num_scenes=64, clips__image_step_fraction=0.4, holdout=2)
    source = data.make_source(wanted)

    def batches(start, rows, count):
        made = data.make_train_iterator(wanted, source, batch_size=4, rows=rows, start_step=start)
        read = [next(made) for _ in range(count)]
        made.close()
        return read

    whole = batches(0, range(4), 10)
    assert ["image" in batch for batch in whole] == [False, False, True, False, True] * 2
    for batch, again in zip(whole[3:6], batches(3, [1, 3], 3), strict=True):
        for name, array in again.items():
            np.testing.assert_array_equal(array, batch[name][[1, 3]])
    records = np.concatenate([batch["record"] for batch in whole])
    assert len(set(records)) == 40  # the order of records takes no notice
    assert [clips.is_image_step(step, 0.0) for step in range(9)] == [False] * 9


def scene_that_moves(what):
    return next(s for s in map(scenes.make_scene, range(99)) if s.motion == what and len(s.solids) > 1)


@pytest.mark.parametrize("what", ["camera", "solids"])
def test_exact_flow_carries_one_frame_to_the_next(what):
    scene, size = scene_that_moves(what), 64
    before, after = (scene_render.render(scene, size, time=t).astype(float) for t in (0.2, 0.4))
    flow = scene_motion.flow(scene, 0.2, 0.4, size)
    at = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1) + np.round(flow).astype(int)
    inside = ((at >= 0) & (at < size)).all(-1) & (np.linalg.norm(flow, axis=-1) > 0.5)
    x, y = np.clip(at, 0, size - 1)[inside].T
    moved, still = np.abs(after[y, x] - before[inside]).mean(), np.abs(after - before)[inside].mean()
    assert moved < 0.7 * still, (moved, still)


def test_motion_scores_of_scenes():
    batch = load(settings(clips__frames=6, clips__frame_stride=(3, 3)), range(24))
    assert batch["fps"].tolist() == [8.0] * 24
    assert (batch["motion"] > 0).all()
    flow = scene_motion.flow(scenes.make_scene(0), 0, 12 / 48, scene_motion.SCORE_SIDE)  # frames 0 and 4 of 0, 3, 6 ...
    np.testing.assert_allclose(batch["motion"][0], np.linalg.norm(flow, axis=-1).mean(), rtol=1e-6)


def test_measured_motion_is_that_of_a_moving_picture():
    rng = np.random.default_rng(0)
    wide = rng.uniform(0, 255, (12, 30, 3)).repeat(16, 0).repeat(16, 1)
    smooth = np.stack([np.convolve(row, np.ones(24) / 24, "same") for row in wide.mean(-1)])
    smooth = np.stack([np.convolve(column, np.ones(24) / 24, "same") for column in smooth.T]).T
    picture = np.repeat(smooth[:128, :, None], 3, axis=2).astype(np.uint8)

    def clip(shift):  # pixels of 128 a frame
        return np.stack([picture[:, 8 + i * shift :][:, :128] for i in range(9)])

    slow, fast = (
        clips.motion_score(clip(2), 8.0),
        clips.motion_score(clip(4), 8.0),
    )  # 1 and 2 pixels of 16 in half a second
    assert 0.7 < slow < 1.3
    assert 1.5 < fast < 2.5
    assert clips.motion_score(clip(0), 8.0) < 0.05
    np.testing.assert_allclose(clips.motion_score(clip(2)[:3], 8.0), slow, rtol=0.4)  # shorter than half a second
    assert clips.motion_score(clip(2)[:1], 8.0) == 0


def test_videos_need_the_extra(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"data\.source=videos needs PyAV and OpenCV: pip install '\.\[video\]'"):
        data.make_source(videos(folder))
