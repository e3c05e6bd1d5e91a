"""The whole network: the reference's numbers, every model's variables, precisions, gradients, export."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from effdet import bifpn, heads, layers, model, weights
from effdet.config import MODELS, model_config
from effdet.errors import EffdetError
from tests.effdet.published import (
    FIVE_LEVELS,
    SIX_LEVELS,
    TRAINABLE,
    expected_variables,
    formula_array,
    golden_outputs,
    golden_variables,
)


def set_formula_weights(net):
    shapes = {name: tuple(variable.shape) for name, variable in weights.published_variables(net).items()}
    weights.assign(net, {name: formula_array(name, shape) for name, shape in shapes.items()})


def small_config(name="efficientdet-d0", image_size=(64, 64), **changes):
    """A network of the family with one BiFPN cell and one head convolution."""
    return dataclasses.replace(model_config(name, 3, image_size), fpn_repeats=1, head_repeats=1, **changes)


@pytest.mark.parametrize("name", ["efficientdet-d0", "efficientdet-lite0"])
def test_outputs_and_variables_are_the_references(name):
    net = model.build(model_config(name, 90, (128, 128)))
    shapes = {path: tuple(variable.shape) for path, variable in weights.published_variables(net).items()}
    assert shapes == golden_variables(name)
    set_formula_weights(net)
    image, classes, boxes = golden_outputs(name)
    outputs = net(image, training=False)
    for actual, expected in ((outputs["class_logits"], classes), (outputs["box_deltas"], boxes)):
        assert expected.std() > 0.3  # else nothing is proved
        assert np.abs(actual - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("name", ["efficientdet-d0", "efficientdet-lite0"])
def test_rules_of_names_and_shapes_are_the_references(name):
    assert expected_variables(name) == golden_variables(name)


@pytest.mark.parametrize("name", MODELS)
def test_rules_of_names_and_shapes_give_the_published_counts(name):
    trainable = [shape for path, shape in expected_variables(name).items() if "/moving_" not in path]
    assert sum(int(np.prod(shape)) for shape in trainable) == TRAINABLE[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_variables_of_every_model(name):
    net = model.build(model_config(name, 90, (256, 256)))
    shapes = {path: tuple(variable.shape) for path, variable in weights.published_variables(net).items()}
    assert shapes == expected_variables(name)
    assert sum(int(np.prod(variable.shape)) for variable in net.trainable_variables) == TRAINABLE[name]


@pytest.mark.parametrize(("levels", "expected"), [(range(3, 8), FIVE_LEVELS), (range(3, 9), SIX_LEVELS)])
def test_nodes_of_the_pyramid(levels, expected):
    assert tuple((node.level, node.inputs) for node in bifpn.nodes(levels)) == expected


@pytest.mark.parametrize("image_size", [(64, 128), (160, 96)])  # level 7: 1 x 1, and 2 x 1 of rounded-up halves
def test_sides_may_differ(image_size):
    config = small_config("efficientdet-lite0", image_size)
    outputs = model.build(config)(np.zeros((2, *image_size, 3), np.float32))
    assert outputs["class_logits"].shape == (2, config.num_anchors, 3)
    assert outputs["box_deltas"].shape == (2, config.num_anchors, 4)


def test_fresh_class_head_expects_one_percent():
    features = keras.Input((8, 8, 64))
    net = keras.Model(features, heads.class_head({3: features}, small_config()))
    bias = weights.published_variables(net)["class_net/class-predict/bias"]
    assert 1 / (1 + np.exp(-np.asarray(bias))) == pytest.approx([0.01] * 27)  # 9 anchors, 3 classes


@pytest.mark.parametrize(
    ("name", "policy", "bound"),
    [
        ("efficientdet-lite0", "mixed_bfloat16", 0.15),
        pytest.param("efficientdet-lite0", "mixed_float16", 0.02, marks=pytest.mark.slow),
        pytest.param("efficientdet-d0", "mixed_bfloat16", 0.15, marks=pytest.mark.slow),
        pytest.param("efficientdet-d0", "mixed_float16", 0.02, marks=pytest.mark.slow),
    ],
)
def test_mixed_precision(name, policy, bound):
    config = small_config(name)
    plain, mixed = model.build(config), model.build(config, policy)
    assert keras.config.dtype_policy().name == "float32"  # as before
    compute = policy.removeprefix("mixed_")
    assert {layer.compute_dtype for layer in mixed.layers if layer.weights} == {compute}
    assert {variable.dtype for variable in mixed.variables} == {"float32"}
    for net in (plain, mixed):
        set_formula_weights(net)
    image = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    expected, actual = plain(image), mixed(image)
    for key, values in expected.items():
        assert actual[key].dtype == tf.float32
        spread = np.std(values)
        assert spread > 0.1
        assert np.sqrt(np.mean((actual[key] - values) ** 2)) < bound * spread


def test_unknown_policy():
    with pytest.raises(EffdetError, match="got 'float16'"):
        model.build(small_config(), "float16")


def training_gradients(net, image):
    """Gradients of a weighted sum of all outputs, in training."""
    noise = np.random.default_rng(1).random((len(image), layers.num_stochastic_depths(net)), np.float32)

    @tf.function(autograph=False)
    def run():
        with tf.GradientTape() as tape, layers.depth_noise(noise):
            outputs = net(image, training=True)
            loss = sum(
                tf.reduce_sum(tf.sin(tf.range(tf.size(y), dtype=y.dtype)) * tf.reshape(y, [-1]))
                for y in outputs.values()
            )
        return tape.gradient(loss, [variable.value for variable in net.trainable_variables])

    return run()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientdet-lite0", "efficientdet-d0"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_every_variable_is_trained(name, policy):
    net = model.build(small_config(name), policy)
    set_formula_weights(net)
    before = np.asarray(net.get_layer(f"{MODELS[name].backbone}.stem.tpu_batch_normalization").moving_mean)
    image = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    gradients = training_gradients(net, image)
    assert all(gradient is not None and np.isfinite(gradient).all() for gradient in gradients)
    after = np.asarray(net.get_layer(f"{MODELS[name].backbone}.stem.tpu_batch_normalization").moving_mean)
    assert (after != before).all()


@pytest.mark.slow
def test_saved_model_gives_the_same_outputs(tmp_path):
    net = model.build(small_config())
    set_formula_weights(net)
    image = tf.constant(np.random.default_rng(0).standard_normal((1, 64, 64, 3)), tf.float32)

    class Served(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 64, 64, 3])])
        def serve(self, images):
            return net(images, training=False)

    served = Served()
    served.tracked = [variable.value for variable in net.variables]  # else they are not saved
    tf.saved_model.save(served, tmp_path)
    loaded = tf.saved_model.load(tmp_path)
    expected, actual = net(image), loaded.serve(image)
    for key, values in expected.items():
        assert np.abs(actual[key] - values).max() <= 1e-5 * np.std(values)


def test_every_model_of_a_process_has_the_same_layers_by_name():
    """The names order TensorFlow's graph, and so the last bits: the tenth model is to compute what the first does."""
    lite = small_config("efficientdet-lite0")
    names = [layer.name for layer in model.build(lite).layers]
    assert [layer.name for layer in model.build(lite).layers] == names
    assert {"re_lu", "re_lu_1", "add"} <= set(names)  # some have none of their own


def test_keras_numbers_other_layers_on_after_a_model():
    keras.layers.ReLU()  # the first has no number
    before, _, after = keras.layers.ReLU().name, model.build(small_config()), keras.layers.ReLU().name
    number = int(before.removeprefix("re_lu_"))
    assert after == f"re_lu_{number + 1}"
