"""Gradient checkpointing (arXiv:1604.06174): a network that keeps what stands between its blocks alone, and computes
the rest again when the gradient needs it.

The blocks are the backbone's, the stem with the first; the BiFPN's cells; each head at each level.
"""

import contextvars
import re
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from effdet import layers
from effdet.layers import Tensor

BACKBONE_BLOCK = re.compile(r".+\.blocks_(\d+)\..+")
TO_PYRAMID = re.compile(r"(resample_p\d+|fpn_cells\.cell_0\.fnode\d+\.resample_.+)\.conv2d")
CELL_NODE = re.compile(r"fpn_cells\.cell_(\d+)\.fnode(\d+)\.op_after_combine\d+\.bn")


def recomputing(model: keras.Model) -> Callable[..., dict[str, Tensor]]:
    """A function that is called as the model is, `(images, training)`, and runs the model's layers.

    In training it gives the model's outputs and, to rounding, its gradients, also within `layers.depth_noise` and
    `layers.synchronized`. BatchNorm's statistics move once. TensorFlow only.
    """
    known = list(model.inputs)
    blocks = []
    for outputs in _borders(model):
        blocks.append(Block(known, outputs))
        known += outputs
    structure = model.compute_output_spec(model.inputs[0])
    end = Block(known, model.outputs)  # joins each head's levels

    def network(images: Tensor, training: bool) -> Any:
        if not training:
            return model(images, training=False)
        values = {id(model.inputs[0]): images}
        for block in blocks:
            outputs = _recomputed(block)(*block.arguments(values))
            values |= {id(tensor): value for tensor, value in zip(block.function.outputs, outputs, strict=True)}
        return keras.tree.pack_sequence_as(structure, end(end.arguments(values), training=True))

    return network


def _recomputed(block: "Block") -> Any:
    """The block in training, run again for its gradient: in the contexts of now, and moving statistics once."""
    context = contextvars.copy_context()
    seen: dict[str, tuple[Tensor, ...]] = {}

    def run(*inputs: Tensor) -> Any:
        with layers.recomputation(seen):
            return block(list(inputs), training=True)

    return tf.recompute_grad(lambda *inputs: context.run(run, *inputs))


class Block(keras.layers.Layer):  # type: ignore[misc]
    """The part of a model that leads from those of `known` that it takes to `outputs`. It owns none of the layers."""

    def __init__(self, known: list[keras.KerasTensor], outputs: list[keras.KerasTensor]) -> None:
        super().__init__(autocast=False)
        self.function = keras.Function(_needed(known, outputs), outputs)

    def arguments(self, values: dict[int, Tensor]) -> list[Tensor]:
        """The block's inputs of the values of tensors, by identity."""
        return [values[id(tensor)] for tensor in self.function.inputs]

    def call(self, inputs: list[Tensor], training: bool) -> Any:
        return self.function(inputs)  # its layers take `training` from this one


def _borders(model: keras.Model) -> Iterator[list[keras.KerasTensor]]:
    """The outputs of each block that others take, in an order of computation."""
    starts: dict[int, keras.KerasTensor] = {}  # of backbone blocks
    features: dict[int, keras.KerasTensor] = {}  # that the pyramid takes, by identity
    nodes: dict[int, dict[int, keras.KerasTensor]] = {}  # of each cell
    for layer in model.layers:  # in an order of computation
        if match := BACKBONE_BLOCK.fullmatch(layer.name):
            starts.setdefault(int(match[1]), layer.input)
        elif TO_PYRAMID.fullmatch(layer.name):
            features[id(layer.input)] = layer.input
        elif match := CELL_NODE.fullmatch(layer.name):
            nodes.setdefault(int(match[1]), {})[int(match[2])] = layer.output
    ends = [starts[index] for index in sorted(starts)[1:]]
    for tensor in {id(tensor): tensor for tensor in [*ends, *features.values()]}.values():
        yield [tensor]
    for _, cell in sorted(nodes.items()):
        # A cell of n levels has n - 1 nodes top-down, of which the last one's is an output, and n - 1 bottom-up.
        yield [cell[index] for index in sorted(cell)[len(cell) // 2 - 1 :]]
    for tensor in model.outputs:
        while len(sources := _sources(tensor)) == 1:
            (tensor,) = sources
        for level in sources:
            yield [level]


def _sources(tensor: keras.KerasTensor) -> list[keras.KerasTensor]:
    """What the operation that gives a tensor takes."""
    operation, index, _ = tensor._keras_history
    return list(operation._inbound_nodes[index].input_tensors)


def _needed(known: list[keras.KerasTensor], outputs: list[keras.KerasTensor]) -> list[keras.KerasTensor]:
    """Those of `known` that outputs are computed from, if they are computed from no others."""
    borders = {id(tensor) for tensor in known}
    found: dict[int, keras.KerasTensor] = {}
    reached: set[int] = set()
    ahead = list(outputs)
    while ahead:
        tensor = ahead.pop()
        if id(tensor) in borders:
            found[id(tensor)] = tensor
        elif id(tensor) not in reached:
            reached.add(id(tensor))
            ahead += _sources(tensor)
    return list(found.values())
