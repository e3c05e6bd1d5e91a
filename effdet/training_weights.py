"""A model's weights out of a training checkpoint (effdet.checkpoint), by published name.

best-*: the averaged weights by name. step-*: the state of training (effdet.train_state.TrainState), which holds
trainable variables and their averages as one vector each, in the model's order.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from effdet import checkpoint
from effdet.config import ModelConfig
from effdet.errors import EffdetError
from effdet.stored_arrays import StoredArrays, in_memory
from effdet.weights import published_variables

BN_STATISTICS = ("moving_mean", "moving_variance")


def best_of(run: Path) -> Path | None:
    """The best weights in the folder of a run; None where it is no such folder. EffdetError where it has none yet."""
    best = checkpoint.newest(run, "best")
    if best is not None:
        return run / checkpoint.file_name("best", best)
    if checkpoint.newest(run, "step") is None:
        return None
    raise EffdetError(f"{run}: has no best-... yet (a validation writes it); name one of its step-... files")


def open_training_checkpoint(path: Path, model: keras.Model, config: ModelConfig, ema: bool) -> StoredArrays:
    """The averaged weights and statistics, or without `ema` those that were trained; `model` gives names and order.

    EffdetError where the checkpoint is damaged, of another model, or has no others than averaged ones.
    """
    arrays = checkpoint.read(path).arrays
    if "ema_weights" in arrays:
        return _of_state(arrays, f"training checkpoint {path.name}", model, config, ema)
    if not ema:
        raise EffdetError(f"{path}: holds the averaged weights alone; name a step-... file for the others")
    return in_memory(f"training checkpoint {path.name}", arrays, arrays)


def _of_state(
    arrays: Mapping[str, NDArray[Any]], what: str, model: keras.Model, config: ModelConfig, ema: bool
) -> StoredArrays:
    found = {name.removeprefix("model/"): array for name, array in arrays.items() if name.startswith("model/")}
    shapes = {name: tuple(variable.shape) for name, variable in published_variables(model).items()}
    trained = {name: shape for name, shape in shapes.items() if name not in found}
    weights = _vector(arrays, "ema_weights" if ema else "weights", what)
    found |= _split(weights, _with_its_classes(trained, config, len(weights)), what)
    averaged = set(trained) if ema else set()
    if ema:
        # of frozen layers the statistics stay as they are, and have no average
        moving = {name: shape for name, shape in shapes.items() if _moves(name, trained)}
        found |= _split(_vector(arrays, "ema_statistics", what), moving, what)
        averaged |= set(moving)
    return in_memory(what, found, averaged)


def _vector(arrays: Mapping[str, NDArray[Any]], name: str, what: str) -> NDArray[Any]:
    if name not in arrays or arrays[name].ndim != 1:
        found = f"one of shape {list(arrays[name].shape)}" if name in arrays else "none"
        raise EffdetError(f"{what}: expected a vector {name}, got {found}; take another checkpoint")
    return arrays[name]


def _moves(name: str, trained: Mapping[str, tuple[int, ...]]) -> bool:
    layer, _, leaf = name.rpartition("/")
    return leaf in BN_STATISTICS and f"{layer}/gamma" in trained


def _with_its_classes(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, length: int
) -> dict[str, tuple[int, ...]]:
    """The shapes, with a class head for as many classes as make up for the difference to the vector's length."""
    bias, kernel = "class_net/class-predict/bias", "class_net/class-predict/pointwise_kernel"
    if bias not in shapes:
        return dict(shapes)
    a_class = config.anchors_a_cell * (1 + config.fpn_channels)  # numbers
    more = (length - sum(math.prod(shape) for shape in shapes.values())) // a_class
    values = shapes[bias][0] + more * config.anchors_a_cell
    return {**shapes, bias: (values,), kernel: (*shapes[kernel][:3], values)}


def _split(vector: NDArray[Any], shapes: Mapping[str, tuple[int, ...]], what: str) -> dict[str, NDArray[Any]]:
    sizes = [math.prod(shape) for shape in shapes.values()]
    if sum(sizes) != len(vector) or min(sizes, default=0) < 0:
        raise EffdetError(f"{what}: is of another model: expected {sum(sizes)} numbers, got {len(vector)}")
    parts = np.split(vector, np.cumsum(sizes)[:-1]) if sizes else []
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
