"""Pictures to the network's input, as google/automl efficientdet @6a54c87 (dataloader.py) does for evaluation.

A picture is resized to fit, its aspect kept, into the top left corner of the input. The reference normalizes, resizes,
and pads with 0; to resize first gives the same numbers and lets pictures travel as pixels, but then what lies outside
of them must become 0 after normalization, which is no colour 0.

A JPEG may say how it is to be turned for looking at: orientation 1..8, CIPA DC-008-2019 (Exif 2.32) 4.6.4, tag 274.
"""

from typing import Any

import tensorflow as tf
from keras import ops

from effdet.config import ModelConfig

Tensor = Any  # of whichever backend, eager or symbolic

SEGMENT_HEADER = 10  # bytes: marker, length, and of an EXIF segment its name
MAX_SEGMENTS = 64  # of a JPEG, looked through for EXIF, which cameras write first: bounds the work a file can ask for
ORIENTATION, SHORT = 0x0112, 3  # a tag, and its type
ENTRY = 12  # bytes of a TIFF entry: tag 2, type 2, count 4, value 4


def decode(encoded: tf.Tensor | bytes, apply_exif: bool = False) -> tf.Tensor:
    """JPEG or PNG bytes as pixels uint8 [h,w,3], RGB; of an animation the first picture.

    As stored, or, with `apply_exif`, turned as its EXIF orientation says. By TensorFlow's default JPEG decoding, which
    the published numbers come from. tf.errors.OpError for other files.
    """
    pixels = tf.image.decode_image(encoded, channels=3, expand_animations=False)
    return upright(pixels, orientation(encoded)) if apply_exif else pixels


