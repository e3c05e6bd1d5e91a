"""Video files frame by frame, by PyAV 18 (FFmpeg): read as RGB pictures, written as what browsers play."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange
from numpy.typing import NDArray

from pipeline.errors import PipelineError

PIXEL_FORMAT = "yuv420p"  # with H.264 in MP4, what every browser plays
ENCODER_OPTIONS = {"crf": "20", "preset": "veryfast"}  # quality to the eye as the source; time is the network's
FORMATS = "avi,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,asf"  # FFmpeg's names of containers
FAST_START = {"movflags": "faststart"}  # the index at the front: playing starts before all of it is there


@dataclass(frozen=True)
class Frame:
    """A frame as it is to be looked at."""

    picture: NDArray[np.uint8]  # [h,w,3] RGB, turned as the file says
    time: int | None  # in units of the reader's time_base


class VideoReader:
    """The frames of a file's first video stream, decoded one by one. PipelineError where it has none or is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # "file:", for names with a colon; and no playlists, which would have other files read
            self._container = av.open(f"file:{path}", options={"format_whitelist": FORMATS}, metadata_errors="replace")
        except FFmpegError as error:
            raise PipelineError(f"{path}: no video that can be read: {error.strerror}") from None
        if not self._container.streams.video:
            self._container.close()
            raise PipelineError(f"{path}: has no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)  # frames a second
        self.time_base = self._stream.time_base or 1 / self.rate  # seconds
        self.pixel_aspect = self._stream.sample_aspect_ratio
        self.codec = self._stream.codec_context

    def expected_frames(self) -> int | None:
        """As the file's header has it, or its duration; None where it has neither."""
        if self._stream.frames:
            return self._stream.frames
        duration = self._container.duration  # microseconds
        return round(duration * self.rate / av.time_base) if duration else None

    def frames(self) -> Iterator[Frame]:
        """All frames, in the order in which they are shown."""
        number = 0
        try:
            for packet in self._container.demux(self._stream):
                frames = packet.decode()
                if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
                    raise PipelineError(f"{self.path}: damaged after frame {number}, or cut off there")
                for frame in frames:
                    number += 1
                    picture = frame.to_ndarray(format="rgb24")
                    # phones write sideways and say by how much: degrees against the clock
                    yield Frame(np.rot90(picture, round(frame.rotation / 90)), frame.pts)
        except FFmpegError as error:
            raise PipelineError(f"{self.path}: damaged after frame {number}: {error.strerror}") from None
        if not number:
            raise PipelineError(f"{self.path}: has no frame")

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()


class VideoWriter:
    """Writes pictures as a video with the times and colours of the one that is read. H.264 wants even sides.

    The file is whole only when the block has ended.
    """

    def __init__(self, path: Path, source: VideoReader) -> None:
        self._path, self._source = path, source
        with self._errors():
            self._container = av.open(str(path), "w", format="mp4", options=FAST_START)
            self._stream = self._container.add_stream("libx264", rate=source.rate, options=ENCODER_OPTIONS)
        self._last_time = -1
        self._first_time: int | None = None

    def write(self, picture: NDArray[np.uint8], time: int | None) -> None:
        """Adds a picture [h,w,3]; all have the size of the first. An odd side grows by a pixel."""
        picture = np.pad(picture, ((0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)), "edge")
        if self._first_time is None:
            self._begin(*picture.shape[:2])
            self._first_time = time or 0
        elif picture.shape[:2] != (self._stream.height, self._stream.width):
            raise PipelineError(f"{self._source.path}: its frames change in size, which cannot be written in one video")
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format=PIXEL_FORMAT, dst_colorspace=self._source.codec.colorspace, dst_color_range=ColorRange.MPEG
        )
        step = max(1, round(1 / (self._source.rate * self._source.time_base)))
        frame.pts = self._last_time + step if time is None else max(time - self._first_time, self._last_time + 1)
        frame.time_base = self._source.time_base
        self._last_time = frame.pts
        with self._errors():
            self._container.mux(self._stream.encode(frame))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FFmpegError as error:  # a full disk
            raise PipelineError(f"{self._path}: cannot be written: {error.strerror}") from None

    def _begin(self, height: int, width: int) -> None:
        codec = self._stream.codec_context
        codec.height, codec.width, codec.pix_fmt = height, width, PIXEL_FORMAT
        codec.time_base = self._source.time_base
        if self._source.pixel_aspect:
            codec.sample_aspect_ratio = self._source.pixel_aspect
        codec.colorspace, codec.color_range = self._source.codec.colorspace, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = self._source.codec.color_primaries, self._source.codec.color_trc

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._errors():
            if error is None:
                self._container.mux(self._stream.encode())
            self._container.close()
