"""Pictures to the network's input, as google/automl efficientdet @6a54c87 (dataloader.py) does for evaluation.

A picture is resized to fit, its aspect kept, into the top left corner of the input. The reference normalizes, resizes,
and pads with 0; to resize first gives the same numbers and lets pictures travel as pixels, but then what lies outside
of them must become 0 after normalization, which is no colour 0.
"""

from typing import Any

import tensorflow as tf
from keras import ops

from effdet.config import ModelConfig

Tensor = Any  # of whichever backend, eager or symbolic


def decode(encoded: tf.Tensor | bytes) -> tf.Tensor:
    """JPEG or PNG bytes as pixels uint8 [h,w,3], RGB; of an animation the first picture.

    By TensorFlow's default JPEG decoding, which the published numbers come from. tf.errors.OpError for other files.
    """
    return tf.image.decode_image(encoded, channels=3, expand_animations=False)


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
