"""The evaluate stage: figures by hand, files, the page, and the whole stage on a small model."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline import evaluate
from pipeline.coco_metrics import SUMMARY, coco_evaluation, coco_metrics, read_truth
from pipeline.errors import PipelineError
from pipeline.judging import judge, pictures, rows_file, worst_and_best, write_results, write_table
from pipeline.matching import ImageScore
from tests.pipeline.judged_model import CLASSES, picture, write_shards, write_trained

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def truth(tmp_path):
    """Two images, two boxes of category 3, one of 7, a crowd of 7, none of 9."""
    boxes = [(1, 3, [10, 10, 20, 20], 0), (2, 3, [10, 10, 20, 20], 0), (1, 7, [50, 50, 40, 40], 0)]
    boxes.append((2, 7, [0, 0, 90, 90], 1))
    content = {
        "images": [{"id": 1, "width": 200, "height": 200}, {"id": 2, "width": 200, "height": 200}],
        "categories": [{"id": number, "name": str(number)} for number in (3, 7, 9)],
        "annotations": [
            {
                "id": place,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] ** 2,
                "iscrowd": crowd,
            }
            for place, (image, category, box, crowd) in enumerate(boxes)
        ],
    }
    path = tmp_path / "ground_truth_val.json"
    path.write_text(json.dumps(content))
    return path


NAMES = {3: "cat", 7: "dog", 9: "cow"}


def judged_by(path, results, min_score=0.5):
    """What the results are worth."""
    content = read_truth(path, results)
    return judge(content, results, NAMES, coco_evaluation(content, results), min_score)


def test_judge_by_hand(truth):
    # Category 3: one of two found, so precision 1 up to recall 0.5: 51 of 101 points. Category 7: its box found at an
    # IoU of 0.75 (40 x 30 of 40 x 40), which is six of ten thresholds. Category 9 has nothing to find.
    results = [
        {"image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], "score": 0.9},
        {"image_id": 1, "category_id": 7, "bbox": [50, 50, 40, 30], "score": 0.8},
    ]
    judged = judged_by(truth, results)
    half = 51 / 101
    rows = {row["name"]: row for row in judged.per_class}
    assert {name: row["boxes"] for name, row in rows.items()} == {"cat": 2, "dog": 1, "cow": 0}
    assert [rows["cat"][name] for name in ("AP", "AP50", "AP75")] == pytest.approx([half, half, half])
    assert [rows["dog"][name] for name in ("AP", "AP50", "AP75")] == pytest.approx([0.6, 1.0, 1.0])
    assert [rows["cow"][name] for name in ("AP", "AP50", "AP75")] == [None, None, None]
    # 20 x 20 is small, 40 x 40 is not; a size without boxes of the class has no AP
    assert [rows["cat"][name] for name in ("APs", "APm", "APl")] == [pytest.approx(half), None, None]
    assert [rows["dog"][name] for name in ("APs", "APm", "APl")] == [None, pytest.approx(0.6), None]
    assert judged.metrics["AP"] == pytest.approx((half + 0.6) / 2)
    assert judged.metrics["APl"] is None  # no box over 96 x 96
    # what training selects by is the same number
    assert judged.metrics["AP"] == coco_metrics(truth, results)["AP"]
    # Means over the two classes that have truth: both 1 up to recall 0.5, then the dog's alone.
    assert [row["recall"] for row in judged.curves] == pytest.approx(np.linspace(0, 1, 101))
    assert [row["IoU50"] for row in judged.curves] == pytest.approx([1.0] * 51 + [0.5] * 50)
    assert judged.curves[0]["IoU75"] == pytest.approx(1.0)
    assert set(judged.class_curves) == {"cat", "dog"}
    assert judged.class_curves["cat"]["IoU50"] == pytest.approx([1.0] * 51 + [0.0] * 50)
    # cat: one found, one missed; dog: found; the crowd is asked for nowhere
    assert judged.confusion.tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert [(image.image_id, image.f1) for image in judged.images] == [(2, 0.0), (1, 1.0)]


def test_judge_without_detections(truth):
    judged = judged_by(truth, [])
    assert judged.metrics["AP"] == 0.0
    assert judged.calibration.error is None
    assert {row["IoU50"] for row in judged.curves} == {0.0}


def test_judge_without_anything_to_find(truth):
    content = json.loads(truth.read_text())
    truth.write_text(json.dumps({**content, "annotations": []}))
    judged = judged_by(truth, [])
    assert set(judged.metrics.values()) == {None}
    assert {row["AP50_without"] for row in judged.errors} == {None}
    assert {row["IoU50"] for row in judged.curves} == {0.0}


def test_pictures_draw_high_scores_only():
    encoded, height, width = picture(np.random.default_rng(1))
    box = [5, 5, width - 10, height - 10]
    classes = {3: (0, "cat")}
    low = {"image_id": 1, "category_id": 3, "bbox": box, "score": 0.29}
    nothing = pictures({1: encoded}, [], [], classes, 0.3)
    assert pictures({1: encoded}, [], [low], classes, 0.3) == nothing
    assert pictures({1: encoded}, [], [{**low, "score": 0.3}], classes, 0.3) != nothing
    truth = {"image_id": 1, "category_id": 3, "bbox": box, "iscrowd": 0}
    crowd = {**truth, "iscrowd": 1}
    assert pictures({1: encoded}, [truth], [], classes, 0.3) != pictures({1: encoded}, [crowd], [], classes, 0.3)


def test_worst_and_best_share_no_image():
    images = [ImageScore(number, number, 1, 1) for number in range(5)]
    assert worst_and_best(images, 3) == (images[:2], [images[4]])
    assert worst_and_best(images, 9) == (images[:3], [images[4], images[3]])
    assert worst_and_best(images, 0) == worst_and_best([], 4) == ([], [])


def test_table_leaves_none_empty(tmp_path):
    write_table(tmp_path / "t.csv", [{"name": 'a, "b"', "AP": None}, {"name": "c", "AP": 0.5}], ["name", "AP"])
    write_table(tmp_path / "none.csv", [], ["name", "AP"])
    assert (tmp_path / "none.csv").read_text() == "name,AP\n"
    assert (tmp_path / "t.csv").read_text() == 'name,AP\n"a, ""b""",\nc,0.5\n'


