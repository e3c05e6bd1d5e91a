"""The formats that a model goes out in, by the names that params.yaml and the command use."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effdet.boxes import PADDING
from effdet.export import Classes, export_saved_model
from effdet.export_litert import export_litert
from effdet.export_onnx import export_onnx
from effdet.postprocess import PostprocessConfig
from pipeline.errors import PipelineError
from pipeline.model_files import StoredModel
from pipeline.params import Format

FILES: dict[Format, str] = {  # in a release
    "saved_model": "saved_model",
    "onnx": "model.onnx",
    "litert_float32": "model_float32.tflite",
    "litert_float16": "model_float16.tflite",
    "litert_int8": "model_int8.tflite",
}

CALIBRATION_IMAGES = 64  # from which litert_int8 takes the ranges of its activations


def write_export(
    path: Path,
    format_name: Format,
    stored: StoredModel,
    nms: PostprocessConfig | None,
    calibration: Iterable[NDArray[np.uint8]] = (),
) -> None:
    """Writes the file or folder. nms None: the network's outputs in place of detections; not for a SavedModel.

    calibration: pictures uint8 [h,w,3], turned as the model takes them, for litert_int8, which lite models alone have
    (EffdetError). In a fresh process the same arguments give the same bytes.
    """
    rows = {row.class_id: row for row in stored.classes}
    head = [rows.get(class_id) for class_id in range(stored.config.num_classes)]
    classes = Classes(
        [row.category_id if row else PADDING for row in head],
        [row.name if row else "" for row in head],
        stored.apply_exif,
    )
    if format_name.startswith("litert_"):
        precision = format_name.removeprefix("litert_")
        export_litert(path, stored.model, stored.config, nms, classes, precision, calibration)
    elif format_name == "onnx":
        export_onnx(path, stored.model, stored.config, nms, classes)
    elif nms is None:
        raise PipelineError("saved_model: has no form with raw heads; take onnx or litert_float32")
    else:
        export_saved_model(path, stored.model, stored.config, nms, classes)
