"""Exported models read back and run: a SavedModel, an ONNX file, a LiteRT file, each by its own runtime."""

import dataclasses
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from effdet.errors import EffdetError
from effdet.export import CLASSES_FILE, ENCODED_SIGNATURE, PIXELS, PIXELS_SIGNATURE, Classes
from effdet.export_litert import CLASSES_MEMBER
from effdet.export_onnx import CLASSES_KEY

Outputs = dict[str, NDArray[Any]]
Run = Callable[[NDArray[np.uint8]], Outputs]
RunEncoded = Callable[[Sequence[bytes]], Outputs]


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported model, ready to run."""

    category_ids: NDArray[np.int64]  # [K], PADDING where the head's class is not in use
    class_names: list[str]  # [K], "" there
    apply_exif: bool  # pixels for `run` are to be those of effdet.preprocess.decode with this
    # pixels uint8 [B,h,w,3] -> boxes, scores, class_ids, count, as effdet.postprocess.detect gives them; or
    # class_logits and box_deltas, of an export with raw heads
    run: Run
    run_encoded: RunEncoded | None  # a SavedModel's: JPEG or PNG bytes, B of them -> the same


def is_exported(path: Path) -> bool:
    """Whether the path's name or content is that of an export."""
    return path.suffix in (".onnx", ".tflite") or (path / "saved_model.pb").is_file()


def open_exported(path: Path) -> Exported:
    """Loads the model. EffdetError where it cannot be read, or was not written by effdet's exports."""
    if not path.exists():
        raise EffdetError(f"{path}: exported model not found")
    read = {".onnx": _onnx, ".tflite": _litert}.get(path.suffix, _saved_model)
    try:
        return read(path)
    except Exception as error:  # three runtimes, each with errors of its own
        raise EffdetError(f"{path}: not an exported model that can be read: {error}") from error


def _saved_model(path: Path) -> Exported:
    loaded = tf.saved_model.load(str(path))

    def run(pixels: NDArray[np.uint8]) -> Outputs:
        return _arrays(loaded.signatures[PIXELS_SIGNATURE](**{PIXELS: tf.constant(pixels)}))

    def run_encoded(images: Sequence[bytes]) -> Outputs:
        return _arrays(loaded.signatures[ENCODED_SIGNATURE](images=tf.constant(list(images))))

    return _exported((path / CLASSES_FILE).read_text(), run, run_encoded)


def _arrays(found: dict[str, tf.Tensor]) -> Outputs:
    return _renamed({name: tensor.numpy() for name, tensor in found.items()})


def _onnx(path: Path) -> Exported:
    session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    names = [output.name for output in session.get_outputs()]

    def run(pixels: NDArray[np.uint8]) -> Outputs:
        return _renamed(dict(zip(names, session.run(names, {PIXELS: pixels}), strict=True)))

    return _exported(session.get_modelmeta().custom_metadata_map[CLASSES_KEY], run)


def _litert(path: Path) -> Exported:
    runner = Interpreter(str(path), num_threads=len(os.sched_getaffinity(0))).get_signature_runner()

    def run(pixels: NDArray[np.uint8]) -> Outputs:
        parts = [runner(**{PIXELS: picture[None]}) for picture in pixels]
        return _renamed({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    with zipfile.ZipFile(path) as archive:
        return _exported(archive.read(CLASSES_MEMBER), run)


def _renamed(outputs: Outputs) -> Outputs:
    """As the library calls them."""
    return {"class_ids" if name == "classes" else name: array for name, array in outputs.items()}


def _exported(table: str | bytes, run: Run, run_encoded: RunEncoded | None = None) -> Exported:
    classes = Classes.from_json(table)
    return Exported(np.array(classes.category_ids, np.int64), classes.names, classes.apply_exif, run, run_encoded)