def test_results_are_json_one_a_line(tmp_path):
    write_results(tmp_path / "r.json", ({"b": n, "a": [0.5]} for n in (1, 2)))
    assert (tmp_path / "r.json").read_text() == '[\n{"a": [0.5], "b": 1},\n{"a": [0.5], "b": 2}\n]\n'
    with rows_file(tmp_path / "s.json") as add:
        for n in (1, 2):
            add([{"b": n, "a": [0.5]}])
            add([])
    assert (tmp_path / "s.json").read_text() == (tmp_path / "r.json").read_text()
    write_results(tmp_path / "none.json", [])
    assert (tmp_path / "none.json").read_text() == "[\n\n]\n"


# The whole stage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with params.yaml, data/shards of val and test, data/model, and data/eval as the stage writes it."""
    root = tmp_path_factory.mktemp("evaluate")
    shutil.copy(ROOT / "params.yaml", root)
    write_shards(root / "data" / "shards", {"val": 7, "test": 5})
    write_trained(root / "data" / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        evaluate.main()
    return root


@pytest.fixture
def out(workplace):
    return workplace / "data" / "eval"


def test_every_image_is_judged_once_and_in_order(out):
    for split, ids in (("val", range(100, 107)), ("test", range(200, 205))):
        results = json.loads((out / f"detections_{split}.json").read_text())
        image_ids = [result["image_id"] for result in results]
        assert image_ids == sorted(image_ids)
        assert set(image_ids) == set(ids)  # these weights find something on every picture
        for image_id in ids:
            scores = [result["score"] for result in results if result["image_id"] == image_id]
            assert scores == sorted(scores, reverse=True)
            assert scores[0] - scores[9] > 0.01  # a model that says something
        assert {result["category_id"] for result in results} <= {row["category_id"] for row in CLASSES}


def test_metrics_are_those_of_the_files(out, workplace):
    judged = json.loads((out / "metrics.json").read_text())
    assert judged["gate_split"] == "test"
    assert judged["weights"]["kind"] == "ema"
    assert (
        judged["weights"]["sha256"]
        == json.loads((workplace / "data/model/model.json").read_text())["weights"]["sha256"]
    )
    assert {split: figures["used_for"] for split, figures in judged["splits"].items()} == {
        "val": "also used for selection",
        "test": "not used for selection",
    }
    for split, figures in judged["splits"].items():
        results = json.loads((out / f"detections_{split}.json").read_text())
        metrics = coco_metrics(workplace / "data" / "shards" / f"ground_truth_{split}.json", results)
        for name in SUMMARY:
            assert figures["metrics"][name] == (None if metrics[name] == -1 else metrics[name])
        assert figures["verified"]["against"].startswith("pycocotools 2")
        assert (figures["verified"]["of"], figures["verified"]["images"]) == ("all", figures["images"])
        assert figures["per_class"].keys() == figures["per_class_by_size"].keys()
    breakdown = json.loads((out / "breakdown.json").read_text())
    assert breakdown["test"]["AP50_without"] == judged["splits"]["test"]["errors"]
    assert all(
        value >= judged["splits"]["test"]["metrics"]["AP50"] - 1e-6
        for value in breakdown["test"]["AP50_without"].values()
    )


def test_time_stands_beside_and_in_no_output(out, workplace):
    timings = json.loads((workplace / "data" / "timings" / "evaluate.json").read_text())
    assert timings.keys() == {"val", "test"}
    for figures in timings.values():
        assert figures.keys() == {"detection", "judging", "checking"}
        assert figures["detection"]["ranks"] == 1
    assert not any("seconds" in path.read_text() for path in out.glob("*.json"))


def test_tables_for_plots(out):
    with (out / "per_class_val.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["cat (3)", "dog | wolf", "cat (9)"]
    with (out / "precision_recall_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 101
    assert set(rows[0]) == {"recall", "IoU50", "IoU75"}
    with (out / "errors_val.csv").open() as file:
        kinds = [row["error"] for row in csv.DictReader(file)]
    assert kinds == ["classification", "localisation", "both", "duplicate", "background", "missed"]
    assert (out / "confusion_val.csv").read_text().startswith("truth,found\n")
    assert (out / "calibration_val.csv").read_text().startswith("from,to,detections,score,right\n")


def test_pictures(out):
    assert sorted(path.name for path in (out / "pictures").iterdir()) == sorted(
        [f"val-{number}.jpg" for number in range(100, 107)] + [f"test-{number}.jpg" for number in range(200, 205)]
    )


class Links(HTMLParser):
    """What a page would load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset")]
        assert tag not in ("link", "iframe")


def test_page_opens_offline(out):
    text = (out / "index.html").read_text()
    links = Links()
    links.feed(text)
    assert len(links.found) == 12
    assert all(link.startswith("data:image/jpeg;base64,") for link in links.found)
    assert "dog | wolf" in text
    for heading in (
        "Classes, val",
        "Errors, test",
        "Confusions, val",
        "Scores, test",
        "Worst images, val",
        "Best images",
    ):
        assert heading in text
    assert text.count("<figure data-classes=") == 12  # each is filtered by what is in it
    assert not re.search(r"{[{%]|http", re.sub(r"base64,[^\"]*", "", text))


def test_a_second_run_writes_the_same_bytes(workplace, out, monkeypatch):
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.chdir(workplace)
    evaluate.main()
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_model_of_another_class_table(workplace, tmp_path, monkeypatch):
    shutil.copytree(workplace, tmp_path / "work")
    manifest = tmp_path / "work" / "data" / "shards" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("dog | wolf", "wolf"))
    monkeypatch.chdir(tmp_path / "work")
    before = (tmp_path / "work" / "data" / "eval" / "metrics.json").read_bytes()
    with pytest.raises(PipelineError, match=r"data/model/model\.json: .* class 1 is 'dog \| wolf' \(category 7\) here"):
        evaluate.main()
    assert (tmp_path / "work" / "data" / "eval" / "metrics.json").read_bytes() == before


def by_image(path):
    """The results in a file: image id -> rows, in their order; and the images in their order."""
    results = json.loads(path.read_text())
    images = list(dict.fromkeys(result["image_id"] for result in results))
    return images, {image_id: [row for row in results if row["image_id"] == image_id] for image_id in images}


def test_two_ranks_find_what_one_finds(workplace, tmp_path):
    """Two real Horovod processes: the same images, order and boxes, each image once."""
    shutil.copytree(workplace, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "data" / "eval")
    text = (ROOT / "params.yaml").read_text()
    head, tail = text.split("\nevaluate:\n")
    two = re.sub(r"ranks: 1 .*\n  batch_size: 16", "ranks: 2\n  batch_size: 2", tail, count=1)
    assert two != tail
    (tmp_path / "work" / "params.yaml").write_text(f"{head}\nevaluate:\n{two}")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.evaluate"],
        cwd=tmp_path / "work",
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, many = workplace / "data" / "eval", tmp_path / "work" / "data" / "eval"
    assert {path.name for path in one.rglob("*")} == {path.name for path in many.rglob("*")}
    figures, others = (json.loads((folder / "metrics.json").read_text())["splits"] for folder in (one, many))
    for split in ("val", "test"):
        (images, rows), (other_images, other_rows) = (by_image(out / f"detections_{split}.json") for out in (one, many))
        assert images == other_images
        for image_id in images:
            assert len(rows[image_id]) == len(other_rows[image_id])
            for ours, theirs in zip(rows[image_id], other_rows[image_id], strict=True):
                assert ours["category_id"] == theirs["category_id"]
                assert theirs["bbox"] == pytest.approx(ours["bbox"], abs=0.01)
                assert theirs["score"] == pytest.approx(ours["score"], abs=1e-5)
        for name in SUMMARY:
            assert others[split]["metrics"][name] == pytest.approx(figures[split]["metrics"][name], abs=1e-4)
    timings = json.loads((tmp_path / "work" / "data" / "timings" / "evaluate.json").read_text())
    assert timings["val"]["detection"]["ranks"] == 2


def test_shards_of_other_images_than_the_ground_truth(workplace, tmp_path, monkeypatch):
    shutil.copytree(workplace, tmp_path / "work")
    path = tmp_path / "work" / "data" / "shards" / "ground_truth_val.json"
    content = json.loads(path.read_text())
    content["images"].append({**content["images"][0], "id": 999})
    path.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(
        PipelineError, match=r"val: 7 images were detected on, 7 of them different, .* ground truth has 8"
    ):
        evaluate.main()


def test_arguments_are_refused():
    with pytest.raises(PipelineError, match=r"pipeline\.evaluate: takes no arguments, got --fast; params\.yaml says"):
        evaluate.main(["--fast"])
