"""The model as an ONNX file: inputs and outputs as effdet.export says, batch and picture size free."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import onnx
import tf2onnx

from effdet.config import ModelConfig
from effdet.errors import EffdetError
from effdet.export import PIXELS, Classes, pixels_function
from effdet.postprocess import PostprocessConfig

OPSET = 18
CLASSES_KEY = "classes"  # of the file's metadata
DIMENSIONS = ("batch", "height", "width")


def export_onnx(
    path: Path, model: keras.Model, config: ModelConfig, postprocess: PostprocessConfig | None, classes: Classes
) -> None:
    """Writes the file, of operators of opset OPSET alone.

    Without postprocess it gives class_logits float32 [B,A,K] and box_deltas float32 [B,A,4] in place of detections.
    The same arguments give the same bytes.
    """
    function = pixels_function(model, config, postprocess, batch=None)
    proto, _ = tf2onnx.convert.from_function(function, function.input_signature, opset=OPSET)
    foreign = sorted({node.op_type for node in _nodes(proto.graph) if node.domain not in ("", "ai.onnx")})
    if foreign:  # the converter leaves what it does not know as it is
        raise EffdetError(f"{path}: operations without a counterpart in ONNX opset {OPSET}: {', '.join(foreign)}")
    _drop_idle_reshapes(proto)
    _fold_batch_normalizations(proto.graph)
    _canonize(proto.graph)
    _name_dimensions(proto.graph)
    proto.graph.name = config.name
    proto.graph.ClearField("doc_string")  # the function's name, with TensorFlow's number of it
    onnx.helper.set_model_props(proto, {CLASSES_KEY: classes.to_json()})
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The graph's nodes and those of the graphs inside of them: a loop's body."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *(node for body in inner for node in _nodes(body))]


def _drop_idle_reshapes(proto: onnx.ModelProto) -> None:
    """Takes out reshapes to the shape that is there.

    The converter writes transpositions of levels of 1 x 1 as reshapes, and leaves now more of them, now less.
    """
    graph = proto.graph
    inferred = onnx.shape_inference.infer_shapes(proto).graph.value_info
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in inferred}
    targets = {tensor.name: onnx.numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer if tensor.dims}
    outputs = {value.name for value in graph.output}
    sources: dict[str, str] = {}  # what comes out of an idle reshape -> what goes in
    for node in [node for node in graph.node if node.op_type == "Reshape" and node.output[0] not in outputs]:
        batch, *sizes = targets.get(node.input[1], [0])
        if batch == -1 and min(sizes, default=0) > 0 and shapes.get(node.input[0], [])[1:] == sizes:
            sources[node.output[0]] = sources.get(node.input[0], node.input[0])
            graph.node.remove(node)
    for node in _nodes(graph):
        node.input[:] = [sources.get(name, name) for name in node.input]


def _fold_batch_normalizations(graph: onnx.GraphProto) -> None:
    """Into the convolutions before them, as the converter does with some: with which changes with Python's hashes."""
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    uses = Counter(name for node in _nodes(graph) for name in node.input)
    convolutions = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        convolution = convolutions.get(norm.input[0])
        if convolution is None or uses[norm.input[0]] > 1:
            continue
        scale, offset, mean, variance = (constants[name] for name in norm.input[1:])
        (epsilon,) = (attribute.f for attribute in norm.attribute if attribute.name == "epsilon")
        factor = scale / np.sqrt(variance + epsilon)
        weights, *bias = (constants[name] for name in convolution.input[1:])
        folded = {"weights": weights * factor[:, None, None, None], "bias": (sum(bias) - mean) * factor + offset}
        for name, array in folded.items():
            graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), f"{norm.name}_{name}"))
        convolution.input[1:] = [f"{norm.name}_{name}" for name in folded]
        convolution.output[0] = norm.output[0]
        graph.node.remove(norm)
    used = {name for node in _nodes(graph) for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _canonize(graph: onnx.GraphProto, outer: Mapping[str, str] | None = None, scope: str = "") -> None:
    """Names every value by a hash of what computes it, and orders nodes by depth, then name; equal nodes become one.

    The converter's names and order follow from where its objects lie in memory. The graph's inputs and outputs keep
    their names. `outer` is for the graph of a loop's body: the new names of the values around it.
    """
    names = {"": "", **(outer or {})}
    names |= {value.name: f"{scope}{place}" if scope else value.name for place, value in enumerate(graph.input)}
    kept = set() if scope else {value.name for value in graph.output}
    constants = {}
    for tensor in graph.initializer:
        name, tensor.name = tensor.name, ""
        tensor.name = names[name] = f"{scope}constant_{_digest(tensor.SerializeToString(deterministic=True))}"
        constants[tensor.name] = tensor
    nodes: dict[str, onnx.NodeProto] = {}
    depths: dict[str, int] = {}
    for node in graph.node:  # each after those that it needs
        needed = set(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                needed |= {name for inner in _nodes(attribute.g) for name in inner.input} & names.keys()
                _canonize(attribute.g, names, f"{scope}{attribute.name}_")
                attribute.g.name = attribute.name  # in place of one that the converter numbers
        depth = 1 + max((depths.get(names[name], 0) for name in needed), default=0)
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        outputs, inputs = list(node.output), [names[name] for name in node.input]
        op_type, domain = node.op_type, node.domain
        node.Clear()
        node.CopyFrom(onnx.NodeProto(op_type=op_type, domain=domain or None, input=inputs, attribute=attributes))
        node.output[:] = [output for output in outputs if output in kept]
        node.name = f"{scope}{op_type}_{_digest(node.SerializeToString(deterministic=True))}"
        for place, output in enumerate(outputs):
            if output:  # else an optional one that is not asked for
                names[output] = output if output in kept else f"{node.name}_{place}"
                depths[names[output]] = depth
        node.output[:] = [names[output] for output in outputs]
        nodes.setdefault(node.name, node)
    ordered = sorted(nodes.values(), key=lambda node: (max(depths.get(name, 0) for name in node.output), node.name))
    for value in (*graph.input, *graph.output):
        value.name = names[value.name]
        if scope:  # the converter numbers what it does not know, through the life of a process
            for dimension in value.type.tensor_type.shape.dim:
                dimension.ClearField("dim_param")
    for field, content in ((graph.node, ordered), (graph.initializer, [constants[name] for name in sorted(constants)])):
        copies = [type(message).FromString(message.SerializeToString()) for message in content]
        del field[:]
        field.extend(copies)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _name_dimensions(graph: onnx.GraphProto) -> None:
    """In place of the converter's numbers, which count through the life of a process."""
    for value in (*graph.input, *graph.output):
        dimensions = DIMENSIONS if value.name == PIXELS else DIMENSIONS[:1]
        for place, name in enumerate(dimensions):
            value.type.tensor_type.shape.dim[place].dim_param = name
