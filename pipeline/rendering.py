"""Boxes with labels, drawn on an image as it is, or on two copies of it: true boxes left, detections right.

Pillow alone draws them, in a font that comes with the environment, so that the same boxes give the same bytes.
"""

import colorsys
import functools
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline import exif

LONG_SIDE = 512  # pixels to which the longer side of the image is scaled
GAP = 8  # pixels between the two
CAPTION = 22  # pixels of the strip above them
TEXT = 13  # pixels, font size
LINE = 2  # pixels, a box's edge
OWN_TEXT = (11, 1 / 60)  # of a picture in its own size: at least so many pixels, and such a share of the longer side
OWN_LINE = (1, 1 / 320)
LABEL_HEIGHT = 16 / 13  # of a label, in font sizes: room for what hangs below the line
JPEG_QUALITY = 85
BACKGROUND = (255, 255, 255)
GOLDEN_ANGLE = 0.381966  # of a turn: neighbours in class id get hues far apart


@dataclass(frozen=True)
class Drawn:
    """A box to draw."""

    box: np.ndarray  # float [4], yxyx pixels of the image
    class_id: int  # chooses the colour
    label: str


def side_by_side(
    encoded: bytes, truth: Iterable[Drawn], detections: Iterable[Drawn], apply_exif: bool = False
) -> bytes:
    """The picture as JPEG bytes, from the image as JPEG or PNG bytes. Boxes are drawn in the order given.

    `apply_exif`: the image is turned as its EXIF orientation says, and boxes refer to it so.
    """
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    if apply_exif:
        image = exif.upright(image, exif.orientation_of(encoded))
    scale = LONG_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (2 * image.width + GAP, image.height + CAPTION), BACKGROUND)
    for caption, left, boxes in (("truth", 0, truth), ("detections", image.width + GAP, detections)):
        write_text(canvas, (left + 2, 3), caption)
        canvas.paste(_with_boxes(image, scale, boxes), (left, CAPTION))
    output = io.BytesIO()
    canvas.save(output, "JPEG", quality=JPEG_QUALITY)
    return output.getvalue()


def with_boxes(pixels: NDArray[np.uint8], boxes: Sequence[Drawn]) -> Image.Image:
    """A picture [h,w,3] RGB in its own size with boxes in the order given, and above all boxes their labels.

    Lines and letters grow with the picture, which is looked at in the size of a screen.
    """
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    line, text = (max(least, round(max(image.size) * share)) for least, share in (OWN_LINE, OWN_TEXT))
    for drawn in boxes:
        _box(draw, 1.0, drawn, line)
    for drawn in boxes:
        _label(draw, image.size, 1.0, drawn, text)
    return image


def write_text(canvas: Image.Image, corner: tuple[int, int], text: str) -> None:
    """A line of text, TEXT pixels high, in black; its upper left corner at (x, y)."""
    ImageDraw.Draw(canvas).text(corner, text, fill=(0, 0, 0), font=_font(TEXT))


def _with_boxes(image: Image.Image, scale: float, boxes: Iterable[Drawn]) -> Image.Image:
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for drawn in boxes:
        _box(draw, scale, drawn, LINE)
        _label(draw, image.size, scale, drawn, TEXT)
    return image


def _box(draw: ImageDraw.ImageDraw, scale: float, drawn: Drawn, line: int) -> None:
    top, left, bottom, right = (float(edge) * scale for edge in drawn.box)
    corners = (left, top, max(left, right), max(top, bottom))
    draw.rectangle(corners, outline=_colour(drawn.class_id), width=line)


def _label(draw: ImageDraw.ImageDraw, size: tuple[int, int], scale: float, drawn: Drawn, text: int) -> None:
    """Above the box's upper left corner, moved to stand inside the picture."""
    font = _font(text)
    width, height = draw.textlength(drawn.label, font=font) + 4, math.ceil(text * LABEL_HEIGHT)
    left = max(0, min(float(drawn.box[1]) * scale, size[0] - width))
    top = max(0, min(float(drawn.box[0]) * scale - height, size[1] - height))
    draw.rectangle((left, top, left + width, top + height), fill=_colour(drawn.class_id))
    draw.text((left + 2, top), drawn.label, fill=(0, 0, 0), font=font)


def _colour(class_id: int) -> tuple[int, int, int]:
    """Bright enough for black text."""
    red, green, blue = colorsys.hsv_to_rgb(class_id * GOLDEN_ANGLE % 1, 0.6, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it; the basic layout engine, since the other may or may not be there."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
