"""Small videos for tests, and how they are read without the code that is tested."""

from fractions import Fraction

import av
import numpy as np


def write_video(path, count, rate=Fraction(25), size=(48, 64), times=None, colour=None, colorspace=None):
    """`count` frames of (height, width): coarse noise that wanders, or one colour. `times` in units of 1 / rate."""
    blocks = np.random.default_rng(5).integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
    pattern = blocks.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        for number in range(count):
            picture = np.roll(pattern, 2 * number, axis=1) if colour is None else np.full_like(pattern, colour)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=colorspace)
            frame.pts, frame.time_base = number if times is None else times[number], 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def frames_of(path):
    """(seconds as a fraction, picture [h,w,3] RGB) of each frame."""
    with av.open(str(path)) as container:
        return [(frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
