"""Frozen layers: they stay as they are, and a checkpoint holds them all the same."""

import itertools

import numpy as np
import pytest

from effdet.errors import EffdetError
from effdet.train_state import TrainState, freeze
from effdet.weights import published_variables
from tests.effdet.tiny import IMAGES_AN_EPOCH, OPTIMIZATION, tiny_batch, tiny_model, tiny_trainer


def _values(model):
    return {name: variable.numpy() for name, variable in published_variables(model).items()}


def _train(model, steps):
    trainer = tiny_trainer(TrainState(model, OPTIMIZATION.momentum, loss_scaling=False))
    list(trainer.run(map(tiny_batch, itertools.count()), steps, IMAGES_AN_EPOCH))
    return trainer.state


@pytest.mark.slow
def test_a_frozen_backbone_stays_and_the_rest_learns():
    model = tiny_model()
    freeze(model, "^tiny/")
    before = _values(model)
    state = _train(model, 2)
    after, averaged = _values(model), state.averaged_arrays()
    changed = {name for name, value in before.items() if not np.array_equal(after[name], value)}
    averaged_changed = {name for name, value in before.items() if not np.array_equal(averaged[name], value)}
    kernels = {name for name in before if name.endswith("kernel") and not name.startswith("tiny/")}
    assert kernels <= changed & averaged_changed
    assert not [name for name in changed | averaged_changed if name.startswith("tiny/")]


@pytest.mark.slow
def test_a_checkpoint_holds_the_frozen_layers():
    model = tiny_model(seed=1)
    freeze(model, "^tiny/")
    trained = _train(model, 1)
    other = tiny_model(seed=2)
    freeze(other, "^tiny/")
    restored = TrainState(other, OPTIMIZATION.momentum, loss_scaling=False)
    restored.restore(trained.step, trained.arrays())
    for name, value in _values(model).items():
        np.testing.assert_array_equal(_values(other)[name], value, err_msg=name)


@pytest.mark.slow
def test_normalization_alone_is_frozen():
    model = tiny_model()
    freeze(model, "/gamma$")
    before = _values(model)
    _train(model, 1)
    changed = {name for name, value in _values(model).items() if not np.array_equal(value, before[name])}
    assert not [name for name in changed if name.endswith(("gamma", "beta", "moving_mean", "moving_variance"))]
    assert any(name.endswith("kernel") for name in changed)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("[", "no regular expression"), ("resnet", "found in no variable's name; names are like tiny/"), (".", "nothing")],
)
def test_a_pattern_that_cannot_be_meant(pattern, message):
    with pytest.raises(EffdetError, match=message):
        freeze(tiny_model(), pattern)
