"""A detector opened from published weights, a model's folder or a checkpoint, and the command that imports one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from effdet import checkpoint
from effdet.checkpoint import Checkpoint
from effdet.config import model_config
from effdet.errors import EffdetError
from effdet.model import build
from effdet.weights import published_variables
from pipeline.class_table import class_rows
from pipeline.coco_classes import coco_classes
from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.model_files import read_model, write_network
from pipeline.model_source import open_model, read_classes
from tests.effdet.published import expected_variables, formula_array
from tests.effdet.published_files import averaged, write_archive, write_checkpoint
from tests.pipeline.judged_model import CLASSES, write_trained

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAME = "efficientdet-lite0"
HEAD = "class_net/class-predict/"


def raw(num_classes=90):
    return {name: formula_array(name, shape) for name, shape in expected_variables(NAME, num_classes).items()}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """efficientdet-lite0.tar.gz as published, for 90 classes."""
    folder = tmp_path_factory.mktemp("published")
    write_checkpoint(folder / "made" / "model", raw())
    return write_archive(folder / f"{NAME}.tar.gz", folder / "made")


def values(model):
    return {name: np.asarray(variable) for name, variable in published_variables(model).items()}


def same(arrays, expected):
    return arrays.keys() == expected.keys() and all(np.array_equal(arrays[name], expected[name]) for name in expected)


def annotations(path, ids):
    write_json(path, {"images": [], "annotations": [], "categories": [{"id": i, "name": f"c{i}"} for i in ids]})
    return path


def import_model(*arguments):
    line = [sys.executable, "-m", "pipeline.import_model", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_coco_has_80_classes_in_a_head_of_90() -> None:
    rows = coco_classes()
    assert len(rows) == 80
    assert (rows[0].class_id, rows[0].category_id, rows[0].name) == (0, 1, "person")
    assert (rows[-1].class_id, rows[-1].category_id, rows[-1].name) == (89, 90, "toothbrush")
    assert all(row.class_id == row.category_id - 1 for row in rows)
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # category ids that COCO 2017 has not
    assert {row.category_id for row in rows} == set(range(1, 91)) - gaps


def test_published_weights(archive):
    stored = open_model(str(archive))
    assert stored.config == model_config(NAME, 90)
    assert stored.classes == coco_classes()
    assert same(values(stored.model), averaged(raw()))
    assert (stored.weights.kind, stored.weights.selected_by) == ("ema", "published")
    assert not stored.apply_exif


def test_published_weights_as_trained_at_another_size(archive):
    stored = open_model(str(archive), NAME, (128, 160), ema=False)
    assert stored.config.image_size == (128, 160)
    assert same(values(stored.model), raw())
    assert stored.weights.kind == "raw"


def test_published_weights_whose_name_says_nothing(tmp_path):
    path = write_checkpoint(tmp_path / "model", {f"{HEAD}bias": np.zeros(810, np.float32)})
    with pytest.raises(PipelineError, match="which model is it"):
        open_model(str(path))


def test_nvidias_head_has_an_output_more_than_coco_has_ids(tmp_path):
    path = tmp_path / f"{NAME}.safetensors"
    safetensors.numpy.save_file(raw(91), path)
    stored = open_model(str(path), image_size=(128, 128))
    assert stored.config == model_config(NAME, 91, (128, 128))
    assert stored.classes == coco_classes()
    assert same(values(stored.model), raw(91))
    told = open_model(str(path), classes=annotations(tmp_path / "a.json", [1, 3, 90]), image_size=(128, 128))
    assert told.config == stored.config
    assert [row.class_id for row in told.classes] == [0, 2, 89]


def test_a_head_of_others_needs_its_classes(tmp_path):
    path = tmp_path / f"{NAME}.safetensors"
    safetensors.numpy.save_file({f"{HEAD}bias": np.zeros(27, np.float32)}, path)
    with pytest.raises(PipelineError, match="its head has 3 classes, and COCO's table 90; give its own with --classes"):
        open_model(str(path))
    with pytest.raises(PipelineError, match=r"its head has 3 classes, and .* makes 5; give the classes"):
        open_model(str(path), classes=annotations(tmp_path / "a.json", [1, 2, 3, 4, 5]))
    with pytest.raises(EffdetError, match="missing: "):
        open_model(str(path), classes=annotations(tmp_path / "a.json", [4, 7, 9]))


@pytest.mark.parametrize(
    ("ids", "head", "expected"),
    [
        ([1, 3, 90], 90, [0, 2, 89]),  # as the published heads count
        ([1, 2, 3], 3, [0, 1, 2]),
        ([0, 1, 2], 3, [0, 1, 2]),
        ([7, 3, 40], 3, [1, 0, 2]),  # densely, in their order
        ([1, 2, 3], 90, [0, 1, 2]),  # too few, which open_model says
    ],
)
def test_annotations_as_class_table(tmp_path, ids, head, expected):
    rows = read_classes(annotations(tmp_path / "a.json", ids), head)
    assert {row.category_id: row.class_id for row in rows} == dict(zip(ids, expected, strict=True))


def test_a_release_as_class_table(tmp_path):
    write_json(tmp_path / "classes.json", CLASSES)
    assert read_classes(tmp_path / "classes.json", 4) == class_rows(CLASSES)


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"categories": []}', '[{"class_id": 1}]', '{"categories": [3]}'])
def test_what_is_no_class_table(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(PipelineError, match=r"c\.json: "):
        read_classes(tmp_path / "c.json", 3)


def test_a_model_folder_says_itself_what_it_is(tmp_path):
    write_trained(tmp_path / "model")
    assert open_model(str(tmp_path / "model")).classes == class_rows(CLASSES)
    with pytest.raises(PipelineError, match="says itself which model it is; leave out --model"):
        open_model(str(tmp_path / "model"), NAME)
    with pytest.raises(PipelineError, match="says itself which model it is; leave out --apply-exif"):
        open_model(str(tmp_path / "model"), apply_exif=True)
    with pytest.raises(PipelineError, match="holds the averaged weights alone"):
        open_model(str(tmp_path / "model"), ema=False)


def test_a_checkpoint_with_its_description(tmp_path):
    config = model_config(NAME, 4, (128, 128))
    arrays = values(build(config))
    checkpoint.save(tmp_path / "run", "best", Checkpoint(30, arrays, {}))
    with pytest.raises(PipelineError, match=r"network\.json not found in the folder around it"):
        open_model(str(tmp_path / "run"))
    write_network(tmp_path / "run", config, class_rows(CLASSES), apply_exif=True)
    for place in ("run", "run/best-00000030.safetensors"):
        stored = open_model(str(tmp_path / place))
        assert stored.config == config
        assert stored.classes == class_rows(CLASSES)
        assert stored.apply_exif
        assert same(values(stored.model), arrays)
        assert (stored.weights.kind, stored.weights.step, stored.weights.selected_by) == ("ema", 30, "val AP")


def test_a_checkpoint_by_another_name(tmp_path, monkeypatch):
    """Copied, renamed, linked to, or named from inside its folder: what it is stands in the file."""
    config = model_config(NAME, 4, (128, 128))
    net = build(config)
    (tmp_path / "run").mkdir()
    write_network(tmp_path / "run", config, class_rows(CLASSES), apply_exif=False)
    trainable = [np.ravel(variable) for variable in net.trainable_variables]
    statistics = [np.ravel(variable) for variable in net.non_trainable_variables]
    state = {
        "weights": np.concatenate(trainable),
        "ema_weights": np.concatenate(trainable),
        "ema_statistics": np.concatenate(statistics),
        **{f"model/{name}": array for name, array in values(net).items() if "/moving_" in name},
    }
    checkpoint.save(tmp_path / "run", "best", Checkpoint(30, values(net), {}))
    checkpoint.save(tmp_path / "run", "step", Checkpoint(40, state, {"epochs": 4}))
    shutil.copy(tmp_path / "run" / "best-00000030.safetensors", tmp_path / "run" / "mine.safetensors")
    shutil.copy(tmp_path / "run" / "step-00000040.safetensors", tmp_path / "run" / "best-of-all.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "run" / "mine.safetensors")
    monkeypatch.chdir(tmp_path / "run")
    for source, step, selected_by in (
        (tmp_path / "run" / "mine.safetensors", 30, "val AP"),
        (tmp_path / "run" / "best-of-all.safetensors", 40, "last"),
        (tmp_path / "link.safetensors", 30, "val AP"),
        ("mine.safetensors", 30, "val AP"),
    ):
        stored = open_model(str(source))
        assert (stored.weights.step, stored.weights.selected_by) == (step, selected_by)
        assert same(values(stored.model), values(net))
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "run" / "mine.safetensors", tmp_path / "alone")
    with pytest.raises(PipelineError, match=r"network\.json not found in the folder around it"):
        open_model(str(tmp_path / "alone" / "mine.safetensors"))


def test_a_backbone_alone_is_no_detector(tmp_path):
    (tmp_path / f"{NAME}.pth").write_bytes(b"x")
    with pytest.raises(EffdetError, match=r"\.pth: holds a backbone alone; expected a detector's weights"):
        open_model(str(tmp_path / f"{NAME}.pth"))


def test_the_command_asks_about_a_model_as_the_others_do():
    done = import_model("nowhere", "--out", "model", "--image-size", 0, 128)
    assert done.returncode == 2
    assert "argument --image-size: expected at least 1, got 0" in done.stderr


def test_the_command_makes_a_model_folder(tmp_path, archive):
    done = import_model(archive, "--out", tmp_path / "model", "--image-size", 128, 128, "--apply-exif")
    assert done.returncode == 0, done.stderr
    assert f"{NAME}.tar.gz: TensorFlow checkpoint model: {len(raw())} variables set" in done.stdout
    stored = read_model(tmp_path / "model")
    assert stored.config == model_config(NAME, 90, (128, 128))
    assert stored.apply_exif
    assert stored.classes == coco_classes()
    assert same(values(stored.model), averaged(raw()))
    again = import_model(archive, "--out", tmp_path / "model")
    assert again.returncode == 1
    assert f"error: {tmp_path / 'model'}: is there already" in again.stderr


def test_the_command_gives_other_classes_a_fresh_head(tmp_path, archive):
    classes = annotations(tmp_path / "own.json", [1, 2, 3])
    options = ["--image-size", 128, 128, "--classes", classes, "--no-ema"]
    refused = import_model(archive, "--out", tmp_path / "model", *options)
    assert refused.returncode == 1
    assert "its head has 90 classes, and" in refused.stderr
    assert "--allow-head-mismatch" in refused.stderr
    assert not (tmp_path / "model").exists()

    done = import_model(archive, "--out", tmp_path / "model", *options, "--allow-head-mismatch")
    assert done.returncode == 0, done.stderr
    assert "class head left out: 90 classes there, 3 here" in done.stdout
    stored = read_model(tmp_path / "model")
    found = values(stored.model)
    body = {name: array for name, array in raw().items() if not name.startswith(HEAD)}
    assert same({name: found[name] for name in body}, body)
    assert found[f"{HEAD}bias"].shape == (27,)
    assert [row.name for row in stored.classes] == ["c1", "c2", "c3"]
    assert json.loads((tmp_path / "model" / "model.json").read_text())["weights"]["kind"] == "raw"


def test_the_command_refuses_a_hostile_archive_and_writes_nothing(tmp_path, archive):
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    bad = tmp_path / f"{NAME}.tar.gz"
    bad.write_bytes(content)
    done = import_model(bad, "--out", tmp_path / "model")
    assert done.returncode == 1
    assert "cannot be read as .tar.gz" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [bad.name]
