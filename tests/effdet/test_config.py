"""The tables of the family, and what a config refuses."""

import dataclasses
import json

import pytest

from effdet.config import BACKBONES, MODELS, ModelConfig, model_config
from effdet.errors import EffdetError


def test_family_is_complete():
    assert list(MODELS) == [
        *(f"efficientdet-d{size}" for size in (*range(8), "7x")),
        *(f"efficientdet-lite{size}" for size in (0, 1, 2, 3, "3x", 4)),
    ]
    assert {config.backbone for config in MODELS.values()} == set(BACKBONES)


@pytest.mark.parametrize(
    ("name", "side", "anchor_scale", "fusion", "activation", "max_level"),
    [
        ("efficientdet-d0", 512, 4, "fast", "swish", 7),
        ("efficientdet-d1", 640, 4, "fast", "swish", 7),
        ("efficientdet-d2", 768, 4, "fast", "swish", 7),
        ("efficientdet-d3", 896, 4, "fast", "swish", 7),
        ("efficientdet-d4", 1024, 4, "fast", "swish", 7),
        ("efficientdet-d5", 1280, 4, "fast", "swish", 7),
        ("efficientdet-d6", 1280, 4, "sum", "swish", 7),
        ("efficientdet-d7", 1536, 5, "sum", "swish", 7),
        ("efficientdet-d7x", 1536, 4, "sum", "swish", 8),
        ("efficientdet-lite0", 320, 3, "sum", "relu6", 7),
        ("efficientdet-lite1", 384, 3, "sum", "relu6", 7),
        ("efficientdet-lite2", 448, 3, "sum", "relu6", 7),
        ("efficientdet-lite3", 512, 4, "sum", "relu6", 7),
        ("efficientdet-lite3x", 640, 3, "sum", "relu6", 7),
        ("efficientdet-lite4", 640, 4, "sum", "relu6", 7),
    ],
)
def test_published_figures(name, side, anchor_scale, fusion, activation, max_level):
    config = MODELS[name]
    assert config.image_size == (side, side)
    assert (config.anchor_scale, config.fusion, config.activation) == (anchor_scale, fusion, activation)
    assert config.levels == range(3, max_level + 1)
    assert (config.num_scales, config.aspect_ratios) == (3, (1.0, 2.0, 0.5))
    assert (config.batch_norm_momentum, config.batch_norm_epsilon) == (0.99, 1e-3)
    assert config.survival_probability == (1.0 if name == "efficientdet-d0" else 0.8)


@pytest.mark.parametrize("name", MODELS)
def test_lite_models_take_other_pixels(name):
    mean, std = MODELS[name].pixel_mean, MODELS[name].pixel_std
    if "lite" in name:
        assert (mean, std) == ((127,) * 3, (128,) * 3)
    else:
        assert (mean, std) == (pytest.approx((123.675, 116.28, 103.53)), pytest.approx((58.395, 57.12, 57.375)))


def test_feature_sizes_and_anchors_of_d0():
    config = model_config("efficientdet-d0", 90)
    assert config.feature_sizes == {3: (64, 64), 4: (32, 32), 5: (16, 16), 6: (8, 8), 7: (4, 4)}
    assert config.num_anchors == 49_104  # 9 * (4096 + 1024 + 256 + 64 + 16)


def test_levels_above_the_backbone_round_up():
    # published lite0: 320 / 64 = 5 cells at level 6, and 2.5 at level 7
    sizes = model_config("efficientdet-lite0", 90).feature_sizes
    assert [rows for rows, _ in sizes.values()] == [40, 20, 10, 5, 3]


def test_image_size_is_height_then_width():
    config = model_config("efficientdet-d0", 7, [256, 384])
    assert config.image_size == (256, 384)
    assert config.feature_sizes[3] == (32, 48)
    assert config.num_classes == 7


def test_unknown_model_names_the_family():
    with pytest.raises(EffdetError, match=r"'efficientdet-d9'.*efficientdet-d0, .*efficientdet-lite4"):
        model_config("efficientdet-d9", 90)


@pytest.mark.parametrize(
    ("image_size", "nearest"),
    [((500, 512), [512, 512]), ((512, 300), [512, 288]), ((8, 512), [32, 512]), ((0, 0), [32, 32])],
)
def test_sides_that_no_level_divides(image_size, nearest):
    with pytest.raises(EffdetError) as caught:
        model_config("efficientdet-d0", 90, image_size)
    assert f"got {list(image_size)}; nearest are {nearest}" in str(caught.value)


def test_image_size_of_one_number():
    with pytest.raises(EffdetError, match=r"expected \[height, width\]"):
        model_config("efficientdet-d0", 90, [512])


def test_no_classes():
    with pytest.raises(EffdetError, match="at least 1, got 0"):
        model_config("efficientdet-d0", 0)


@pytest.mark.parametrize("name", MODELS)
def test_config_survives_json(name):
    config = model_config(name, 6, (128, 256))
    assert ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_config_of_other_keys():
    fields = dataclasses.asdict(MODELS["efficientdet-d0"])
    fields["colour"] = fields.pop("fusion")
    with pytest.raises(EffdetError, match=r"missing keys \['fusion'\], unknown keys \['colour'\]"):
        ModelConfig.from_dict(fields)
