"""A model over batches of pictures: detections as arrays."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet.anchors import anchors
from effdet.config import ModelConfig
from effdet.errors import EffdetError
from effdet.input_pipeline import NO_IMAGE, Batch
from effdet.postprocess import PostprocessConfig, detect
from effdet.preprocess import normalize


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found on N images, D places each: the best first, PADDING in places from `counts` on."""

    image_ids: NDArray[np.int64]  # [N]
    boxes: NDArray[np.float32]  # [N,D,4] yxyx, pixels of the original images; may reach over the border
    scores: NDArray[np.float32]  # [N,D]
    class_ids: NDArray[np.int32]  # [N,D]
    counts: NDArray[np.int32]  # [N]


@dataclasses.dataclass(frozen=True)
class Found:
    """The detections on a picture, best first."""

    boxes: NDArray[np.floating]  # [n,4] yxyx, pixels of the picture; may reach over its border
    scores: NDArray[np.floating]  # [n]
    class_ids: NDArray[np.int32]  # [n]; of a head's class that the table has not, where weights lend it a score


def prepare_device() -> None:
    """Before TensorFlow's first work in a process that judges or detects: float32 in full, and memory as it is needed.

    TF32, a GPU's default, changes scores in their third digit; and a second process must find room beside this one.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)


def run_detection(
    model: keras.Model,
    config: ModelConfig,
    batches: Iterable[Batch],
    postprocess_config: PostprocessConfig,
    progress: Callable[[int], object] | None = None,
) -> Detections:
    """Detections on every image of `batches` (elements of evaluation_batches, at least one), with the model's weights.

    Places of a batch that hold no image are left out. After each batch `progress` gets the number of images in it.
    """
    detector = _detector(model, config, postprocess_config)
    parts = []
    for batch in _readable(batches):
        image_ids = batch["image_id"].numpy()
        found = detector(batch["image"], batch["content_size"], batch["scale"])
        present = image_ids != NO_IMAGE
        arrays = (image_ids, *(found[key].numpy() for key in ("boxes", "scores", "class_ids", "count")))
        parts.append([array[present] for array in arrays])
        if progress is not None:
            progress(int(present.sum()))
    return Detections(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _readable(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; EffdetError for what tf.data cannot read."""
    try:
        yield from batches
    except tf.errors.OpError as error:
        raise EffdetError(f"detection: {error.message}") from None


@functools.lru_cache(maxsize=1)  # tracing takes seconds, and training evaluates its one model again and again
def _detector(
    model: keras.Model, config: ModelConfig, postprocess_config: PostprocessConfig
) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], dict[str, tf.Tensor]]:
    model_anchors = tf.constant(anchors(config))

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def detector(images: tf.Tensor, content_size: tf.Tensor, scales: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = model(normalize(images, content_size, config), training=False)
        return detect(outputs["class_logits"], outputs["box_deltas"], model_anchors, scales, postprocess_config)

    return detector  # type: ignore[no-any-return]
