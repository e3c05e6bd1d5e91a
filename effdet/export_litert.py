"""The model as a LiteRT (.tflite) file: inputs and outputs as effdet.export says, one picture at a time, of any size.

The input is laid out for a picture of config.image_size; for another, `resize_tensor_input` comes first (a signature
runner does that by itself). The file is a zip archive, too: labels.txt and classes.json lie in it, as in TFLite's
metadata format.
"""

import contextlib
import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flatbuffers
import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_quantizer import algorithm_manager, calibrator, qtyping, quantizer
from numpy.typing import NDArray

from effdet.config import BACKBONES, ModelConfig
from effdet.errors import EffdetError
from effdet.export import NETWORK, PIXELS, Classes, pixels_function
from effdet.postprocess import PostprocessConfig

PRECISIONS = ("float32", "float16", "int8")
SIGNATURE = "serving_default"
CLASSES_MEMBER = "classes.json"
LABELS_MEMBER = "labels.txt"  # a line a class of the head
# Operators of the network that work in int8 between int8 neighbours. The heads' outputs are joined in float32, so that
# each level keeps a scale of its own, and what comes after them, and before the network, stays float32.
INT8_OPERATORS = (
    qtyping.TFLOperationName.CONV_2D,
    qtyping.TFLOperationName.DEPTHWISE_CONV_2D,
    qtyping.TFLOperationName.ADD,
    qtyping.TFLOperationName.MAX_POOL_2D,
    qtyping.TFLOperationName.RESIZE_NEAREST_NEIGHBOR,
)


def export_litert(
    path: Path,
    model: keras.Model,
    config: ModelConfig,
    postprocess: PostprocessConfig | None,
    classes: Classes,
    precision: str = "float32",
    calibration: Iterable[NDArray[np.uint8]] = (),
) -> None:
    """Writes the file, of built-in operators alone.

    precision: "float32"; "float16", weights alone; "int8", weights and activations of the network of a lite model, for
    which calibration gives pictures uint8 [h,w,3] like those that it will see. Without postprocess it gives
    class_logits float32 [1,A,K] and box_deltas float32 [1,A,4] in place of detections.
    """
    if precision not in PRECISIONS:
        raise EffdetError(f"LiteRT precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "int8" and not BACKBONES[config.backbone].lite:
        raise EffdetError(f"LiteRT int8: for lite models only, {config.name} is none; take float16")
    function = pixels_function(model, config, postprocess, batch=1)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()], tf.Module())
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    content = _laid_out(converter.convert(), config.image_size)
    if precision == "float16":
        content = _with_half_weights(content)
    elif precision == "int8":
        content = _quantized(content, calibration)
    path.write_bytes(_with_members(content, classes))


def _with_half_weights(content: bytes) -> bytes:
    weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    recipe = qtyping.OpQuantizationConfig(
        weight_tensor_config=weights, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
    )
    tool = quantizer.Quantizer(memoryview(content))
    casting = algorithm_manager.AlgorithmName.FLOAT_CASTING
    tool.update_quantization_recipe(NETWORK, qtyping.TFLOperationName.ALL_SUPPORTED, recipe, casting)
    return _written(tool)


def _quantized(content: bytes, calibration: Iterable[NDArray[np.uint8]]) -> bytes:
    pictures = [{PIXELS: picture[None]} for picture in calibration]
    if not pictures:
        raise EffdetError("LiteRT int8: no pictures to calibrate with; give some that are like those to come")
    tool = quantizer.Quantizer(memoryview(content))
    for operator in INT8_OPERATORS:
        tool.add_static_config(NETWORK, operator, activation_num_bits=8, weight_num_bits=8)
    # The other mode reads every tensor, and those of the NMS loop have no values outside of it.
    mode = calibrator.CalibrationMode.CALIBRATION_PROFILER_BASED
    with contextlib.redirect_stderr(io.StringIO()):  # a bar and a warning about that mode
        ranges = tool.calibrate({SIGNATURE: pictures}, mode=mode)
    return _written(tool, ranges)


def _written(tool: quantizer.Quantizer, ranges: Any = None) -> bytes:
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that takes no time
        return bytes(tool.quantize(ranges, enable_progress_bar=False, enable_progress_report=False).quantized_model)


def _laid_out(content: bytes, image_size: tuple[int, int]) -> bytes:
    """With memory planned for a picture of image_size; the converter plans for one of 1 x 1."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    (graph,) = (graph for graph in model.subgraphs if graph.name == b"main")
    graph.tensors[graph.inputs[0]].shape = np.array([1, *image_size, 3], np.int32)
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _with_members(content: bytes, classes: Classes) -> bytes:
    """The file with an archive behind it, which runtimes do not read."""
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(
            zipfile.ZipInfo(LABELS_MEMBER), "".join(" ".join(name.split()) + "\n" for name in classes.names)
        )
        archive.writestr(zipfile.ZipInfo(CLASSES_MEMBER), classes.to_json())
    return file.getvalue()
