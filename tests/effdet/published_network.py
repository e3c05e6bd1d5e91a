"""The published networks (google/automl efficientdet @d5afa2a) as a plain forward pass, apart from effdet's own code.

Written from the published rules with TensorFlow's raw operations, in float32, over a dictionary of arrays by published
name; sizes of the pyramid follow from the features themselves, as published. The golden outputs of D0 and lite0 hold
it to the reference; it then stands for the reference of the other models.
"""

import math
import re

import numpy as np
import tensorflow as tf

from tests.effdet.published import BLOCKS, FIVE_LEVELS, SCALING, SIX_LEVELS

EPSILON = 1e-3  # of batch normalization, everywhere


def outputs(model, arrays, image):
    """Class logits [1,A,90] and box deltas [1,A,4], float32, of a normalized image [1,H,W,3]."""
    net = _Network(model, arrays)
    features = net.pyramid(net.backbone(tf.constant(image, tf.float32)))
    return net.head(features, "class", 90), net.head(features, "box", 4)


class _Network:
    def __init__(self, model, arrays):
        scaling = SCALING[model]
        self.backbone_name, self.depth = f"efficientnet-{scaling[0]}", scaling[2]
        self.channels, self.cells, self.repeats, self.max_level, self.weighted = scaling[3:]
        self.lite = "lite" in model
        self.arrays = arrays

    def get(self, name):
        return tf.constant(self.arrays[name], tf.float32)

    def act(self, x):
        return tf.nn.relu6(x) if self.lite else x * tf.nn.sigmoid(x)

    def conv(self, x, name, stride=1):
        return tf.nn.conv2d(x, self.get(f"{name}/kernel"), stride, "SAME")

    def norm(self, x, name):
        parameters = [self.get(f"{name}/{leaf}") for leaf in ("gamma", "beta", "moving_mean", "moving_variance")]
        return tf.compat.v1.nn.fused_batch_norm(x, *parameters, epsilon=EPSILON, is_training=False)[0]

    def separable(self, x, name):
        depthwise, pointwise = self.get(f"{name}/depthwise_kernel"), self.get(f"{name}/pointwise_kernel")
        return tf.nn.separable_conv2d(x, depthwise, pointwise, [1, 1, 1, 1], "SAME") + self.get(f"{name}/bias")

    def backbone(self, image):
        """Features of levels 3, 4, 5."""
        name = self.backbone_name
        x = self.act(self.norm(self.conv(image, f"{name}/stem/conv2d", 2), f"{name}/stem/tpu_batch_normalization"))
        strings, count, by_side = BLOCKS.split(), 0, {}
        for number, string in enumerate(strings):
            repeats, kernel, stride, expansion, _, _ = (int(value) for value in re.findall(r"\d+", string))
            fixed = self.lite and number in (0, len(strings) - 1)
            for repeat in range(repeats if fixed else math.ceil(repeats * self.depth)):
                block = f"{name}/blocks_{count}"
                assert expansion == 1 or self.arrays[f"{block}/depthwise_conv2d/depthwise_kernel"].shape[0] == kernel
                x = self.block(x, block, stride if repeat == 0 else 1, expansion)
                count += 1
            by_side[x.shape[1:3]] = x  # the last of each resolution
        return list(by_side.values())[-3:]

    def block(self, x, name, stride, expansion):
        entry, number = x, 0
        if expansion > 1:
            x = self.act(self.norm(self.conv(x, f"{name}/conv2d"), f"{name}/tpu_batch_normalization"))
            number = 1
        x = tf.nn.depthwise_conv2d(
            x, self.get(f"{name}/depthwise_conv2d/depthwise_kernel"), [1, stride, stride, 1], "SAME"
        )
        x = self.act(self.norm(x, f"{name}/tpu_batch_normalization" + (f"_{number}" if number else "")))
        if not self.lite:
            squeezed = self.conv(tf.reduce_mean(x, [1, 2], keepdims=True), f"{name}/se/conv2d")
            squeezed = self.act(squeezed + self.get(f"{name}/se/conv2d/bias"))
            x *= tf.nn.sigmoid(self.conv(squeezed, f"{name}/se/conv2d_1") + self.get(f"{name}/se/conv2d_1/bias"))
        x = self.conv(x, f"{name}/conv2d" + (f"_{number}" if number else ""))
        x = self.norm(x, f"{name}/tpu_batch_normalization_{number + 1}")
        return x + entry if stride == 1 and entry.shape == x.shape else x

    def pyramid(self, features):
        """Fused features of levels 3 to max_level."""
        for level in range(6, self.max_level + 1):
            sides = [(side + 1) // 2 for side in features[-1].shape[1:3]]
            features = [*features, self.resample(features[-1], sides, f"resample_p{level}")]
        nodes = FIVE_LEVELS if self.max_level == 7 else SIX_LEVELS
        for cell in range(self.cells):
            maps = list(features)
            for number, (level, inputs) in enumerate(nodes):
                node, count = f"fpn_cells/cell_{cell}/fnode{number}", len(maps)
                sides = features[level - 3].shape[1:3]
                x = self.act(
                    self.fuse(
                        [
                            self.resample(maps[i], sides, f"{node}/resample_{n}_{i}_{count}")
                            for n, i in enumerate(inputs)
                        ],
                        node,
                    )
                )
                x = self.separable(x, f"{node}/op_after_combine{count}/conv")
                maps.append(self.norm(x, f"{node}/op_after_combine{count}/bn"))
            last = {level: x for (level, _), x in zip(nodes, maps[len(features) :], strict=True)}
            features = [last[level] for level in sorted(last)]
        return features

    def fuse(self, maps, node):
        if not self.weighted:
            return tf.add_n(maps)
        weights = [tf.nn.relu(self.get(f"{node}/WSM" + (f"_{n}" if n else ""))) for n in range(len(maps))]
        return tf.add_n([x * weight for x, weight in zip(maps, weights, strict=True)]) / (tf.add_n(weights) + 1e-4)

    def resample(self, x, sides, name):
        """To the pyramid's channels by a 1x1 convolution where they differ; then down by a maximum, or up by copies."""
        if x.shape[-1] != self.channels:
            x = self.norm(self.conv(x, f"{name}/conv2d") + self.get(f"{name}/conv2d/bias"), f"{name}/bn")
        (height, width), (target_height, target_width) = x.shape[1:3], sides
        if height > target_height and width > target_width:
            strides = [(height - 1) // target_height + 1, (width - 1) // target_width + 1]
            return tf.nn.max_pool2d(x, [stride + 1 for stride in strides], strides, "SAME")
        if height < target_height or width < target_width:
            return tf.compat.v1.image.resize_nearest_neighbor(x, sides)
        return x

    def head(self, features, kind, values):
        found = []
        for level, x in enumerate(features, start=3):
            for repeat in range(self.repeats):
                x = self.separable(x, f"{kind}_net/{kind}-{repeat}")
                x = self.act(self.norm(x, f"{kind}_net/{kind}-{repeat}-bn-{level}"))
            found.append(tf.reshape(self.separable(x, f"{kind}_net/{kind}-predict"), [1, -1, values]))
        return np.concatenate(found, axis=1)
