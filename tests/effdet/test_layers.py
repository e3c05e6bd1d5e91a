"""Each layer against its plain form, another implementation, or hand-computed numbers; values and gradients."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from effdet import layers
from effdet.errors import EffdetError

MOMENTUM, EPSILON = 0.99, 1e-3


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_error(actual, expected):
    actual, expected = (np.asarray(tf.cast(array, tf.float32)) for array in (actual, expected))
    return np.abs(actual - expected).max() / np.abs(expected).max()


def batch_norm_with_gradients(normalize, compiled):
    """Output, new statistics, and gradients with respect to x, gamma, beta."""
    x, gamma, beta = random(4, 6, 5, 8) * 3 + 1, random(8, seed=1), random(8, seed=2)
    moving = (random(8, seed=3), np.abs(random(8, seed=4)))

    @tf.function(jit_compile=compiled)
    def run():
        inputs = [tf.constant(array) for array in (x, gamma, beta)]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y, mean, variance = normalize(*inputs, moving, MOMENTUM, EPSILON)
            loss = tf.reduce_sum(y * random(4, 6, 5, 8, seed=5))
        return [y, mean, variance, *tape.gradient(loss, inputs)]

    return run()


@pytest.mark.parametrize("compiled", [False, True])
def test_fused_batch_norm_is_the_composed_one(compiled):
    fused = batch_norm_with_gradients(layers.fused_batch_norm, compiled)
    composed = batch_norm_with_gradients(layers.composed_batch_norm, compiled)
    assert [relative_error(a, b) for a, b in zip(fused, composed, strict=True)] == pytest.approx([0] * 6, abs=1e-6)


def normalization(dtype="float32"):
    return layers.FusedBatchNormalization(MOMENTUM, EPSILON, dtype=dtype)


def test_batch_norm_statistics_by_hand():
    # one channel, values 1, 3, 5, 7: mean 4, variance 5, unbiased 20 / 3
    layer = normalization()
    y = layer(np.array([1.0, 3.0, 5.0, 7.0], np.float32).reshape(1, 2, 2, 1), training=True)
    assert np.ravel(y) == pytest.approx(np.array([-3, -1, 1, 3]) / np.sqrt(5.001), rel=1e-6)
    assert float(layer.moving_mean[0]) == pytest.approx(0.99 * 0 + 0.01 * 4)
    assert float(layer.moving_variance[0]) == pytest.approx(0.99 * 1 + 0.01 * 20 / 3)


def test_batch_norm_in_inference_is_keras_own():
    x = random(2, 4, 4, 8)
    layer, keras_layer = normalization(), keras.layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON)
    for each in (layer, keras_layer):
        each.build(x.shape)
        each.set_weights([random(8, seed=1), random(8, seed=2), random(8, seed=3), np.abs(random(8, seed=4))])
    assert relative_error(layer(x, training=False), keras_layer(x, training=False)) < 1e-6


def test_frozen_batch_norm_keeps_its_statistics():
    layer, x = normalization(), random(2, 4, 4, 8)
    layer.build(x.shape)
    layer.trainable = False
    assert np.array_equal(layer(x, training=True), layer(x, training=False))
    assert not np.asarray(layer.moving_mean).any()


def test_only_a_free_layer_in_training_asks_the_other_ranks():
    def gradient(trainable, training):
        asked, layer, x = [], normalization(), tf.constant(random(2, 4, 4, 8))
        layer.build(x.shape)
        layer.trainable = trainable
        with layers.synchronized(lambda tensor: asked.append(tensor) or tensor[None], 1), tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
        tape.gradient(y, x)
        return len(asked)

    assert [gradient(True, True), gradient(False, True), gradient(True, False)] == [2, 0, 0]  # forward and backward


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_batch_norm_statistics_are_float32_under_mixed_precision(policy):
    x = random(8, 16, 16, 4) * 200 + 300  # squares overflow float16
    mixed, plain = normalization(policy), normalization()
    y = mixed(x, training=True)
    plain(tf.cast(tf.cast(x, y.dtype), tf.float32), training=True)
    assert y.dtype == mixed.compute_dtype
    assert {variable.dtype for variable in mixed.variables} == {"float32"}
    assert relative_error(mixed.moving_variance, plain.moving_variance) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_fused_swish_is_keras_own(compiled):
    x, upstream = tf.constant(random(2, 3, 5, 7) * 8), random(2, 3, 5, 7, seed=1)

    def with_gradient(swish):
        @tf.function(jit_compile=compiled)
        def run():
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = swish(x)
            return y, tape.gradient(y, x, upstream)

        return run()

    for actual, expected in zip(with_gradient(layers.fused_swish), with_gradient(keras.ops.silu), strict=True):
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_swish_gradient_in_half_precision_is_rounded_once(dtype, bound):
    x = tf.cast(random(64) * 8, dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layers.fused_swish(x)
    gradient = tape.gradient(y, x)
    wide = np.asarray(tf.cast(x, tf.float32), np.float64)
    sigmoid = 1 / (1 + np.exp(-wide))
    assert gradient.dtype == y.dtype == x.dtype
    assert np.abs(np.asarray(tf.cast(gradient, tf.float32)) - sigmoid * (1 + wide * (1 - sigmoid))).max() < bound


def normalized_swish(policy, swish, over_one_rank=False):
    """Output and gradients of swish after batch normalization in training, and the graph."""
    x, upstream = tf.constant(random(4, 6, 5, 8) * 3 + 100), random(4, 6, 5, 8, seed=1)
    layer = normalization(policy)
    layer.build(x.shape)
    layer.set_weights([random(8, seed=2), random(8, seed=3), np.zeros(8), np.ones(8)])
    one_rank = layers.synchronized(lambda tensor: tensor[None], 1) if over_one_rank else contextlib.nullcontext()

    @tf.function(autograph=False)
    def run():
        with one_rank, tf.GradientTape() as tape:
            tape.watch(x)
            y = swish(layer(tf.cast(x, layer.compute_dtype), training=True))
        sources = [x, layer.gamma.value, layer.beta.value]
        return y, *tape.gradient(y, sources, tf.cast(upstream, y.dtype))

    return run(), run.get_concrete_function().graph


@pytest.mark.parametrize("over_one_rank", [False, True])
@pytest.mark.parametrize(("policy", "bound"), [("float32", 2e-6), ("mixed_float16", 2e-3), ("mixed_bfloat16", 1.6e-2)])
def test_swish_after_batch_norm_is_keras_own(policy, bound, over_one_rank):
    found, _ = normalized_swish(policy, layers.fused_swish, over_one_rank)
    expected, _ = normalized_swish(policy, keras.ops.silu)
    assert [relative_error(a, b) for a, b in zip(found, expected, strict=True)] == pytest.approx([0] * 4, abs=bound)


def test_swish_keeps_nothing_of_batch_norm_for_the_gradient():
    def uses(swish):  # of the normalized values; the gradient's begins with a reshape
        _, graph = normalized_swish("float32", swish)
        (norm,) = [operation for operation in graph.get_operations() if operation.type == "FusedBatchNormV3"]
        return {use.type for use in norm.outputs[0].consumers()}

    def not_told(x):
        del x.normalized
        return layers.fused_swish(x)

    assert "Reshape" in uses(not_told)
    assert "Reshape" not in uses(layers.fused_swish)


def test_swish_layer_takes_the_fused_form_in_training_only():
    layer, x = layers.Swish(), tf.constant(random(2, 2, 2, 3))
    graphs = [
        tf.function(lambda t, mode=mode: layer(t, training=mode)).get_concrete_function(x) for mode in (True, False)
    ]
    kinds = [{operation.type for operation in graph.graph.get_operations()} for graph in graphs]
    assert ["IdentityN" in kind for kind in kinds] == [True, False]  # what a custom gradient leaves in a graph
    assert np.array_equal(layer(x, training=True), layer(x, training=False))


@pytest.mark.parametrize(("kernel_size", "strides", "size"), [(3, 1, 7), (5, 2, 8), (3, 2, 7)])
def test_depthwise_convolution_is_keras_own(kernel_size, strides, size):
    x = random(2, size, size, 4)
    ours = layers.DepthwiseConvolution(kernel_size, strides)
    theirs = keras.layers.DepthwiseConv2D(kernel_size, strides, padding="same", use_bias=False)
    assert ours.compute_output_shape(x.shape) == theirs(x).shape
    ours.build(x.shape)
    theirs.set_weights(ours.get_weights())
    assert relative_error(ours(x), theirs(x)) < 1e-6


def test_separable_convolution_is_keras_own():
    x = random(2, 5, 6, 4)
    ours = layers.SeparableConvolution(3, "glorot_uniform", bias=-1.5)
    theirs = keras.layers.SeparableConv2D(3, 3, padding="same")
    theirs.build(x.shape)
    ours.build(x.shape)
    assert np.array_equal(ours.bias, [-1.5] * 3)
    theirs.set_weights(ours.get_weights())
    assert relative_error(ours(x), theirs(x)) < 1e-6


def test_bfloat16_keeps_depthwise_convolutions_in_float32_without_a_gpu(monkeypatch):
    layer = layers.DepthwiseConvolution(3, 1, dtype="mixed_bfloat16")
    x = tf.cast(random(1, 8, 8, 4), tf.bfloat16)
    layer.build(x.shape)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    kernel = tf.convert_to_tensor(layer.depthwise_kernel)
    wide = tf.nn.depthwise_conv2d(tf.cast(x, tf.float32), kernel, [1, 1, 1, 1], "SAME")
    assert np.array_equal(layer(x), tf.cast(wide, tf.bfloat16))


def test_fast_fusion_by_hand():
    layer = layers.FastFusion()
    maps = [np.full((1, 1, 1, 2), value, np.float32) for value in (1.0, 10.0, 100.0)]
    layer.build([each.shape for each in maps])
    assert [variable.name for variable in layer.variables] == ["WSM", "WSM_1", "WSM_2"]
    layer.set_weights([np.float32(3), np.float32(-2), np.float32(1)])  # a negative weight counts as 0
    assert np.ravel(layer(maps)) == pytest.approx([(3 * 1 + 1 * 100) / 4.0001] * 2)


@pytest.mark.parametrize("target", [(6, 10), (5, 9), (6, 9)])
def test_upsampling_is_the_published_nearest_neighbour(target):
    x = random(2, 3, 5, 4)
    expected = tf.compat.v1.image.resize_nearest_neighbor(x, target)  # 3 rows to 5: 0 0 1 1 2
    for training in (True, False):
        assert np.array_equal(layers.Upsample(target)(x, training=training), expected)


def test_stochastic_depth_drops_images_and_scales_the_rest():
    layer = layers.StochasticDepth(0.8, index=1)
    noise = tf.constant([[0.9, 0.1], [0.0, 0.79], [0.0, 0.8], [0.0, 0.99]])
    with layers.depth_noise(noise):
        y = layer(np.ones((4, 1, 1, 1), np.float32), training=True)
    assert np.ravel(y) == pytest.approx([1.25, 1.25, 0, 0])  # 1 / 0.8


def test_stochastic_depth_outside_of_training_is_identity():
    x = random(2, 1, 1, 3)
    assert np.array_equal(layers.StochasticDepth(0.5, index=0)(x, training=False), x)


def test_training_without_noise_says_what_to_do():
    with pytest.raises(EffdetError, match="depth_noise"):
        layers.StochasticDepth(0.5, index=0)(random(2, 1, 1, 3), training=True)
