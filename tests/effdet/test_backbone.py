"""EfficientNets: rounding rules, and features equal to keras.applications' with the same random weights."""

import keras
import numpy as np
import pytest

from effdet import backbone, layers, weight_sources
from effdet.config import BACKBONES, model_config
from tests.effdet.published import formula_array

LAST_STAGES = {1: 0, 2: 1, 3: 2, 4: 4, 5: 6}  # level -> the last stage of its resolution


@pytest.mark.parametrize(
    ("channels", "width", "rounded"),
    [
        (32, 1.0, 32),
        (24, 1.1, 24),  # 26.4 is nearer to 24, 9.1 % less
        (16, 1.4, 24),  # 22.4
        (40, 1.6, 64),
        (16, 1.2, 24),  # 19.2 is nearer to 16, but that is 17 % less
        (320, 2.0, 640),
    ],
)
def test_channels_round_to_eights(channels, width, rounded):
    assert backbone.round_channels(channels, width) == rounded


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("efficientnet-b0", 16),  # 1 + 2 + 2 + 3 + 3 + 4 + 1
        ("efficientnet-b7", 55),  # 4 + 7 + 7 + 10 + 10 + 13 + 4, each 3.1 times as many, rounded up
        ("efficientnet-lite4", 30),  # 1 + 4 + 4 + 6 + 6 + 8 + 1: the outer stages stay
    ],
)
def test_number_of_blocks(name, count):
    assert len(backbone.blocks(BACKBONES[name])) == count


def test_lite_backbones_keep_the_stem():
    assert backbone.stem_channels(BACKBONES["efficientnet-lite4"]) == 32
    assert backbone.stem_channels(BACKBONES["efficientnet-b4"]) == 48  # 44.8


def test_survival_falls_with_depth():
    net = features_model(model_config("efficientdet-lite0", 1, (64, 64)))
    depths = [layer for layer in net.layers if isinstance(layer, layers.StochasticDepth)]
    # residual blocks of the 16 are 2, 4, 6, 7, 9, 10, 12, 13, 14
    expected = [1 - 0.2 * index / 16 for index in (2, 4, 6, 7, 9, 10, 12, 13, 14)]
    assert [depth.survival_probability for depth in depths] == pytest.approx(expected)
    assert [depth.index for depth in depths] == list(range(9))
    assert layers.num_stochastic_depths(net) == 9


def random_application(name):
    """A keras.applications EfficientNet of random weights and statistics, at 64 x 64."""
    application = getattr(keras.applications, name)(include_top=False, weights=None, input_shape=(64, 64, 3))
    for layer in application.layers:
        if not isinstance(layer, keras.layers.Normalization):
            prefix = "depthwise_" if isinstance(layer, keras.layers.DepthwiseConv2D) else ""
            for variable in layer.variables:
                variable.assign(formula_array(f"{layer.name}/{prefix}{variable.name}", variable.shape))
    return application


def features_model(config):
    images = keras.Input((*config.image_size, 3))
    return keras.Model(images, backbone.features(images, config))


def features_of(application):
    """Level -> output of the last layer at each resolution."""
    last_of_stage = {}
    for layer in application.layers:  # block3b_add, or block1a_project_bn where a stage is one block
        if layer.name.startswith("block") and layer.name.endswith(("project_bn", "add")):
            last_of_stage[int(layer.name[5]) - 1] = layer.output
    return keras.Model(application.input, {level: last_of_stage[stage] for level, stage in LAST_STAGES.items()})


def check_features(detector, application_name):
    config = model_config(detector, 1, (64, 64))
    ours, application = features_model(config), random_application(application_name)
    weight_sources.load(ours, config, application)
    x = np.random.default_rng(1).standard_normal((2, 64, 64, 3)).astype(np.float32)
    expected = features_of(application)(255 * x)  # it divides by 255, and its normalization is not set
    for level, actual in ours(x).items():
        spread = np.std(expected[level])
        assert spread > 0.1
        assert np.abs(actual - expected[level]).max() <= 1e-4 * spread, level


@pytest.mark.slow
def test_b0_features_are_those_of_keras_applications():
    check_features("efficientdet-d0", "EfficientNetB0")


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7])
def test_features_are_those_of_keras_applications(size):
    check_features("efficientdet-d7x" if size == 7 else f"efficientdet-d{size}", f"EfficientNetB{size}")
