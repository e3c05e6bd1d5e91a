"""The layers Keras has not, or not fast enough: fused batch normalization, also over the images of all ranks, swish,
depthwise convolutions with the published variable names, weighted fusion, stochastic depth.

Fused operations run on the TensorFlow backend; every other backend takes the keras.ops form, which
a test holds equal in value and gradient. Layouts are channels last.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from effdet.config import ModelConfig
from effdet.errors import EffdetError

Tensor = Any  # of whichever backend, eager or symbolic


def on_tensorflow() -> bool:
    """Whether the fused TensorFlow forms can run."""
    return bool(keras.backend.backend() == "tensorflow")


# --- batch normalization ------------------------------------------------------------------------


def fused_batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving: tuple[Tensor, Tensor],
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training-mode batch normalization of x [B,h,w,C] by TensorFlow's fused kernel.

    Gives the output in x's type and the new moving mean and variance, float32 [C].
    """
    y, mean, unbiased = tf.compat.v1.nn.fused_batch_norm(x, gamma, beta, epsilon=epsilon)
    count = tf.cast(tf.size(x) // x.shape[-1], tf.float32)
    _remember(y, x, gamma, beta, mean, unbiased * ((count - 1.0) / count), epsilon)
    return (y, *_moved(moving, (mean, unbiased), momentum))


def _remember(
    y: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> None:
    """Notes at y, normalized x, for fused_swish how to make it again: rows of x, less a shift, times a scale, plus."""
    y.normalized = x, mean, gamma * tf.math.rsqrt(variance + epsilon), tf.convert_to_tensor(beta)


def _moved(before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor], momentum: float) -> tuple[Tensor, Tensor]:
    """Moving mean and variance after a batch of these."""
    mean, variance = (momentum * old + (1.0 - momentum) * new for old, new in zip(before, now, strict=True))
    return mean, variance


def composed_batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving: tuple[Tensor, Tensor],
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as fused_batch_norm, of keras.ops."""
    wide = ops.cast(x, "float32")  # statistics of half precision overflow
    mean = ops.mean(wide, axis=(0, 1, 2))
    variance = ops.mean(ops.square(wide - mean), axis=(0, 1, 2))
    scale = gamma * ops.rsqrt(variance + epsilon)
    y = ops.cast(wide * scale + (beta - mean * scale), x.dtype)
    count = ops.cast(ops.size(x) // ops.shape(x)[-1], "float32")
    unbiased = variance * (count / ops.maximum(count - 1.0, 1.0))  # as the fused kernel
    return (y, *_moved(moving, (mean, unbiased), momentum))


_ranks: ContextVar[tuple[Callable[[Tensor], Tensor], int] | None] = ContextVar("ranks", default=None)


@contextlib.contextmanager
def synchronized(stack: Callable[[Tensor], Tensor], size: int) -> Iterator[None]:
    """Within it batch normalization in training takes mean and variance over the images of all `size` ranks.

    `stack` gives every rank's tensor of one shape, [size, ...], by rank. Each rank has as many images. A layer stacks
    once forward and once in the gradient, which is that of the sum of all ranks' losses. TensorFlow only, and nothing
    that `jit_compile` could compile.
    """
    token = _ranks.set((stack, size))
    try:
        yield
    finally:
        _ranks.reset(token)


def _statistics_of_ranks(
    x: Tensor, epsilon: float, stack: Callable[[Tensor], Tensor], size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and unbiased variance, float32 [C], of x [B,h,w,C] and every other rank's together."""
    channels = x.shape[-1]
    count = tf.cast(tf.size(x) // channels, tf.float32)  # of a rank
    # The kernel takes half precision without a copy of x in float32. The variance it tells is unbiased.
    _, mean, variance = tf.compat.v1.nn.fused_batch_norm(
        tf.stop_gradient(x), tf.ones([channels]), tf.zeros([channels]), epsilon=epsilon
    )
    means, squares = tf.unstack(stack(tf.stack([mean, variance * (count - 1.0)])), axis=1)  # [size,C]
    mean = tf.reduce_mean(means, axis=0)
    # Of deviations: sums of squares are too large to tell the difference that a small variance is.
    sum_of_squares = tf.reduce_sum(squares + count * tf.square(means - mean), axis=0)
    count *= size
    return mean, sum_of_squares / count, sum_of_squares / tf.maximum(count - 1.0, 1.0)


def _normalized_over_ranks(
    inputs: tuple[Tensor, Tensor, Tensor],
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    stack: Callable[[Tensor], Tensor],
    size: int,
) -> Tensor:
    """x of (x, gamma, beta) normalized by statistics of all ranks; the gradient takes them for what the x made them."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def normalize(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        def gradient(upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # As if the statistics were fixed; gamma's and beta's are this rank's share, as any other weight's.
            _, d_gamma, d_beta, *_ = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=upstream,
                x=x,
                scale=gamma,
                reserve_space_1=mean,
                reserve_space_2=variance,
                reserve_space_3=tf.zeros([0]),
                epsilon=epsilon,
                is_training=False,
            )
            count = tf.cast(size * (tf.size(x) // x.shape[-1]), tf.float32)
            # Over all ranks, the means of upstream and of upstream * normalized x: what the statistics pass on.
            mean_beta, mean_gamma = tf.unstack(tf.reduce_sum(stack(tf.stack([d_beta, d_gamma])), axis=0) / count)
            inverse = tf.math.rsqrt(variance + epsilon)
            rows = [tf.reshape(each, [-1, x.shape[-1]]) for each in (upstream, x)]
            d_x = _input_gradient(*rows, mean, mean_beta, mean_gamma * inverse, gamma * inverse)
            return tf.reshape(d_x, tf.shape(x)), d_gamma, d_beta

        y, *_ = tf.compat.v1.nn.fused_batch_norm(x, gamma, beta, mean, variance, epsilon=epsilon, is_training=False)
        return y, gradient

    x, gamma, beta = (tf.convert_to_tensor(each) for each in inputs)
    y = normalize(x, gamma, beta)
    _remember(y, x, gamma, beta, mean, variance, epsilon)
    return y


@tf.function(jit_compile=True, autograph=False)  # type: ignore[untyped-decorator]
def _input_gradient(upstream: Tensor, x: Tensor, mean: Tensor, shift: Tensor, slope: Tensor, scale: Tensor) -> Tensor:
    """scale * (upstream - shift - slope * (x - mean)) of rows [N,C] in one pass; the others are float32 [C]."""
    wide = tf.cast(upstream, tf.float32) - shift - slope * (tf.cast(x, tf.float32) - mean)
    return tf.cast(scale * wide, x.dtype)


_seen: ContextVar[dict[str, tuple[Tensor, ...]] | None] = ContextVar("seen", default=None)


@contextlib.contextmanager
def recomputation(seen: dict[str, tuple[Tensor, ...]]) -> Iterator[None]:
    """For running layers again whose results were not kept: with the same dictionary, empty the first time.

    Batch normalization updates its moving statistics the first time only, and does not ask the ranks again.
    """
    token = _seen.set(seen)
    try:
        yield
    finally:
        _seen.reset(token)


class FusedBatchNormalization(keras.layers.Layer):  # type: ignore[misc]
    """Batch normalization over [B,h,w,C]; float32 parameters and statistics under any dtype policy.

    In training the moving variance takes the batch's unbiased (Bessel-corrected) variance, as the
    published Keras layer with its fused kernel does. A frozen layer (`trainable = False`) normalizes
    by the moving statistics and keeps them.
    """

    def __init__(self, momentum: float, epsilon: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.momentum = momentum
        self.epsilon = epsilon

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        def add(name: str, initializer: str, trainable: bool) -> keras.Variable:
            return self.add_weight((input_shape[-1],), initializer, trainable=trainable, autocast=False, name=name)

        self.gamma = add("gamma", "ones", trainable=True)
        self.beta = add("beta", "zeros", trainable=True)
        self.moving_mean = add("moving_mean", "zeros", trainable=False)
        self.moving_variance = add("moving_variance", "ones", trainable=False)

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        gamma, beta = ops.convert_to_tensor(self.gamma), ops.convert_to_tensor(self.beta)
        mean = ops.convert_to_tensor(self.moving_mean)
        variance = ops.convert_to_tensor(self.moving_variance)
        if training and self.trainable:
            return self._normalize_batch(x, gamma, beta, (mean, variance))
        if on_tensorflow():
            return tf.compat.v1.nn.fused_batch_norm(
                x, gamma, beta, mean, variance, epsilon=self.epsilon, is_training=False
            )[0]
        scale = gamma * ops.rsqrt(variance + self.epsilon)
        return ops.cast(ops.cast(x, "float32") * scale + (beta - mean * scale), x.dtype)

    def _normalize_batch(self, x: Tensor, gamma: Tensor, beta: Tensor, moving: tuple[Tensor, Tensor]) -> Tensor:
        """x normalized by its own statistics, or by those of all ranks; moves the moving ones the first time."""
        ranks, seen = _ranks.get(), _seen.get()
        first = seen is None or self.name not in seen
        statistics: tuple[Tensor, ...] = ()
        if ranks is None:
            normalize = fused_batch_norm if on_tensorflow() else composed_batch_norm
            y, *moved = normalize(x, gamma, beta, moving, self.momentum, self.epsilon)
        else:
            statistics = seen[self.name] if seen and not first else _statistics_of_ranks(x, self.epsilon, *ranks)
            batch_mean, variance, unbiased = statistics
            y = _normalized_over_ranks((x, gamma, beta), batch_mean, variance, self.epsilon, *ranks)
            moved = list(_moved(moving, (batch_mean, unbiased), self.momentum))
        if first:
            self.moving_mean.assign(moved[0])
            self.moving_variance.assign(moved[1])
        if seen is not None:
            seen[self.name] = statistics
        return y

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape


def batch_normalization(config: ModelConfig, name: str) -> FusedBatchNormalization:
    """A new layer of the model's figures."""
    return FusedBatchNormalization(config.batch_norm_momentum, config.batch_norm_epsilon, name=name)


# --- activations --------------------------------------------------------------------------------


@tf.function(jit_compile=True, autograph=False)  # type: ignore[untyped-decorator]
def _swish_gradient(x: Tensor, upstream: Tensor) -> Tensor:
    wide = tf.cast(x, tf.float32)
    sigmoid = tf.sigmoid(wide)
    slope = sigmoid * (1.0 + wide * (1.0 - sigmoid))
    return tf.cast(tf.cast(upstream, tf.float32) * slope, x.dtype)


@tf.function(jit_compile=True, autograph=False)  # type: ignore[untyped-decorator]
def _normalized_swish_gradient(rows: Tensor, upstream: Tensor, shift: Tensor, scale: Tensor, plus: Tensor) -> Tensor:
    """The same with respect to what batch normalization made of rows [N,C]; the others are float32 [C]."""
    wide = (tf.cast(rows, tf.float32) - shift) * scale + plus
    return _swish_gradient(tf.cast(wide, rows.dtype), upstream)


def fused_swish(x: Tensor) -> Tensor:
    """x * sigmoid(x) that keeps x alone for the gradient and computes that in one compiled pass.

    It does not keep x either where that is the output of batch normalization, whose input is kept anyway: x is made
    of it again in the same pass. That is a fifth of the memory of a training step.
    """
    source = getattr(x, "normalized", None)

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def swish(x: Tensor) -> Tensor:
        def gradient(upstream: Tensor) -> Tensor:
            # flat, so that one trace and no rank-specific loop serve every feature map
            if source is None:
                flat = _swish_gradient(tf.reshape(x, [-1]), tf.reshape(upstream, [-1]))
            else:
                before, *figures = source
                rows = [tf.reshape(each, [-1, before.shape[-1]]) for each in (before, upstream)]
                flat = _normalized_swish_gradient(*rows, *figures)
            return tf.reshape(flat, tf.shape(upstream))

        return x * tf.sigmoid(x), gradient

    return swish(x)


class Swish(keras.layers.Layer):  # type: ignore[misc]
    """x * sigmoid(x). Only training takes the custom gradient: an inference graph stays exportable."""

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        return fused_swish(x) if training and on_tensorflow() else x * ops.sigmoid(x)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape


def activation(name: str) -> keras.layers.Layer:
    """A new layer of the activation `name`: "swish" or "relu6"."""
    return {"swish": Swish, "relu6": lambda: keras.layers.ReLU(max_value=6.0)}[name]()


# --- convolutions -------------------------------------------------------------------------------


def _depthwise_dtype(compute_dtype: str) -> str:
    """float32 for bfloat16 without a GPU: depthwise kernels in bfloat16 are slower than float32 on CPUs."""
    on_cpu = not tf.config.list_physical_devices("GPU")
    return "float32" if compute_dtype == "bfloat16" and on_cpu else compute_dtype


def backbone_initializer() -> keras.initializers.Initializer:
    """Start values of a backbone kernel, as published: normal, of variance 2 / fan-out."""
    return keras.initializers.VarianceScaling(2.0, mode="fan_out", distribution="untruncated_normal")


class DepthwiseConvolution(keras.layers.Layer):  # type: ignore[misc]
    """A backbone's depthwise convolution, padding "same", without bias."""

    def __init__(self, kernel_size: int, strides: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kernel_size = kernel_size
        self.strides = strides

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.depthwise_kernel = self.add_weight(
            name="depthwise_kernel",
            shape=(self.kernel_size, self.kernel_size, input_shape[-1], 1),
            initializer=backbone_initializer(),
            autocast=False,
        )

    def call(self, x: Tensor) -> Tensor:
        dtype = _depthwise_dtype(self.compute_dtype)
        kernel = ops.cast(self.depthwise_kernel, dtype)
        y = ops.depthwise_conv(ops.cast(x, dtype), kernel, self.strides, "same")
        return ops.cast(y, self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        batch, *sides, channels = input_shape
        return (batch, *(side and -(-side // self.strides) for side in sides), channels)


class SeparableConvolution(keras.layers.Layer):  # type: ignore[misc]
    """A 3x3 depthwise, then a 1x1 convolution with bias, padding "same".

    `initializer` is Keras' name of what both kernels start from, `bias` what the bias starts from.
    """

    def __init__(self, filters: int, initializer: str, bias: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.initializer = initializer
        self.bias_start = bias

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        channels = input_shape[-1]
        self.depthwise_kernel = self.add_weight(
            name="depthwise_kernel",
            shape=(3, 3, channels, 1),
            initializer=keras.initializers.get(self.initializer),
            autocast=False,
        )
        self.pointwise_kernel = self.add_weight(
            name="pointwise_kernel",
            shape=(1, 1, channels, self.filters),
            initializer=keras.initializers.get(self.initializer),
        )
        self.bias = self.add_weight(
            name="bias",
            shape=(self.filters,),
            initializer=keras.initializers.Constant(self.bias_start),
        )

    def call(self, x: Tensor) -> Tensor:
        dtype = _depthwise_dtype(self.compute_dtype)
        y = ops.depthwise_conv(ops.cast(x, dtype), ops.cast(self.depthwise_kernel, dtype), 1, "same")
        y = ops.conv(ops.cast(y, self.compute_dtype), self.pointwise_kernel, 1, "same")
        return ops.add(y, self.bias)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.filters)


# --- feature pyramid ----------------------------------------------------------------------------


class FastFusion(keras.layers.Layer):  # type: ignore[misc]
    """Fast-normalized fusion of equal feature maps: sum of relu(w_i) x_i / (sum of relu(w) + 1e-4)."""

    def build(self, input_shape: list[tuple[int | None, ...]]) -> None:
        self.fusion_weights = [
            self.add_weight(name=f"WSM_{i}" if i else "WSM", shape=(), initializer="ones", autocast=False)
            for i in range(len(input_shape))
        ]

    def call(self, xs: list[Tensor]) -> Tensor:
        weights = [ops.relu(ops.convert_to_tensor(weight)) for weight in self.fusion_weights]
        norm = sum(weights[1:], start=weights[0]) + 1e-4
        terms = [x * ops.cast(weight / norm, x.dtype) for x, weight in zip(xs, weights, strict=True)]
        return sum(terms[1:], start=terms[0])

    def compute_output_shape(self, input_shape: list[tuple[int | None, ...]]) -> tuple[int | None, ...]:
        return input_shape[0]


class Upsample(keras.layers.Layer):  # type: ignore[misc]
    """Doubles [B,h,w,C] to the nearest neighbour, cut to target_size (an odd side is one less than double)."""

    def __init__(self, target_size: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.target_size = tuple(target_size)

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        height, width = self.target_size
        if not training and on_tensorflow():  # one operation in every export; its gradient on GPUs is not repeatable
            doubled = tf.raw_ops.ResizeNearestNeighbor(images=x, size=[2 * side for side in x.shape[1:3]])
        else:
            doubled = ops.repeat(ops.repeat(x, 2, axis=1), 2, axis=2)
        return doubled if doubled.shape[1:3] == self.target_size else doubled[:, :height, :width]

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (input_shape[0], *self.target_size, input_shape[-1])


# --- stochastic depth ---------------------------------------------------------------------------

_depth_noise: ContextVar[Tensor | None] = ContextVar("depth_noise", default=None)


@contextlib.contextmanager
def depth_noise(noise: Tensor) -> Iterator[None]:
    """Runs a model in training with noise float32 [B, number of StochasticDepth layers], uniform in [0, 1).

    The caller draws it, a row an image, so that what a step does depends on its seed and images only,
    not on how many processes share the batch.
    """
    token = _depth_noise.set(noise)
    try:
        yield
    finally:
        _depth_noise.reset(token)


class StochasticDepth(keras.layers.Layer):  # type: ignore[misc]
    """Drops an image's residual branch in training (arXiv:1603.09382); survivors are scaled by 1 / p.

    `index` is its column in the noise of `depth_noise`.
    """

    def __init__(self, survival_probability: float, index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.survival_probability = survival_probability
        self.index = index

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        if not training:
            return x
        noise = _depth_noise.get()
        if noise is None:
            raise EffdetError(
                "this model trains with stochastic depth: call it inside "
                "`with layers.depth_noise(noise)`, noise float32 [B, layers.num_stochastic_depths(model)]"
            )
        survives = ops.cast(noise[:, self.index] < self.survival_probability, x.dtype)
        return x * ops.reshape(survives / self.survival_probability, (-1, 1, 1, 1))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape


def num_stochastic_depths(model: keras.Model) -> int:
    """How many columns of noise the model takes in training; 0 where it takes none."""
    return sum(isinstance(layer, StochasticDepth) for layer in model.layers)
