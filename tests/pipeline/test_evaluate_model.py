"""Judging any model on any COCO-format set: the evaluate stage's numbers, COCO's server file, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from effdet.boxes import PADDING
from effdet.export import Classes, export_saved_model
from effdet.postprocess import PostprocessConfig
from pipeline import evaluate, evaluate_model
from pipeline.coco import AnnotationError, ArchiveError
from pipeline.errors import PipelineError
from pipeline.evaluate_model import ImageFolder, open_images, read_set, set_name
from pipeline.model_files import read_model
from pipeline.shard_files import spread_images
from tests.pipeline.judged_model import write_shards, write_trained

ROOT = Path(__file__).parents[2]
TABLES = ("per_class", "precision_recall", "errors", "calibration", "confusion")
FILES = ("detections_val.json", "breakdown.json", *(f"{table}_val.csv" for table in TABLES))


@pytest.fixture
def annotations(tmp_path):
    """A COCO json of two images, one category, one annotation."""
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 64, "height": 48} for n in (1, 2)],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}],
        "categories": [{"id": 3, "name": "cat"}],
    }
    path = tmp_path / "instances_val.json"
    path.write_text(json.dumps(content))
    return path


def change(path, **tables):
    path.write_text(json.dumps({**json.loads(path.read_text()), **tables}))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("instances_val2017.json", "val2017"),
        ("a/image_info_test-dev2017.json", "test-dev2017"),
        ("mine.json", "mine"),
        ("instances_.json", "instances_"),
    ],
)
def test_set_name(file, name):
    assert set_name(Path(file)) == name


def test_set_with_and_without_annotations(annotations):
    tables, has_truth = read_set(annotations)
    assert (len(tables.images), len(tables.annotations), has_truth) == (2, 1, True)
    change(annotations, annotations=[])
    assert read_set(annotations)[1]  # nothing to find is not the same as no annotations
    content = json.loads(annotations.read_text())
    del content["annotations"]
    annotations.write_text(json.dumps(content))
    tables, has_truth = read_set(annotations)
    assert (len(tables.images), len(tables.annotations), has_truth) == (2, 0, False)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"images": []}, "images: empty; there is nothing to judge on"),
        (
            {"images": [{"id": 2, "file_name": "x", "width": 1, "height": 1}]},
            r"\(id 5\): image_id 1 is not in the file",
        ),
        ({"categories": [{"id": 4, "name": "x"}]}, r"\(id 5\): category_id 3 is not in the file; 1 such annotations"),
        ({"images": [{"id": 1}]}, r"images\[0\] \(id 1\): lacks key 'file_name'"),
    ],
)
def test_set_that_contradicts_itself(annotations, tables, words):
    change(annotations, **tables)
    with pytest.raises(AnnotationError, match=words):
        read_set(annotations)


@pytest.mark.parametrize("content", [b"words", b"[]", b"\xff\xfe"])
def test_set_that_is_no_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(AnnotationError, match=r"a\.json: no COCO json"):
        read_set(tmp_path / "a.json")
    with pytest.raises(AnnotationError, match=r"b\.json: not found"):
        read_set(tmp_path / "b.json")


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg"])
def test_file_name_that_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    with pytest.raises(PipelineError, match="leads out of the folder; refused"):
        ImageFolder(tmp_path / "images").read(name)


def test_missing_image_is_named_before_any_work(annotations, tmp_path):
    tables, _ = read_set(annotations)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"x")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("top/1.jpg", b"x")
    with pytest.raises(PipelineError, match=r"images: '2\.jpg' is not in the folder"):
        open_images(tmp_path / "images", tables)
    with pytest.raises(ArchiveError, match=r"images\.zip: '2\.jpg' is not in the archive"):
        open_images(tmp_path / "images.zip", tables)
    with pytest.raises(PipelineError, match=r"nowhere: images not found; expected a folder or a zip"):
        open_images(tmp_path / "nowhere", tables)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """params.yaml, data/model, data/eval as the stage writes it, and the same set as COCO json, zip and folder."""
    root = tmp_path_factory.mktemp("judge")
    shutil.copy(ROOT / "params.yaml", root)
    write_shards(root / "data" / "shards", {"val": 7}, apply_exif=True)
    write_trained(root / "data" / "model", apply_exif=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        evaluate.main()
    truth = json.loads((root / "data/shards/ground_truth_val.json").read_text())
    # in another order than the shards', with names of their own
    truth["images"] = [{**image, "file_name": f"sub/x{image['id']}.jpg"} for image in truth["images"]][::-1]
    (root / "instances_val.json").write_text(json.dumps(truth))
    info = {key: truth[key] for key in ("images", "categories")}
    (root / "image_info_test-dev2017.json").write_text(json.dumps(info))
    (root / "images" / "sub").mkdir(parents=True)
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for image_id, content in spread_images([root / "data/shards/val-00000-of-00001.tfrecord"], 7).items():
            archive.writestr(f"val/sub/x{image_id}.jpg", content)
            (root / "images" / "sub" / f"x{image_id}.jpg").write_bytes(content)
    return root


@pytest.fixture
def judge(workplace, monkeypatch):
    """Runs the command in this process: judge(model, annotations, images, out)."""

    def run(model="data/model", annotations="instances_val.json", images="images", out="out", **options):
        words = [model, "--annotations", annotations, "--images", images, "--out", out]
        words += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["evaluate_model", *map(str, words)])
        evaluate_model.main()

    monkeypatch.chdir(workplace)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("images", ["images", "images.zip"])
def test_numbers_are_the_stages_to_the_last_digit(workplace, judge, capsys, images, tmp_path):
    """Of pictures that EXIF turns: sizes that are not listed so would be an error."""
    judge(images=images, out=tmp_path / "out")
    stage = workplace / "data" / "eval"
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (stage / name).read_bytes()
    judged, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "out", stage))
    assert set(judged) == {"model", "nms", "splits", "weights"}
    assert (judged["nms"], judged["weights"]) == (expected["nms"], expected["weights"])
    ours, theirs = judged["splits"]["val"], expected["splits"]["val"]
    for key in ("images", "boxes", "metrics", "per_class", "per_class_by_size", "errors", "verified", "detections"):
        assert ours[key] == theirs[key]
    assert ours["images"] == 7
    assert ours["metrics"]["AR100"] > 0  # these weights say something
    for path in (stage / "pictures").iterdir():
        assert (tmp_path / "out" / "pictures" / path.name).read_bytes() == path.read_bytes()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Split val, of instances_val.json: 7 images" in page
    assert "Pictures are turned as their EXIF orientation says." in page
    assert page.count("data:image/jpeg;base64,") == 7
    assert capsys.readouterr().out.endswith(f"over 7 images; see {tmp_path / 'out' / 'index.html'}\n")


@pytest.mark.slow
def test_exported_model_is_judged_by_its_own_settings(workplace, judge, tmp_path):
    stored = read_model(workplace / "data" / "model")
    rows = {row.class_id: row for row in stored.classes}
    classes = Classes(
        [rows[n].category_id if n in rows else PADDING for n in range(stored.config.num_classes)],
        [rows[n].name if n in rows else "" for n in range(stored.config.num_classes)],
        apply_exif=True,
    )
    nms = PostprocessConfig(max_detections=3)
    export_saved_model(tmp_path / "served", stored.model, stored.config, nms, classes)
    judge(model=tmp_path / "served", out=tmp_path / "out")
    judged = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(judged) == {"model", "nms", "splits"}
    assert judged["nms"] == "the exported model's own"
    exported = json.loads((tmp_path / "out" / "detections_val.json").read_text())
    stage = json.loads((workplace / "data/eval/detections_val.json").read_text())
    for image_id in range(100, 107):
        ours, theirs = ([row for row in rows if row["image_id"] == image_id] for rows in (exported, stage))
        assert 1 <= len(ours) <= 3 < len(theirs)
        assert ours[0]["score"] == pytest.approx(theirs[0]["score"], abs=1e-3)
        assert ours[0]["bbox"] == pytest.approx(theirs[0]["bbox"], abs=0.1)
    assert f"3 classes, from {tmp_path / 'served'}." in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.slow
def test_file_for_the_server(workplace, judge, tmp_path):
    judge(annotations="image_info_test-dev2017.json", out=tmp_path / "out")
    stem = "detections_test-dev2017_efficientdet-lite0_results"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{stem}.json", f"{stem}.zip"]
    content = (tmp_path / "out" / f"{stem}.json").read_bytes()
    with zipfile.ZipFile(tmp_path / "out" / f"{stem}.zip") as archive:
        assert archive.namelist() == [f"{stem}.json"]
        assert archive.read(f"{stem}.json") == content
    results = json.loads(content)
    assert {tuple(sorted(row)) for row in results} == {("bbox", "category_id", "image_id", "score")}
    assert results == json.loads((workplace / "data/eval/detections_val.json").read_text())


@pytest.mark.slow
def test_as_a_person_runs_it(workplace, tmp_path):
    """In a process of its own; an image that is there and cannot be read ends it, and nothing stays."""
    shutil.copytree(workplace / "images", tmp_path / "images")
    broken = tmp_path / "images" / "sub" / "x104.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    words = ["data/model", "--annotations", "instances_val.json", "--images", tmp_path / "images", "--out"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.evaluate_model", *map(str, words), str(tmp_path / "out")],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    expected = f"error: {tmp_path / 'images'}: sub/x104.jpg: cannot be decoded: "
    assert done.stderr.splitlines()[-1].startswith(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"name": "dog | wolf"', '"name": "wolf"', r"7 is 'wolf' here, and 'dog \| wolf' in data/model"),
        ('"categories": [', '"categories": [{"id": 1, "name": "cow"}, ', "1 is 'cow' here, and absent in data/model"),
    ],
)
def test_other_categories(workplace, judge, tmp_path, old, new, words):
    text = (workplace / "instances_val.json").read_text()
    assert old in text
    (tmp_path / "a.json").write_text(text.replace(old, new))
    with pytest.raises(PipelineError, match=words):
        judge(annotations=tmp_path / "a.json", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_image_of_another_size_than_listed(workplace, judge, tmp_path):
    content = json.loads((workplace / "instances_val.json").read_text())
    image = content["images"][2]
    image["height"], image["width"] = image["width"], image["height"]  # as tools do that do not turn by EXIF
    assert image["height"] != image["width"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    size = f"{image['height']} x {image['width']}"
    words = rf"{image['file_name']}: is {size} pixels, turned by EXIF, and the annotations say"
    with pytest.raises(PipelineError, match=words):
        judge(annotations=tmp_path / "a.json", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
