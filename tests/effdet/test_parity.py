"""Every model of the family against the published network (published_network.py), which the golden outputs hold.

Compared eagerly, an operation at a time, as the golden outputs were made. With the formula's weights the lite models
pass rounding on enlarged: float32 and float64 of the same published rules differ by 3e-4 (lite0) to 7e-3 (lite4) of an
output's deviation, and so does a tf.function, in which TensorFlow merges operations. D0, D5 and D6 stay below 2e-5.
"""

import numpy as np
import pytest

from effdet import model, weights
from effdet.config import MODELS, model_config
from tests.effdet import published_network
from tests.effdet.published import expected_variables, formula_array, golden_outputs

BOUND = 1e-4  # of an output's standard deviation


def assert_near(found, expected):
    spread = expected.std(dtype=np.float64)  # D7x's squares overflow float32
    assert 0.3 < spread < np.inf  # else nothing is proved
    assert np.abs(np.asarray(found) - expected).max() <= BOUND * spread


def formula_arrays(name):
    return {path: formula_array(path, shape) for path, shape in expected_variables(name).items()}


@pytest.mark.parametrize("name", ["efficientdet-d0", "efficientdet-lite0"])
def test_published_rules_give_the_references_outputs(name):
    image, *expected = golden_outputs(name)
    for found, values in zip(published_network.outputs(name, formula_arrays(name), image), expected, strict=True):
        assert_near(found, values)


# Sides that the levels divide; then unequal ones; then published ones that leave odd levels: 320 is 40, 20, 10, 5, 3.
SMALLEST = [(name, (2 ** MODELS[name].max_level,) * 2) for name in MODELS]
OTHERS = [
    ("efficientdet-d1", (128, 256)),
    ("efficientdet-d7x", (512, 256)),
    ("efficientdet-lite3x", (256, 128)),
    ("efficientdet-d0", (320, 448)),
    ("efficientdet-lite0", (320, 320)),
    ("efficientdet-lite2", (448, 448)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "image_size"), SMALLEST + OTHERS)
def test_network_is_the_published_one(name, image_size):
    arrays = formula_arrays(name)
    image = np.random.default_rng(7).standard_normal((1, *image_size, 3)).astype(np.float32)
    net = model.build(model_config(name, 90, image_size))
    weights.assign(net, arrays)
    found = net(image, training=False)
    classes, boxes = published_network.outputs(name, arrays, image)
    assert_near(found["class_logits"], classes)
    assert_near(found["box_deltas"], boxes)
