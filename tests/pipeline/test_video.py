"""Videos come back with their frames, times, size and colours; a damaged one is an error."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.video import VideoReader, VideoWriter
from tests.pipeline.made_video import frames_of, write_video


def copy(source, target):
    with VideoReader(source) as reader, VideoWriter(target, reader) as writer:
        pictures = []
        for frame in reader.frames():
            pictures.append(frame.picture)
            writer.write(frame.picture, frame.time)
    return pictures


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001)])
def test_frames_rate_size_and_times_are_kept(tmp_path, rate):
    write_video(tmp_path / "a.mov", 40, rate=rate)
    with VideoReader(tmp_path / "a.mov") as reader:
        assert reader.expected_frames() == 40
    assert len(copy(tmp_path / "a.mov", tmp_path / "b.mp4")) == 40
    before, after = (frames_of(tmp_path / name) for name in ("a.mov", "b.mp4"))
    assert [time for time, _ in after] == [time for time, _ in before] == [Fraction(n) / rate for n in range(40)]
    for (_, ours), (_, theirs) in zip(after, before, strict=True):
        assert ours.shape == theirs.shape == (48, 64, 3)
        assert abs(ours.astype(int) - theirs).mean() < 6
    assert abs(before[0][1].astype(int) - before[20][1]).mean() > 10  # and they do differ
    with av.open(str(tmp_path / "b.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.frames) == (rate, 40)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    content = (tmp_path / "b.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # a browser plays it before it has all of it


def test_uneven_times_are_kept(tmp_path):
    times = [0, 1, 2, 10, 11, 30]
    write_video(tmp_path / "a.mov", 6, times=times)
    copy(tmp_path / "a.mov", tmp_path / "b.mp4")
    assert [time for time, _ in frames_of(tmp_path / "b.mp4")] == [Fraction(time, 25) for time in times]


@pytest.mark.parametrize("colorspace", [None, 1, 5])  # not said, ITU-R BT.709, BT.601
def test_colours_are_kept(tmp_path, colorspace):
    write_video(tmp_path / "a.mov", 3, colour=(200, 40, 90), colorspace=colorspace)
    copy(tmp_path / "a.mov", tmp_path / "b.mp4")
    for name in ("a.mov", "b.mp4"):
        _, picture = frames_of(tmp_path / name)[0]
        assert abs(picture[10, 10].astype(int) - [200, 40, 90]).max() <= 5, name


def test_odd_side_grows_by_a_pixel(tmp_path):
    write_video(tmp_path / "a.mov", 2)
    with VideoReader(tmp_path / "a.mov") as reader, VideoWriter(tmp_path / "b.mp4", reader) as writer:
        for frame in reader.frames():
            writer.write(frame.picture[:-1, :-3], frame.time)
    assert frames_of(tmp_path / "b.mp4")[0][1].shape == (48, 62, 3)


def test_picture_filmed_sideways_is_turned(tmp_path):
    write_video(tmp_path / "a.mp4", 2)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # of the track header, version 0
    assert struct.unpack_from(">9i", content, matrix) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    # a quarter clockwise: x' = height - y, y' = x
    struct.pack_into(">9i", content, matrix, 0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(content)
    with VideoReader(tmp_path / "a.mp4") as straight, VideoReader(tmp_path / "turned.mp4") as turned:
        for ours, theirs in zip(turned.frames(), straight.frames(), strict=True):
            np.testing.assert_array_equal(ours.picture, np.rot90(theirs.picture, -1))


def read(path):
    with VideoReader(path) as reader:
        return list(reader.frames())


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_video_that_was_cut_off_is_an_error(tmp_path, part):
    write_video(tmp_path / "whole.mp4", 40)
    content = (tmp_path / "whole.mp4").read_bytes()
    assert len(read(tmp_path / "whole.mp4")) == 40
    (tmp_path / "cut.mp4").write_bytes(content[: round(part * len(content))])
    with pytest.raises(PipelineError, match=r"cut\.mp4: damaged after frame \d+"):
        read(tmp_path / "cut.mp4")


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"words" * 1000)
    with pytest.raises(PipelineError, match=r"a\.mp4: no video that can be read"):
        read(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 48000
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    with pytest.raises(PipelineError, match=r"sound\.mp4: has no video stream"):
        read(tmp_path / "sound.mp4")


def test_full_disk_is_named(tmp_path):
    write_video(tmp_path / "a.mov", 3)
    with pytest.raises(PipelineError, match=r"^/dev/full: cannot be written: No space left on device"):
        copy(tmp_path / "a.mov", Path("/dev/full"))


def test_error_before_the_first_frame_is_the_one_that_comes_out(tmp_path):
    write_video(tmp_path / "a.mov", 3)
    with (
        pytest.raises(KeyError, match="mine"),
        VideoReader(tmp_path / "a.mov") as reader,
        VideoWriter(tmp_path / "b.mp4", reader),
    ):
        raise KeyError("mine")