def upright(pixels: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Pixels [h,w,C] as stored, turned and mirrored as their EXIF orientation, int32 scalar 1..8, says.

    [h,w,C], or [w,h,C] for an orientation from 5 on.
    """

    def turned() -> tf.Tensor:
        picture = tf.cond(orientation >= 5, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)
        for axis, orientations in ((0, [3, 4, 7, 8]), (1, [2, 3, 6, 7])):
            mirrored = tf.reduce_any(orientation == orientations)
            picture = tf.cond(mirrored, lambda p=picture, a=axis: tf.reverse(p, [a]), lambda p=picture: p)
        return picture

    return tf.cond(tf.equal(orientation, 1), lambda: pixels, turned)


def orientation(encoded: tf.Tensor | bytes) -> tf.Tensor:
    """The EXIF orientation of a file's bytes, string scalar: int32 scalar 1..8.

    1 for what is no JPEG, has none, or has one that is damaged. The first EXIF segment counts, and in it the first such
    entry of the first directory. Raises nothing, whatever the bytes.
    """
    encoded = tf.convert_to_tensor(encoded)

    def part(position: tf.Tensor, length: tf.Tensor | int) -> tf.Tensor:
        return tf.strings.substr(encoded, tf.minimum(position, tf.strings.length(encoded)), length)

    def header(position: tf.Tensor) -> tf.Tensor:
        found = part(position, SEGMENT_HEADER)
        return tf.cast(tf.io.decode_raw(found, tf.uint8, fixed_length=SEGMENT_HEADER), tf.int32)  # 0 beyond the end

    def is_exif(segment: tf.Tensor) -> tf.Tensor:
        is_named = tf.reduce_all(segment[4:] == list(b"Exif\0\0"))
        return (segment[0] == 0xFF) & (segment[1] == 0xE1) & (_length(segment) >= SEGMENT_HEADER) & is_named

    def is_passed(_: tf.Tensor, segment: tf.Tensor) -> tf.Tensor:
        marker = segment[1]
        # The others have no length, or are the scan (0xDA), behind which come pixels.
        has_length = (marker >= 0xC0) & ((marker < 0xD0) | (marker > 0xDA)) & (_length(segment) >= 4)
        return (segment[0] == 0xFF) & (has_length | (marker == 0xFF)) & ~is_exif(segment)

    def passed(position: tf.Tensor, segment: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        position += tf.where(segment[1] == 0xFF, 1, _length(segment))  # 0xFF may be repeated
        return position, header(position)

    is_jpeg = tf.strings.substr(encoded, 0, 2) == b"\xff\xd8"
    first = tf.where(is_jpeg, 2, tf.strings.length(encoded))
    position, segment = tf.while_loop(is_passed, passed, (first, header(first)), maximum_iterations=MAX_SEGMENTS)
    return tf.cond(
        is_exif(segment),
        lambda: _tiff_orientation(part(position + SEGMENT_HEADER, _length(segment) - SEGMENT_HEADER)),
        lambda: tf.constant(1),
    )


def _length(segment: tf.Tensor) -> tf.Tensor:
    """Bytes of the segment that begins so, its marker included."""
    return 2 + segment[2] * 256 + segment[3]


def _tiff_orientation(tiff: tf.Tensor) -> tf.Tensor:
    """The same as `orientation`, of the TIFF file, string scalar, that an EXIF segment holds."""
    content = tf.cast(tf.io.decode_raw(tiff, tf.uint8), tf.int64)  # [n]
    size = tf.size(content, tf.int64)
    little = tf.strings.substr(tiff, 0, 4) == b"II*\0"
    weights = tf.where(little, tf.constant([1, 1 << 8, 1 << 16, 1 << 24], tf.int64), [1 << 24, 1 << 16, 1 << 8, 1])
    long, short = weights, tf.where(little, weights[:2], weights[2:])
    known = (little | (tf.strings.substr(tiff, 0, 4) == b"MM\0*")) & (size >= 8)
    # A directory: the number of its entries, then these. What does not lie inside the segment is not there.
    padded = tf.concat([content, tf.zeros([8 + 2 + ENTRY], tf.int64)], 0)
    place = tf.minimum(tf.reduce_sum(padded[4:8] * long), size)
    count = tf.reduce_sum(padded[place : place + 2] * short)
    count = tf.clip_by_value((size - place - 2) // ENTRY, 0, count)
    entries = tf.reshape(padded[place + 2 : place + 2 + ENTRY * count], [-1, ENTRY])
    entries = tf.concat([entries, tf.zeros([1, ENTRY], tf.int64)], 0)  # so that there is one
    tags = tf.reduce_sum(entries[:, :2] * short, 1)
    entry = entries[tf.argmax(tf.cast(tags == ORIENTATION, tf.int32))]
    value = tf.cast(tf.reduce_sum(entry[8:10] * short), tf.int32)
    is_orientation = (tf.reduce_sum(entry[:2] * short) == ORIENTATION) & (tf.reduce_sum(entry[2:4] * short) == SHORT)
    is_one = tf.reduce_sum(entry[4:8] * long) == 1
    return tf.where(known & is_orientation & is_one & (value >= 1) & (value <= 8), value, 1)


def resize(picture: tf.Tensor, image_size: tuple[int, int]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """A picture [h,w,3] of 0..255 as large as fits an input of image_size (height, width), bilinear and not rounded.

    Gives the picture float32 [h',w',3], its size (h', w') int32 [2], and the factor float32 from pixels of the input to
    those of the picture as it came. For TensorFlow's default JPEG decoding the values are the reference's.
    """
    # In float32 and in this order: a rounding elsewhere would make some pictures a row larger or smaller.
    size = tf.cast(tf.shape(picture)[:2], tf.float32)
    scale = tf.reduce_min(tf.constant(image_size, tf.float32) / size)
    content_size = tf.maximum(tf.cast(size * scale, tf.int32), 1)  # at least 1: a line is a picture, too
    resized = tf.image.resize(tf.cast(picture, tf.float32), content_size)
    return resized, content_size, 1.0 / scale


def fit(pictures: tf.Tensor, image_size: tuple[int, int]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The same as `resize` for a batch of pictures of one size, uint8 [B,h,w,3], in operations that every runtime has.

    Gives inputs float32 [B,H,W,3] (outside of the pictures their last row and column go on), and what `resize` gives
    of a picture, int32 [1,2] and float32 [1]. Rows and columns are gathered, so that the output's shape does not
    depend on the picture's: a runtime that plans its memory beforehand can take pictures of any size.
    """
    sides = tf.shape(pictures)[1:3]
    size = tf.cast(sides, tf.float32)
    scale = tf.reduce_min(tf.constant(image_size, tf.float32) / size)
    content_size = tf.maximum(tf.cast(size * scale, tf.int32), 1)
    images = pictures
    for axis in (1, 0):  # columns, then rows: as TensorFlow's kernel interpolates
        ratio = size[axis] / tf.cast(content_size[axis], tf.float32)
        centers = (tf.range(image_size[axis], dtype=tf.float32) + 0.5) * ratio - 0.5
        before = tf.floor(centers)
        last = sides[axis] - 1
        first = tf.clip_by_value(tf.cast(before, tf.int32), 0, last)
        second = tf.clip_by_value(tf.cast(before, tf.int32) + 1, 0, last)
        lower = tf.cast(tf.gather(images, first, axis=axis + 1), tf.float32)
        upper = tf.cast(tf.gather(images, second, axis=axis + 1), tf.float32)
        images = lower + (upper - lower) * tf.reshape(centers - before, [-1, 1] if axis else [-1, 1, 1])
    return images, content_size[None], 1.0 / scale[None]


def normalize(images: Tensor, content_size: Tensor, config: ModelConfig) -> Tensor:
    """Inputs [B,H,W,3] of 0..255, of any type, as the network takes them: float32, 0 outside of the pictures.

    content_size int32 [B,2], or [1,2] for all, is the height and width of the picture at the top left of each input. To
    be done on the device: uint8 travels in a quarter of the bytes, but cannot hold the 0 of the padding.
    """
    images = ops.cast(images, "float32")
    mean = ops.convert_to_tensor(config.pixel_mean, dtype="float32")
    std = ops.convert_to_tensor(config.pixel_std, dtype="float32")
    height, width = images.shape[1:3]
    inside = (ops.arange(height)[:, None] < content_size[:, 0, None, None]) & (
        ops.arange(width) < content_size[:, 1, None, None]
    )  # [B,H,W]
    return ops.where(inside[..., None], (images - mean) / std, 0.0)
