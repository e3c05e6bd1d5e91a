"""A model's files: what was written comes back, and what does not fit together is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from effdet.weights import published_variables
from pipeline.errors import PipelineError
from pipeline.model_files import read_description, read_model, require_same_pictures
from tests.pipeline.judged_model import CLASSES, weights, write_trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    write_trained(folder, apply_exif=True)
    return folder


@pytest.fixture
def model(tmp_path, trained):
    """A copy of the model's folder that a test may spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in trained.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change(folder, **fields):
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_round_trip(trained):
    stored = read_model(trained)
    assert stored.config.name == "efficientdet-lite0"
    assert stored.config.image_size == (128, 128)
    assert [row.model_dump() for row in stored.classes] == CLASSES
    assert (stored.weights.kind, stored.weights.epoch, stored.weights.selected_by) == ("ema", 3, "val AP")
    assert stored.apply_exif is True
    expected = weights(stored.model)
    for name, variable in published_variables(stored.model).items():
        np.testing.assert_array_equal(np.asarray(variable), expected[name])


def test_model_that_says_nothing_of_exif_is_for_pictures_as_stored(model):
    assert read_description(model).apply_exif is True
    content = json.loads((model / "model.json").read_text())
    del content["apply_exif"]
    (model / "model.json").write_text(json.dumps(content))
    assert read_description(model).apply_exif is False


def test_model_for_pictures_turned_otherwise_than_the_data():
    ours, theirs = Path("data/model/model.json"), Path("data/shards/manifest.json")
    require_same_pictures(True, ours, True, theirs)
    words = r"^data/model/model\.json: apply_exif is True, and False in data/shards/manifest\.json: the model would see"
    with pytest.raises(PipelineError, match=words):
        require_same_pictures(True, ours, False, theirs)


def test_same_weights_are_the_same_bytes(trained, tmp_path):
    write_trained(tmp_path / "again", apply_exif=True)
    for name in ("model.json", "weights.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()


def test_weights_of_another_model(model):
    content = bytearray((model / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "weights.safetensors").write_bytes(content)
    with pytest.raises(PipelineError, match=r"weights\.safetensors: is sha256:\w+, and model\.json says sha256:\w+"):
        read_model(model)


def test_missing_weights(model):
    (model / "weights.safetensors").unlink()
    with pytest.raises(PipelineError, match=r"weights\.safetensors: weights not found"):
        read_model(model)


def test_missing_description(tmp_path):
    with pytest.raises(PipelineError, match=r"model\.json: model description not found; run `dvc repro`"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": 2}, "expected format 1, got 2"),
        ({"weights": {"kind": "ema"}}, r"weights\.epoch: Field required"),
        ({"classes": []}, r"classes: class_id must rise within 0\.\.3, got \[\]"),
        ({"classes": [{"class_id": 4, "category_id": 1, "name": "x"}]}, r"must rise within 0\.\.3, got \[4\]"),
        ({"classes": [CLASSES[1], CLASSES[0]]}, r"must rise within 0\.\.3, got \[1, 0\]"),
    ],
)
def test_description_that_does_not_fit(model, fields, words):
    change(model, **fields)
    with pytest.raises(PipelineError, match=words):
        read_description(model)


def test_configuration_of_another_version(model):
    fields = json.loads((model / "model.json").read_text())["model"]
    change(model, model={**fields, "unheard_of": 1})
    with pytest.raises(PipelineError, match=r"unknown keys \['unheard_of'\]; train again"):
        read_model(model)


def test_configuration_that_the_weights_do_not_fit(model):
    fields = json.loads((model / "model.json").read_text())["model"]
    change(model, model={**fields, "num_classes": 5})
    with pytest.raises(PipelineError, match="shape of "):
        read_model(model)
