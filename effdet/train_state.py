"""What training changes: weights as one vector, their averages, BatchNorm's statistics, the optimizer, the position.

What the optimizer works on is one vector of all trainable variables: reduced over the ranks in one piece, clipped,
stepped and averaged in a handful of operations where a variable at a time would take thousands.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet.errors import EffdetError
from effdet.weights import published_variables


def freeze(model: keras.Model, pattern: str) -> int:
    """Keeps layers as they are: those with a published variable name in which the regular expression is found.

    Their weights take no gradient and their BatchNorm normalizes by the moving statistics. Returns how many layers.
    EffdetError where the expression is none, finds no layer, or leaves nothing to train.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise EffdetError(f"freeze: {pattern!r} is no regular expression: {error}") from None
    names = {variable.path: name for name, variable in published_variables(model).items()}
    layers_found = [
        layer for layer in model.layers if any(expression.search(names[variable.path]) for variable in layer.variables)
    ]
    if not layers_found:
        raise EffdetError(
            f"freeze: {pattern!r} is found in no variable's name; names are like {next(iter(names.values()))}"
        )
    for layer in layers_found:
        layer.trainable = False
    if not model.trainable_variables:
        raise EffdetError(f"freeze: {pattern!r} leaves nothing to train")
    return len(layers_found)


class Vector:
    """Variables as one float32 vector [P]."""

    def __init__(self, variables: Sequence[keras.Variable]) -> None:
        self.variables = list(variables)
        self.sizes = [int(np.prod(variable.shape)) for variable in self.variables]

    def join(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        """[P] of tensors that are shaped as the variables."""
        return tf.concat([tf.zeros([0]), *(tf.reshape(tensor, [-1]) for tensor in tensors)], axis=0)

    def values(self) -> tf.Tensor:
        """[P], the variables' values."""
        return self.join([variable.value for variable in self.variables])

    def split(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """The parts of [P], shaped as the variables."""
        if not self.variables:  # a split into no parts is an error
            return []
        parts = tf.split(vector, self.sizes)
        return [tf.reshape(part, variable.shape) for variable, part in zip(self.variables, parts, strict=True)]

    def assign(self, vector: tf.Tensor) -> None:
        """Gives the variables their parts of [P]."""
        for variable, part in zip(self.variables, self.split(vector), strict=True):
            variable.value.assign(part)


class TrainState:
    """All that training changes: what a checkpoint holds."""

    def __init__(self, model: keras.Model, momentum: float, loss_scaling: bool) -> None:
        """Starts from the model's weights. `loss_scaling`: dynamic, for float16."""
        self.model = model
        self.step = 0  # steps done
        self.images = 0  # seen, by all ranks: the position in the stream of training data
        self.names = {variable.path: name for name, variable in published_variables(model).items()}
        self.trainable = Vector(model.trainable_variables)
        frozen = {variable.path for layer in model.layers if not layer.trainable for variable in layer.variables}
        moving = [variable for variable in model.non_trainable_variables if variable.path not in frozen]
        self.statistics = Vector(moving)  # of BatchNorm
        self.weights = keras.Variable(self.trainable.values(), name="weights")
        self.ema_weights = tf.Variable(self.weights.value, trainable=False)
        self.ema_statistics = tf.Variable(self.statistics.values(), trainable=False)
        self.loss_scaling = loss_scaling
        sgd = keras.optimizers.SGD(learning_rate=0.0, momentum=momentum)
        self.optimizer = keras.optimizers.LossScaleOptimizer(sgd) if loss_scaling else sgd
        self.optimizer.build([self.weights])

    def variables(self) -> dict[str, tf.Variable]:
        """Every variable but the model's trainable ones, which are `weights`."""
        return {
            "weights": self.weights.value,
            "ema_weights": self.ema_weights,
            "ema_statistics": self.ema_statistics,
            # by place: Keras numbers an optimizer's name through the life of a process
            **{f"optimizer/{i}/{variable.name}": variable.value for i, variable in enumerate(self.optimizer.variables)},
            **{f"model/{self.names[variable.path]}": variable.value for variable in self.model.non_trainable_variables},
        }

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The state's arrays; with `step` they are all of it."""
        return {"images": np.array(self.images), **{name: value.numpy() for name, value in self.variables().items()}}

    def restore(self, step: int, arrays: dict[str, NDArray[np.generic]]) -> None:
        """Goes back to where `arrays` were taken. EffdetError where they are of another model or optimizer."""
        variables = self.variables()
        ours = {name: (tuple(variable.shape), variable.dtype.name) for name, variable in variables.items()}
        ours["images"] = ((), "int64")
        theirs = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
        if ours != theirs:
            odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise EffdetError(f"checkpoint: of another model or optimizer: {odd[0]} and {len(odd) - 1} more differ")
        for name, variable in variables.items():
            variable.assign(arrays[name])
        self.trainable.assign(self.weights.value)
        self.step, self.images = step, int(arrays["images"])

    def averaged_arrays(self) -> dict[str, NDArray[np.float32]]:
        """The averaged weights and statistics, by published name."""
        with self.averaged():
            return {self.names[variable.path]: variable.numpy() for variable in self.model.variables}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[keras.Model]:
        """The model with the averaged weights and statistics; afterwards it has its own again."""
        statistics = self.statistics.values()
        self.trainable.assign(self.ema_weights)
        self.statistics.assign(self.ema_statistics)
        try:
            yield self.model
        finally:
            self.trainable.assign(self.weights.value)
            self.statistics.assign(statistics)
