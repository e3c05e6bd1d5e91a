"""Pictures made smaller show what the larger showed, in TensorFlow's colours, or stay the files that came."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from pipeline.params import Reencode
from pipeline.reencode import smaller

SETTINGS = Reencode(max_side=50, quality=95)


def smooth(width: int, height: int) -> np.ndarray:
    """A picture without fine detail: red grows to the right, green downwards, blue falls to the right."""
    x, y = np.linspace(0, 255, width)[None, :], np.linspace(0, 255, height)[:, None]
    return np.stack(np.broadcast_arrays(x, y, 255 - x), axis=-1).astype(np.uint8)


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def with_alpha(mode: str) -> Image.Image:
    """Half of it transparent."""
    image = Image.fromarray(smooth(100, 80)).convert(mode)
    image.putalpha(Image.fromarray(np.repeat([[0, 255]], 80, 0).repeat(50, 1).astype(np.uint8)))
    return image


def two_pictures() -> bytes:
    """As a telephone writes them."""
    file = io.BytesIO()
    RGB.save(file, "MPO", save_all=True, append_images=[RGB.resize((50, 40))])
    return file.getvalue()


RGB = Image.fromarray(smooth(100, 80))
PICTURES = {
    "JPEG": encoded(RGB, "JPEG"),
    "JPEG with another behind it": two_pictures(),
    "grey JPEG": encoded(RGB.convert("L"), "JPEG"),
    "PNG": encoded(RGB, "PNG"),
    "grey PNG": encoded(RGB.convert("L"), "PNG"),
    "PNG of a palette": encoded(RGB.quantize(16), "PNG"),
    "PNG with alpha": encoded(with_alpha("RGB"), "PNG"),
    "grey PNG with alpha": encoded(with_alpha("L"), "PNG"),
    "black and white PNG": encoded(RGB.convert("L").point(lambda value: 255 * (value > 99), "1"), "PNG"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture_shows_what_tensorflow_shows_of_the_larger(name: str) -> None:
    made = smaller(PICTURES[name], 1, SETTINGS)
    assert made is not None
    assert (made.height, made.width) == (40, 50)
    pixels = tf.io.decode_jpeg(made.encoded, channels=3).numpy().astype(float)
    assert pixels.shape == (40, 50, 3)
    large = tf.io.decode_image(PICTURES[name], channels=3).numpy().astype(float)
    means = large.reshape(40, 2, 50, 2, 3).mean((1, 3))
    assert large.std() > 40
    # JPEG and LANCZOS against plain means; edges of steps differ, hence the median
    assert np.median(np.abs(pixels - means)) <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_is_turned(orientation: int) -> None:
    made = smaller(PICTURES["JPEG"], orientation, SETTINGS)
    assert made is not None
    small = tf.io.decode_jpeg(made.encoded).numpy().astype(int)
    assert small.shape == ((40, 50, 3) if orientation < 5 else (50, 40, 3))
    # Where the stored picture's top left corner is now: EXIF's names of its row 0 and column 0.
    rows = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}
    columns = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}
    sides = {rows[orientation], columns[orientation]}
    corner = small[-2 if "bottom" in sides else 1, -2 if "right" in sides else 1]
    np.testing.assert_allclose(corner, [0, 0, 255], atol=14)  # blue there, and nowhere else


def test_sides_are_rounded_and_at_least_a_pixel() -> None:
    made = smaller(encoded(Image.fromarray(smooth(201, 1)), "PNG"), 1, SETTINGS)
    assert made is not None
    assert (made.height, made.width) == (1, 50)
    made = smaller(encoded(Image.fromarray(smooth(67, 201)), "PNG"), 1, SETTINGS)
    assert made is not None
    assert (made.height, made.width) == (50, 17)  # 67 * 50 / 201 == 16.67


def test_much_larger_jpeg_is_decoded_at_once_smaller() -> None:
    """Pillow's draft mode keeps every place: within a value of the whole decoding and resizing."""
    content = encoded(Image.fromarray(smooth(1003, 777)), "JPEG")
    made = smaller(content, 1, SETTINGS)
    assert made is not None
    whole = Image.open(io.BytesIO(content)).resize((50, 39), Image.Resampling.LANCZOS)
    pixels = np.asarray(Image.open(io.BytesIO(made.encoded))).astype(int)
    assert np.abs(pixels - np.asarray(whole).astype(int)).mean() < 1


def test_picture_that_is_not_larger_or_of_doubtful_colours_stays() -> None:
    assert smaller(encoded(Image.fromarray(smooth(50, 50)), "JPEG"), 1, SETTINGS) is None
    assert smaller(encoded(RGB.convert("CMYK"), "JPEG"), 1, SETTINGS) is None
    deep = Image.fromarray(smooth(100, 80)[..., 0].astype(np.uint16) * 257)
    assert smaller(encoded(deep, "PNG"), 1, SETTINGS) is None
    assert smaller(encoded(RGB, "BMP"), 1, SETTINGS) is None


def test_quality_counts() -> None:
    sizes = [len(smaller(PICTURES["JPEG"], 1, Reencode(max_side=50, quality=q)).encoded) for q in (10, 50, 95)]  # type: ignore[union-attr]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]
