"""The export command: what it writes once it has compared it, and that nothing stays where it does not get so far."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from effdet.exported import open_exported
from effdet.postprocess import PostprocessConfig
from pipeline import export_model
from pipeline.coco_metrics import coco_rows
from pipeline.detectors import decode_picture, open_detector
from pipeline.errors import PipelineError
from pipeline.export_check import EXACT, detections_of, match, of_classes
from pipeline.model_files import read_model
from pipeline.shard_files import spread_images
from tests.pipeline.judged_model import STEADY_NMS, steady, write_shards, write_trained

ROOT = Path(__file__).parents[2]
NMS = PostprocessConfig(**STEADY_NMS)
IMAGES = range(100, 107)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """params.yaml, data/model, photos of several sizes, and two COCO files about them: made up, and the model's own."""
    root = tmp_path_factory.mktemp("export")
    text = (ROOT / "params.yaml").read_text()
    for key, value in STEADY_NMS.items():
        text, count = re.subn(rf"^( +{key}:) .*$", rf"\1 {value}", text, flags=re.MULTILINE)
        assert count == 1, key
    (root / "params.yaml").write_text(text)
    write_trained(root / "data" / "model", change=steady, apply_exif=True)
    write_shards(root / "shards", {"val": len(IMAGES)}, apply_exif=True)
    (root / "photos").mkdir()
    images = spread_images([root / "shards" / "val-00000-of-00001.tfrecord"], len(IMAGES))
    for image_id, content in images.items():
        (root / "photos" / f"{image_id}.jpg").write_bytes(content)
    truth = json.loads((root / "shards" / "ground_truth_val.json").read_text())
    (root / "instances_val.json").write_text(json.dumps(truth))
    (root / "info.json").write_text(json.dumps({key: truth[key] for key in ("images", "categories")}))
    detector = open_detector(str(root / "data" / "model"), NMS)
    found = detector.detect([decode_picture(content, "a test", True) for content in images.values()])
    rows = [row for pair in zip(images, found, strict=True) for row in coco_rows(*pair, detector.classes)]
    own = [
        {**row, "id": place, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        for place, row in enumerate(row for row in rows if row["score"] >= 0.3)
    ]
    (root / "own.json").write_text(json.dumps({**truth, "annotations": own}))
    shutil.rmtree(root / "shards")
    return root


def command(root, out, format_name, *options, images="photos"):
    """Runs it as a person does: exit status, and its words."""
    words = ["data/model", "--format", format_name, "--out", str(out), "--images", str(images), *map(str, options)]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.export_model", *words],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def photos(root):
    return {image_id: (root / "photos" / f"{image_id}.jpg").read_bytes() for image_id in IMAGES}


def check_detections(root, path):
    """The file finds what the model finds."""
    stored = read_model(root / "data" / "model")
    detect = open_detector(str(root / "data" / "model"), NMS).detect
    in_use = [row.class_id for row in stored.classes]
    for image_id, here in detections_of(path, photos(root).items(), stored.config, NMS):
        (ours,) = detect([decode_picture(photos(root)[image_id], "a test", True)])
        assert not np.isin(ours.class_ids, in_use).all()  # this head says things that the table has no word for
        compared = match(of_classes(ours, in_use), here, EXACT)
        assert len(compared.found) >= 10
        assert compared.found.all()


def test_onnx(workplace, tmp_path):
    out = tmp_path / "new" / "mine.onnx"  # in a folder that is not there yet
    status, words, errors = command(workplace, out, "onnx")
    assert status == 0, errors
    assert re.fullmatch(
        rf"{re.escape(str(out))}: 7 images: all [1-9]\d\d+ detections found, IoU at least (0\.99|1\.0)\d+, "
        r"scores within \d\.\de-\d\d\n",
        words,
    )
    assert list(out.parent.iterdir()) == [out]
    assert open_exported(out).class_names == ["cat", "dog | wolf", "", "cat"]
    check_detections(workplace, out)


def test_litert_with_raw_heads(workplace, tmp_path):
    out = tmp_path / "mine.tflite"
    status, words, errors = command(workplace, out, "litert_float32", "--raw-heads")
    assert status == 0, errors
    assert words.startswith(f"{out}: 7 images: all ")
    assert list(tmp_path.iterdir()) == [out]
    outputs = open_exported(out).run(np.zeros((1, 50, 70, 3), np.uint8))
    num_anchors = 9 * sum((128 // stride) ** 2 for stride in (8, 16, 32, 64, 128))
    assert {name: array.shape for name, array in outputs.items()} == {
        "class_logits": (1, num_anchors, 4),
        "box_deltas": (1, num_anchors, 4),
    }
    check_detections(workplace, out)


INT8 = ("--calibration", "photos/10[0-3].jpg", "--annotations")


def test_int8_is_judged_by_its_ap(workplace, tmp_path):
    out = tmp_path / "mine.tflite"
    status, words, errors = command(workplace, out, "litert_int8", *INT8, "instances_val.json")
    assert status == 0, errors
    assert re.fullmatch(
        rf"{re.escape(str(out))}: AP 0\.\d{{4}} by instances_val\.json, the model's 0\.\d{{4}}\n", words
    )
    assert list(tmp_path.iterdir()) == [out]
    assert out.stat().st_size < 0.5 * (workplace / "data" / "model" / "weights.safetensors").stat().st_size
    found = open_exported(out).run(decode_picture(photos(workplace)[103], "a test", True)[None])
    assert found["count"][0] > 0


def test_int8_that_loses_too_much_is_not_written(workplace, tmp_path):
    """By what the model itself finds as truth: rounding to 8 bits is too much for random weights."""
    status, _, errors = command(workplace, tmp_path / "mine.tflite", "litert_int8", *INT8, "own.json")
    assert status == 1
    pattern = r"error: mine\.tflite: AP (0\.\d{4}) on own\.json, where the model has (0\.9\d{3}|1\.0000): more"
    found = re.match(pattern, errors.splitlines()[-1])
    assert found, errors
    assert 0 < float(found[1]) < 0.9
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


# What is refused, in this process -------------------------------------------------------------------------------------


@pytest.fixture
def run(workplace, monkeypatch):
    """run(out, format, *options, model=..., images=...): the command without a process of its own."""

    def start(out, format_name, *options, model="data/model", images="photos"):
        words = [model, "--format", format_name, "--out", str(out), "--images", str(images), *map(str, options)]
        monkeypatch.setattr(sys, "argv", ["export_model", *map(str, words)])
        export_model.main()

    monkeypatch.chdir(workplace)
    return start


@pytest.mark.parametrize(
    ("name", "format_name", "options", "words"),
    [
        ("m.tflite", "onnx", (), "expected a name that ends in '.onnx' for onnx"),
        ("m.onnx", "litert_int8", (*INT8, "own.json"), "expected a name that ends in '.tflite' for litert_int8"),
        ("m.onnx", "saved_model", (), "expected a name that ends in '' for saved_model"),
        ("here.onnx", "onnx", (), "here.onnx: is there already"),
        ("m.tflite", "litert_int8", INT8[:2], "litert_int8: needs --annotations, their images as one --images, and"),
        ("m.tflite", "litert_int8", (INT8[2], "own.json"), "litert_int8: needs --annotations, their images as one"),
        ("m", "saved_model", ("--raw-heads",), "--raw-heads: a SavedModel has no such form; take onnx or"),
        ("m.onnx", "onnx", INT8[:2], "--annotations and --calibration are for litert_int8"),
        ("m.tflite", "litert_int4", (), "invalid choice: 'litert_int4'"),
    ],
)
def test_arguments_that_do_not_fit(run, tmp_path, capsys, name, format_name, options, words):
    (tmp_path / "here.onnx").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / name, format_name, *options)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["here.onnx"]
    assert (tmp_path / "here.onnx").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "format_name", "options", "images", "words"),
    [
        ("m.onnx", "onnx", (), "nowhere", "nowhere: not found; expected an image"),
        ("m.onnx", "onnx", (), "clip.mp4", r"clip\.mp4: expected images, got a video"),
        ("m.onnx", "onnx", (), "mixed", r"mixed/broken\.jpg: cannot be decoded: "),
        (
            "m.tflite",
            "litert_int8",
            ("--calibration", "mixed", "--annotations", "own.json"),
            "photos",
            r"mixed/broken\.jpg: cannot be decoded: ",
        ),
        ("m.tflite", "litert_int8", (*INT8, "info.json"), "photos", r"info\.json: has no annotations to judge by"),
        ("m.tflite", "litert_int8", (*INT8, "own.json"), "mixed", r"mixed: '100\.jpg' is not in the folder"),
    ],
)
def test_input_that_cannot_be_used(workplace, run, tmp_path, name, format_name, options, images, words):
    (workplace / "mixed").mkdir(exist_ok=True)
    (workplace / "mixed" / "good.jpg").write_bytes(photos(workplace)[104])
    (workplace / "mixed" / "broken.jpg").write_bytes(photos(workplace)[105][:500])
    (workplace / "clip.mp4").touch()
    with pytest.raises(PipelineError, match=words):
        run(tmp_path / name, format_name, *options, images=images)
    assert list(tmp_path.iterdir()) == []


def test_export_in_place_of_a_model(workplace, run, tmp_path):
    run(tmp_path / "served", "saved_model", images="photos/10[0-2].jpg")
    assert open_exported(tmp_path / "served").category_ids.tolist() == [3, 7, -1, 9]
    check_detections(workplace, tmp_path / "served")
    with pytest.raises(PipelineError, match="served: is an export already; give the model that it was made of"):
        run(tmp_path / "m.onnx", "onnx", model=tmp_path / "served")
    assert [path.name for path in tmp_path.iterdir()] == ["served"]
