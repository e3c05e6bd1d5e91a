"""The model as one file or folder for serving: pictures in, detections out, all that lies between them inside.

B pictures, D places for detections. Every format takes
  pixels  uint8 [B, h, w, 3], RGB, of any size, and gives
  boxes   float32 [B, D, 4], yxyx, pixels of the picture as it came in (of a file, as it was turned)
  scores  float32 [B, D], best first
  classes int32 [B, D], 0..K-1
  count   int32 [B], how many places are filled; the others hold 0, 0, -1
and carries its table of classes (effdet.exported reads it). A SavedModel has besides (its signatures are
tf.saved_model.load(folder).signatures[NAME])
  serving_default   images: string [B], the bytes of JPEG or PNG files, of any sizes; where Classes.apply_exif says so
                    they are turned as their EXIF orientation says, which a caller that gives pixels does itself
  pixels            pixels: as above
with two more outputs, category_ids int64 [B, D], as the annotations number the classes, and class_names string [B, D];
-1 and "" in empty places.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

from effdet.anchors import anchors
from effdet.boxes import PADDING
from effdet.config import ModelConfig
from effdet.postprocess import PostprocessConfig, detect
from effdet.preprocess import decode, fit, normalize, resize

ENCODED_SIGNATURE = "serving_default"
PIXELS_SIGNATURE = "pixels"
PIXELS = "pixels"  # the input's name
FINGERPRINT = "fingerprint.pb"
NETWORK = "network"  # scope of the network's operations: quantization finds them by it
CLASSES_FILE = "assets.extra/classes.json"  # assets.extra is the SavedModel format's place for the user's files

Outputs = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Classes:
    """What goes with an export: what the head's K classes are, and how files become the pictures that it knows."""

    category_ids: list[int]  # [K], PADDING where a class is not in use
    names: list[str]  # [K], "" there
    apply_exif: bool = False  # pictures are turned as their EXIF orientation says; else taken as stored

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Classes":
        """ValueError, TypeError where the text is of something else."""
        return cls(**json.loads(text))


def detector(
    model: keras.Model, config: ModelConfig, postprocess: PostprocessConfig
) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], Outputs]:
    """From inputs [B,H,W,3] of 0..255, content sizes [B,2] and scales [B] to detections: a function to be traced.

    The weights become constants, which every converter folds; operations are such as every runtime has.
    """
    raw = heads(model, config)

    def function(images: tf.Tensor, content_sizes: tf.Tensor, scales: tf.Tensor) -> Outputs:
        outputs = raw(images, content_sizes)
        box_anchors = tf.constant(anchors(config))
        found = detect(outputs["class_logits"], outputs["box_deltas"], box_anchors, scales, postprocess, portable=True)
        return {"classes": found.pop("class_ids"), **found}

    return function


def heads(model: keras.Model, config: ModelConfig) -> Callable[[tf.Tensor, tf.Tensor], Outputs]:
    """From inputs [B,H,W,3] of 0..255 and content sizes [B,2] to the network's outputs; as `detector`."""
    trained = [variable.numpy() for variable in model.trainable_variables]
    others = [variable.numpy() for variable in model.non_trainable_variables]

    def function(images: tf.Tensor, content_sizes: tf.Tensor) -> Outputs:
        normalized = normalize(images, content_sizes, config)
        with tf.name_scope(NETWORK):
            weights = [[tf.constant(array) for array in arrays] for arrays in (trained, others)]
            outputs, _ = model.stateless_call(*weights, normalized, training=False)
        return dict(outputs)

    return function


def pixels_function(
    model: keras.Model,
    config: ModelConfig,
    postprocess: PostprocessConfig | None,
    batch: int | None,
) -> tf.types.experimental.PolymorphicFunction:
    """pixels uint8 [batch,h,w,3] -> detections; without postprocess the network's class_logits and box_deltas.

    A tf.function with its input signature.
    """
    spec = tf.TensorSpec([batch, None, None, 3], tf.uint8, name=PIXELS)
    raw = heads(model, config)
    find = detector(model, config, postprocess) if postprocess else lambda images, sizes, _: raw(images, sizes)

    @tf.function(input_signature=[spec], autograph=False)  # type: ignore[untyped-decorator]
    def function(pixels: tf.Tensor) -> Outputs:
        images, content_size, scale = fit(pixels, config.image_size)
        return find(images, content_size, scale)

    return function


def export_saved_model(
    folder: Path,
    model: keras.Model,
    config: ModelConfig,
    postprocess: PostprocessConfig,
    classes: Classes,
) -> None:
    """Writes the SavedModel into `folder`, a new one.

    In a fresh process the same arguments give the same bytes: TensorFlow numbers functions as it makes them.
    """
    categories = tf.constant([*classes.category_ids, PADDING], tf.int64)  # [K + 1], the last for empty places
    names = tf.constant([*classes.names, ""])
    inputs = (
        tf.TensorSpec([None, *config.image_size, 3], tf.float32, name="images"),
        tf.TensorSpec([None, 2], tf.int32, name="content_sizes"),
        tf.TensorSpec([None], tf.float32, name="scales"),
    )
    # A function of its own, so that both signatures share one graph of the network.
    find = tf.function(detector(model, config, postprocess), input_signature=inputs, autograph=False)

    def named(found: Outputs) -> Outputs:
        rows = tf.where(found["classes"] == PADDING, config.num_classes, found["classes"])
        return {**found, "category_ids": tf.gather(categories, rows), "class_names": tf.gather(names, rows)}

    def decoded(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        image, content_size, scale = resize(decode(encoded, classes.apply_exif), config.image_size)
        return tf.image.pad_to_bounding_box(image, 0, 0, *config.image_size), content_size, scale

    one = tuple(tf.TensorSpec(spec.shape[1:], spec.dtype) for spec in inputs)

    @tf.function(  # type: ignore[untyped-decorator]
        input_signature=[tf.TensorSpec([None], tf.string, name="images")], autograph=False
    )
    def detect_encoded(images: tf.Tensor) -> Outputs:
        return named(find(*tf.map_fn(decoded, images, fn_output_signature=one)))

    @tf.function(  # type: ignore[untyped-decorator]
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, name=PIXELS)], autograph=False
    )
    def detect_pixels(pixels: tf.Tensor) -> Outputs:
        images, content_size, scale = fit(pixels, config.image_size)
        return named(find(images, content_size, scale))

    tf.saved_model.save(
        tf.Module(),
        str(folder),
        signatures={
            ENCODED_SIGNATURE: detect_encoded.get_concrete_function(),
            PIXELS_SIGNATURE: detect_pixels.get_concrete_function(),
        },
        options=tf.saved_model.SaveOptions(experimental_custom_gradients=False),
    )
    (folder / FINGERPRINT).unlink(missing_ok=True)  # holds a random id; loading needs it not
    (folder / CLASSES_FILE).parent.mkdir()
    (folder / CLASSES_FILE).write_text(classes.to_json())
