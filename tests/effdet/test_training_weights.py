"""Weights out of the checkpoints of training, to the bit those that it would hand on."""

import dataclasses
from unittest import mock

import numpy as np
import pytest

from effdet import checkpoint, weight_sources
from effdet.checkpoint import Checkpoint
from effdet.config import BACKBONES, Backbone
from effdet.errors import EffdetError
from effdet.train_state import TrainState, freeze
from effdet.weights import published_variables
from tests.effdet.tiny import CONFIG, tiny_batch, tiny_model, tiny_trainer

HEAD = "class_net/class-predict/"


def values(model):
    return {name: np.asarray(variable) for name, variable in published_variables(model).items()}


def same(arrays, expected):
    return arrays.keys() == expected.keys() and all(np.array_equal(arrays[name], expected[name]) for name in expected)


def trained(folder, frozen):
    """Two steps of training, saved both ways: averaged arrays and those as trained."""
    model = tiny_model()
    if frozen:
        freeze(model, frozen)
    state = TrainState(model, 0.9, loss_scaling=False)
    trainer = tiny_trainer(state)
    list(trainer.run(iter([tiny_batch(0), tiny_batch(1)]), 2, 8))
    checkpoint.save(folder, "best", Checkpoint(2, state.averaged_arrays(), {}))
    checkpoint.save(folder, "step", Checkpoint(2, state.arrays(), {}, 2))
    return state.averaged_arrays(), values(model)


@pytest.fixture(scope="module", params=[None, "^tiny/", "^class_net/"], ids=["all", "backbone frozen", "head frozen"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *trained(folder, request.param)


@pytest.fixture(scope="module")
def fresh():
    return tiny_model(seed=9)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["step-00000002.safetensors", "best-00000002.safetensors", "."])
def test_averaged_weights(run, fresh, place):
    folder, averaged, raw = run
    assert not same(averaged, raw)
    loaded = weight_sources.load(fresh, CONFIG, folder / place)
    assert same(values(fresh), averaged)
    assert loaded.averaged > 0


@pytest.mark.slow
def test_weights_as_trained(run, fresh):
    folder, _, raw = run
    assert weight_sources.load(fresh, CONFIG, folder / "step-00000002.safetensors", ema=False).averaged == 0
    assert same(values(fresh), raw)
    with pytest.raises(EffdetError, match="holds the averaged weights alone"):
        weight_sources.load(fresh, CONFIG, folder / "best-00000002.safetensors", ema=False)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("place", ["step-00000002.safetensors", "best-00000002.safetensors"])
def test_another_number_of_classes(run, place, classes):
    folder, averaged, _ = run
    config = dataclasses.replace(CONFIG, num_classes=classes)
    other = tiny_model(config)
    before = values(other)
    with pytest.raises(EffdetError, match=f"3 classes there, {classes} here"):
        weight_sources.load(other, config, folder / place)
    assert same(values(other), before)
    weight_sources.load(other, config, folder / place, allow_head_mismatch=True)
    expected = {name: before[name] if name.startswith(HEAD) else averaged[name] for name in before}
    assert same(values(other), expected)


@pytest.mark.slow
def test_a_state_of_another_network(run, tmp_path):
    other = dataclasses.replace(CONFIG, fpn_channels=24)
    with pytest.raises(EffdetError, match=r"is of another model|do not fit"):
        weight_sources.load(tiny_model(other), other, run[0] / "step-00000002.safetensors", allow_head_mismatch=True)


@pytest.mark.slow
def test_a_damaged_checkpoint(run, fresh, tmp_path):
    _, averaged, _ = run
    checkpoint.save(tmp_path, "best", Checkpoint(1, averaged, {}))
    file = tmp_path / "best-00000001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    before = values(fresh)
    with pytest.raises(EffdetError, match="damaged: the arrays' SHA-256 differs"):
        weight_sources.load(fresh, CONFIG, tmp_path)
    assert same(values(fresh), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arrays", "ema", "words"),
    [
        ({"ema_weights": 3}, True, "is of another model"),
        ({"ema_weights": 3}, False, "expected a vector weights, got none"),
        ({"ema_weights": None}, True, "expected a vector ema_statistics, got none"),
        ({"ema_weights": None, "ema_statistics": ()}, True, r"expected a vector ema_statistics, got one of shape \[\]"),
    ],
)
def test_a_state_that_lacks_arrays(tmp_path, arrays, ema, words):
    model = tiny_model()
    length = sum(variable.shape.num_elements() for variable in model.trainable_variables)
    others = {name: value for name, value in values(model).items() if "moving_" in name}
    kept = {name: np.zeros(length if shape is None else shape, np.float32) for name, shape in arrays.items()}
    kept |= {f"model/{name}": value for name, value in others.items()}
    checkpoint.save(tmp_path, "step", Checkpoint(1, kept, {}))
    with pytest.raises(EffdetError, match=rf"training checkpoint step-00000001.safetensors: {words}"):
        weight_sources.load(model, CONFIG, tmp_path / "step-00000001.safetensors", ema=ema)


def test_a_run_without_best_weights(tmp_path):
    checkpoint.save(tmp_path, "step", Checkpoint(1, {"x": np.zeros(1, np.float32)}, {}))
    with (
        mock.patch.dict(BACKBONES, {"tiny": Backbone(width=0.25, depth=0.3, lite=True)}),
        pytest.raises(EffdetError, match=r"has no best-\.\.\. yet"),
    ):
        weight_sources.files(tmp_path)


def test_the_newest_best_of_a_run(tmp_path):
    for step in (2, 10):
        checkpoint.save(tmp_path, "best", Checkpoint(step, {"x": np.zeros(1, np.float32)}, {}))
    names = [path.relative_to(tmp_path).as_posix() for path in weight_sources.files(tmp_path)]
    assert names == ["best-00000010.safetensors"]
