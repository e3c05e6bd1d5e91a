"""Reads TensorFlow checkpoints of google/automl efficientdet and NVIDIA DeepLearningExamples by published names.

Name-based (as published): NAME, its moving average NAME/ExponentialMovingAverage, optimizer slots NAME/Momentum,
global_step. Object-based (Keras training): the variables' names and slots ("average") stand in an object graph.

TensorFlow ends its whole process on some damaged files, so a process of its own reads them first.
"""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from effdet.errors import EffdetError
from effdet.stored_arrays import StoredArrays

AVERAGE = "/ExponentialMovingAverage"
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
MAX_TEXT = 1 << 16  # characters of the file `checkpoint`, whose first line counts
AVERAGE_SLOT = "average"
# children of an object-based checkpoint that are no part of the model
NO_MODEL = {"optimizer", "_optimizer", "save_counter", "keras_api", "step", "global_step", "epoch"}

# what reads what a file says of itself: arguments are a prefix and the object graph's name
TRIAL = """
import sys
import tensorflow as tf
reader = tf.compat.v1.train.NewCheckpointReader(sys.argv[1])
shapes = reader.get_variable_to_shape_map()
reader.get_variable_to_dtype_map()
if sys.argv[2] in shapes:
    reader.get_tensor(sys.argv[2])
"""
_survived: set[str] = set()  # SHA-256 of the .index files that a process of its own has read

READ_ERRORS = (tf.errors.OpError, ValueError, RuntimeError, TypeError, LookupError, OSError)


def newest_prefix(folder: Path, place: Path | None = None) -> Path:
    """The checkpoint of a folder: that which its file `checkpoint` names, or the only one.

    Of the name in that file the last part alone is used. EffdetError, of `place` where the folder is a temporary one,
    where that leads to none.
    """
    place = place or folder
    found = sorted(path.with_suffix("") for path in folder.glob("*.index"))
    names = ", ".join(path.name for path in found) or "none"
    if (folder / "checkpoint").is_file():
        with (folder / "checkpoint").open(errors="replace") as file:
            text = file.read(MAX_TEXT)
        named = re.search(r'^model_checkpoint_path: "(.+)"$', text, re.MULTILINE)
        prefix = folder / Path(named[1]).name if named else None
        if prefix in found:
            return prefix
        raise EffdetError(
            f"{place}: its file checkpoint names {named[1] if named else 'none'!r}, and the folder has {names}; "
            "give the prefix of one"
        )
    if len(found) != 1:
        raise EffdetError(f"{place}: expected one TensorFlow checkpoint, got {names}; give the prefix of one")
    return found[0]


def open_checkpoint(prefix: Path, ema: bool, place: Path | None = None) -> StoredArrays:
    """The model's variables, of each its moving average where `ema` and there is one.

    EffdetError, of `place` where the files are temporary, where they cannot be read. The first time that a process
    meets a checkpoint costs a start of TensorFlow, some seconds.
    """
    place = place or prefix
    _try(prefix, place)
    try:
        reader = tf.compat.v1.train.NewCheckpointReader(str(prefix))
        stored_shapes = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
        dtypes = reader.get_variable_to_dtype_map()
        if OBJECT_GRAPH in stored_shapes:
            raw, averages = _of_object_graph(TrackableObjectGraph.FromString(reader.get_tensor(OBJECT_GRAPH)))
        else:
            raw, averages = _by_name(set(stored_shapes))
    except (*READ_ERRORS, DecodeError) as error:
        raise EffdetError(f"{place}: cannot be read as a TensorFlow checkpoint: {error}") from None
    keys = {**raw, **averages} if ema else raw
    lost = [key for key in keys.values() if key not in stored_shapes]
    if lost:
        raise EffdetError("\n".join([f"{place}: {len(lost)} arrays are named and not there", *lost]))

    def read(name: str) -> NDArray[Any]:
        if not dtypes[keys[name]].is_floating:
            raise EffdetError(f"{place}: {keys[name]}: expected floating-point numbers, got {dtypes[keys[name]].name}")
        try:
            return np.asarray(reader.get_tensor(keys[name]), np.float32)
        except READ_ERRORS as error:
            raise EffdetError(f"{place}: {keys[name]}: cannot be read: {error}") from None

    shapes = {name: stored_shapes[key] for name, key in keys.items()}
    return StoredArrays(
        f"TensorFlow checkpoint {prefix.name}", shapes, read, frozenset(averages) if ema else frozenset()
    )


def _try(prefix: Path, place: Path) -> None:
    """Reads what the checkpoint says of itself in another process. EffdetError where that fails or is ended by it."""
    with prefix.with_name(f"{prefix.name}.index").open("rb") as index:
        digest = hashlib.file_digest(index, "sha256").hexdigest()
    if digest in _survived:
        return
    done = subprocess.run(
        [sys.executable, "-P", "-c", TRIAL, str(prefix), OBJECT_GRAPH],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        reason = f"TensorFlow is ended by it, signal {-done.returncode}" if done.returncode < 0 else words
        raise EffdetError(f"{place}: cannot be read as a TensorFlow checkpoint: {reason}")
    _survived.add(digest)


def _by_name(names: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> name of the array, and of the moving average. Counters (global_step) and optimizer slots are left out."""
    raw = {
        name: name
        for name in names
        if "/" in name and not name.endswith(AVERAGE) and name.rpartition("/")[0] not in names
    }
    return raw, {name.removesuffix(AVERAGE): name for name in names if name.endswith(AVERAGE)}


def _of_object_graph(graph: TrackableObjectGraph) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> key of the array, and of the moving average, for what is reached without passing an optimizer."""
    keys: dict[int, str] = {}
    names: dict[int, str] = {}
    seen, waiting = {0}, [0]
    while waiting:
        number = waiting.pop()
        node = graph.nodes[number]
        for attribute in node.attributes:
            if attribute.name == "VARIABLE_VALUE" and "/" in attribute.full_name:
                names[number], keys[number] = attribute.full_name, attribute.checkpoint_key
        children = {child.node_id for child in node.children if child.local_name not in NO_MODEL}
        waiting += children - seen
        seen |= children
    averages = {
        names[slot.original_variable_node_id]: graph.nodes[slot.slot_variable_node_id].attributes[0].checkpoint_key
        for node in graph.nodes
        for slot in node.slot_variables
        if slot.slot_name == AVERAGE_SLOT and slot.original_variable_node_id in names
    }
    if len(set(names.values())) != len(names):
        raise ValueError("its object graph has two variables of one name")
    return {names[number]: key for number, key in keys.items()}, averages
