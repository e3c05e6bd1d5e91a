"""Gradient checkpointing: the network that computes its blocks again against the network that keeps all."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from effdet import layers
from effdet.config import model_config
from effdet.errors import EffdetError
from effdet.model import build
from effdet.recompute import _borders, recomputing
from tests.effdet.tiny import CONFIG, tiny_model

pytestmark = pytest.mark.slow

SWISH = dataclasses.replace(CONFIG, activation="swish", fusion="fast", max_level=6)


def differentiated(model, network, graph=True):
    """Outputs, gradients of all trainable variables, and the statistics after it."""
    values = np.random.default_rng(0)
    images = tf.constant(values.standard_normal((4, 64, 64, 3)), tf.float32)
    noise = tf.constant(values.uniform(size=(4, layers.num_stochastic_depths(model))), tf.float32)
    variables = [variable.value for variable in model.trainable_variables]

    def run():
        with tf.GradientTape() as tape:
            with layers.depth_noise(noise):  # the gradient is taken outside of it
                outputs = network(images, training=True)
            loss = sum(tf.reduce_sum(tf.sin(output)) for output in outputs.values())
        return outputs, tape.gradient(loss, variables)

    outputs, gradients = (tf.function(run, autograph=False) if graph else run)()
    gradient = {v.path: g.numpy() for v, g in zip(model.trainable_variables, gradients, strict=True)}
    statistics = {v.path: v.numpy() for v in model.non_trainable_variables}
    return {name: output.numpy() for name, output in outputs.items()}, gradient, statistics


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name].tobytes() != expected[name].tobytes()] == []


def assert_equal_runs(model, twin, graph=True, same_bits=True):
    outputs, gradient, statistics = differentiated(model, recomputing(model), graph)
    expected_outputs, expected_gradient, expected_statistics = differentiated(twin, twin, graph)
    assert all(output.std() > 0.05 for output in expected_outputs.values())
    if same_bits:
        assert_same_bits(outputs, expected_outputs)
        assert_same_bits(statistics, expected_statistics)
    for found, expected in ((outputs, expected_outputs), (statistics, expected_statistics)):
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    largest = max(np.abs(each).max() for each in expected_gradient.values())
    for name, expected in expected_gradient.items():
        # The sums over what takes a feature are done in another order.
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-4, atol=1e-6 * largest, err_msg=name)


def test_outputs_and_statistics_are_the_same_and_gradients_to_rounding():
    """Stochastic depth takes part: its noise is of the first pass."""
    assert layers.num_stochastic_depths(tiny_model()) > 0
    assert_equal_runs(tiny_model(), tiny_model())


def test_so_with_swish_learnt_fusion_and_a_level_beyond_the_backbone():
    """TensorFlow's graph optimizer merges other operations where other ones take their results: to rounding."""
    assert_equal_runs(tiny_model(SWISH), tiny_model(SWISH), same_bits=False)


def test_so_outside_of_a_graph():
    assert_equal_runs(tiny_model(), tiny_model(), graph=False)


def test_frozen_layers_stay():
    model, twin = tiny_model(), tiny_model()
    for net in (model, twin):
        for layer in net.layers:
            layer.trainable = not layer.name.startswith("fpn_cells.")
    before = {v.path: v.numpy() for v in model.variables}
    assert_equal_runs(model, twin)
    after = {v.path: v.numpy() for v in model.variables}
    moved = {path for path in before if before[path].tobytes() != after[path].tobytes()}
    assert moved
    assert not [path for path in moved if path.startswith("fpn_cells.")]


def test_mixed_precision():
    """Gradients differ from the plain ones by far less than those do from float32's."""
    model, twin = tiny_model(precision="mixed_float16"), tiny_model(precision="mixed_float16")
    outputs, gradient, statistics = differentiated(model, recomputing(model))
    expected_outputs, expected_gradient, expected_statistics = differentiated(twin, twin)
    assert_same_bits(outputs, expected_outputs)
    assert_same_bits(statistics, expected_statistics)
    wide = tiny_model()
    found, expected, exact = (
        np.concatenate([np.ravel(each) for each in gradients.values()])
        for gradients in (gradient, expected_gradient, differentiated(wide, wide)[1])
    )
    assert 0 < np.linalg.norm(found - expected) < 0.2 * np.linalg.norm(expected - exact)


def test_outside_of_training_it_is_the_model():
    model = tiny_model()
    images = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    found, expected = recomputing(model)(images, training=False), model(images, training=False)
    assert_same_bits(*({name: value.numpy() for name, value in each.items()} for each in (found, expected)))


def test_it_asks_for_noise_as_the_model_does():
    with pytest.raises(EffdetError, match="depth_noise"):
        recomputing(tiny_model())(np.zeros((1, 64, 64, 3), np.float32), training=True)


@pytest.mark.parametrize("name", ["efficientdet-d0", "efficientdet-d7x", "efficientdet-lite4"])
def test_borders_of_published_models(name):
    """Ends of the blocks but the last, three features, of which two are such ends, cells of 5 or 6 maps, two heads."""
    config = model_config(name, 3, (128, 128))
    model = build(config)
    borders = [len(tensors) for tensors in _borders(model)]
    num_blocks = len({layer.name.split(".")[1] for layer in model.layers if ".blocks_" in layer.name})
    num_levels = len(config.levels)
    assert borders == [1] * num_blocks + [num_levels] * config.fpn_repeats + [1] * 2 * num_levels
