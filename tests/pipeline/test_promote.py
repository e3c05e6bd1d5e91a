"""The promote stage as it is run: a process of its own, files in and files out."""

import hashlib
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
from pipeline import gate
from pipeline.bootstrap import intervals
from pipeline.coco_metrics import coco_metrics
from tests.pipeline.judged_model import STEADY_NMS, picture, steady, write_shards, write_trained

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

EXPORTS = ("saved_model", "model.onnx", "model_float32.tflite", "model_float16.tflite", "model_int8.tflite")
BUNDLE = {
    "checksums.sha256",
    "classes.json",
    "decision.json",
    "model.json",
    "model.onnx",
    "model_card.md",
    "model_float16.tflite",
    "model_float32.tflite",
    "model_int8.tflite",
    "provenance.json",
    "saved_model/assets.extra/classes.json",
    "saved_model/saved_model.pb",
    "saved_model/variables/variables.data-00000-of-00001",  # of a table of objects; the weights are constants
    "saved_model/variables/variables.index",
    "weights.safetensors",
}
CARD = "model_card.md"
QUICK = "[saved_model]"  # for what does not look at the exports: an ONNX file takes half a minute


def stage(root, name, **environment):
    """Runs a stage in `root`: exit status, and what it wrote for a person."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    done = subprocess.run(
        [sys.executable, "-m", f"pipeline.{name}"], cwd=root, env=variables, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def set_limits(root, **limits):
    """params.yaml with these values in promote, and the NMS of a steady model."""
    head, promote = (ROOT / "params.yaml").read_text().split("promote:\n")
    (root / "params.yaml").write_text(f"{replaced(head, STEADY_NMS)}promote:\n{replaced(promote, limits)}")


def replaced(text, values):
    for key, value in values.items():
        text, count = re.subn(rf"^( +{key}:) .*$", rf"\1 {value}", text, flags=re.MULTILINE)
        assert count == 1, key
    return text


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A workplace in which all stages are done, in all formats, and the candidate was accepted; what promote said."""
    root = tmp_path_factory.mktemp("promote")
    (root / "requirements").mkdir()
    shutil.copy(ROOT / "requirements" / "ml.txt", root / "requirements")
    (root / "pyproject.toml").write_text('[project]\nname = "detectors"\nversion = "1.2.0"\n')
    (root / "champion.json").write_text("{}\n")
    set_limits(root, min_ap=0.0, max_latency_ms=100_000)
    write_shards(root / "data" / "shards", {"train": 3, "val": 10}, apply_exif=True)
    write_trained(root / "data" / "model", change=steady, apply_exif=True)
    status, words = stage(root, "evaluate")
    assert status == 0, words
    status, words = stage(root, "promote")
    assert status == 0, words
    return root, words


@pytest.fixture
def workplace(tmp_path, released):
    root = tmp_path / "work"
    shutil.copytree(released[0], root)
    return root


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decision(root):
    return json.loads((root / "data" / "release" / "decision.json").read_text())


def test_release(released):
    root, words = released
    release = root / "data" / "release"
    assert set(content(release)) == BUNDLE
    assert decision(root)["decision"] == "accepted"
    assert "candidate accepted" in words
    lines = (release / "checksums.sha256").read_text().splitlines()
    assert {line[66:] for line in lines} == BUNDLE - {"checksums.sha256"}
    for line in lines:
        assert hashlib.sha256((release / line[66:]).read_bytes()).hexdigest() == line[:64]
    for name in ("model.json", "weights.safetensors"):
        assert (release / name).read_bytes() == (root / "data" / "model" / name).read_bytes()


def test_model_card_has_the_figures(released):
    root, _ = released
    card = (root / "data" / "release" / "model_card.md").read_text()
    judged = json.loads((root / "data" / "eval" / "metrics.json").read_text())["splits"]["val"]
    found = json.loads((root / "data" / "eval" / "detections_val.json").read_text())
    low, high = intervals(
        root / "data" / "shards" / "ground_truth_val.json", found, resamples=100, seed=1, confidence=0.95
    )["AP50"]
    assert f"| AP50 | {judged['metrics']['AP50']:.3f} ({low:.3f} to {high:.3f}) |" in card
    assert f"| dog \\| wolf | {judged['per_class']['dog | wolf']:.3f} |" in card
    assert "| train | 3 |" in card
    assert "| train.learning_rate | 0.08 |" in card
    assert "init_from" not in card  # a path
    assert "2 CPUs Made Up with H200." in card
    assert "| data | none needed, the pictures are drawn |" in card
    assert "no test split" in card
    assert "**Accepted**, on val, which was also used for selection." in card
    assert "It was trained on pictures turned as their EXIF orientation says." in card


def test_provenance_has_the_hashes_of_dvc_lock(workplace):
    """dvc itself says what they are."""
    told = json.loads((workplace / "data" / "release" / "provenance.json").read_text())
    folders = ["data/shards", "data/model", "data/eval"]
    assert sorted(told["dvc_lock"]) == sorted(folders)
    for line in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "add", "-q", *folders]):
        subprocess.run(line, cwd=workplace, check=True, capture_output=True)
    for folder in folders:
        assert f"md5: {told['dvc_lock'][folder]}\n" in (workplace / f"{folder}.dvc").read_text()
    lock = (workplace / "requirements" / "ml.txt").read_bytes()
    assert told["environment"] == {"requirements/ml.txt": f"sha256:{hashlib.sha256(lock).hexdigest()}"}
    assert told["parameters"]["train"]["epochs"] == 7
    assert told["project"] == "detectors 1.2.0"
    assert "Made by detectors 1.2.0." in (workplace / "data" / "release" / CARD).read_text()


def test_model_card_says_how_each_export_compares(released):
    root, _ = released
    release = root / "data" / "release"
    card = (release / "model_card.md").read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([\d.]+ \| .*) \|$", card, re.MULTILINE))
    assert tuple(rows) == EXPORTS
    for name, row in rows.items():
        megabytes, words = row.split(" | ")
        files = [path for path in (release / name, *(release / name).rglob("*")) if path.is_file()]
        assert megabytes == f"{sum(path.stat().st_size for path in files) / 1e6:.1f}"
        if name == "model_int8.tflite":
            assert re.fullmatch(r"AP 0\.\d{4} by ground_truth_val\.json, the model's 0\.\d{4}", words)
            continue
        pattern = r"10 images: (all|\d+ of) (\d+) detections found, IoU at least ([\d.]+), scores within (\S+)"
        share, detections, overlap, difference = re.fullmatch(pattern, words).groups()
        assert int(detections) > 200  # of both sides
        half = "float16" in name
        assert half or share == "all"
        assert float(overlap) >= (0.95 if half else 0.99)
        assert float(difference) <= (0.02 if half else 1e-3)
    assert float(rows["model_float16.tflite"].split()[0]) < 0.7 * float(rows["model_float32.tflite"].split()[0])
    assert float(rows["model_int8.tflite"].split()[0]) < float(rows["model_float16.tflite"].split()[0])
    assert "ONNX opset 18;" in card


def test_code_on_the_card_runs(workplace):
    release = workplace / "data" / "release"
    (release / "picture.jpg").write_bytes(picture(np.random.default_rng(5), orientation=6)[0])
    blocks = re.findall(r"^```python\n(.*?)^```", (release / CARD).read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    code = "".join(f"{block}\nprint('COUNT', int(found['count'][0]))\n" for block in blocks)
    done = subprocess.run([sys.executable, "-c", code], cwd=release, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, third = re.findall(r"^COUNT (\d+)$", done.stdout, re.MULTILINE)
    assert int(first) > 100
    assert first == second == third


@pytest.mark.parametrize("name", EXPORTS)
def test_each_export_brings_the_classes(released, name):
    exported = open_exported(released[0] / "data" / "release" / name)
    assert exported.class_names == ["cat", "dog | wolf", "", "cat"]
    assert exported.category_ids.tolist() == [3, 7, -1, 9]
    assert exported.apply_exif


def test_no_file_tells_of_the_machine(released):
    root, _ = released
    for name, data in content(root / "data" / "release").items():
        assert str(root).encode() not in data, name
        assert str(ROOT).encode() not in data, name


def test_metrics_file(released):
    root, _ = released
    metrics = json.loads((root / "metrics.json").read_text())
    judged = json.loads((root / "data" / "eval" / "metrics.json").read_text())["splits"]["val"]
    assert metrics["val"]["AP"] == round(judged["metrics"]["AP"], 6)
    assert metrics["gate"] == {"decision": "accepted", "split": "val (also used for selection)"}
    assert metrics["weights"] == "ema, epoch 3, selected by val AP"


def test_same_inputs_give_the_same_bytes(workplace):
    before = content(workplace / "data" / "release")
    shutil.rmtree(workplace / "data" / "release")
    status, words = stage(workplace, "promote", PYTHONHASHSEED="7")
    assert status == 0, words
    assert content(workplace / "data" / "release") == before


def crown(root):
    """What pipeline.registry writes of a promoted candidate."""
    shutil.copytree(root / "data" / "release", root / "champion" / "bundle")
    found = shutil.copy(root / "data" / "eval" / "detections_val.json", root / "champion" / "detections.json")
    made = decision(root)
    sha256 = f"sha256:{hashlib.sha256(Path(found).read_bytes()).hexdigest()}"
    fields = {"version": "v0.1.0", "revision": 40 * "0", "decision": made, "detections": sha256}
    (root / "champion.json").write_text(json.dumps({**fields, "ground_truth": made["candidate"]["ground_truth"]}))


def test_promoted_candidate_keeps_its_release(workplace):
    """Whatever has become of limits, formats, parameters and the data that it was accepted on."""
    before, metrics = content(workplace / "data" / "release"), (workplace / "metrics.json").read_bytes()
    crown(workplace)
    champion = workplace / "champion.json"
    truth = decision(workplace)["candidate"]["ground_truth"]
    champion.write_text(champion.read_text().replace(truth, "sha256:other"))
    set_limits(workplace, min_ap=0.9, min_gain=0.5, formats=QUICK)
    status, words = stage(workplace, "promote")
    assert status == 0, words
    assert "the candidate is the champion" in words
    assert content(workplace / "data" / "release") == before
    assert (workplace / "metrics.json").read_bytes() == metrics


def shifted(arrays):
    """Another model: its boxes are higher."""
    arrays = steady(arrays)
    arrays["box_net/box-predict/bias"] += 0.2
    return arrays


@pytest.fixture(scope="module")
def challenged(tmp_path_factory, released):
    """The released model is the champion, and another one is the candidate, judged on the same pictures."""
    root = tmp_path_factory.mktemp("challenge") / "work"
    shutil.copytree(released[0], root)
    crown(root)
    shutil.rmtree(root / "data" / "model")
    write_trained(root / "data" / "model", change=shifted, apply_exif=True)
    set_limits(root, formats=QUICK, max_latency_ratio=100, resamples=100)
    status, words = stage(root, "evaluate")
    assert status == 0, words
    return root


def failed(made):
    return {rule["rule"]: rule["candidate"] for rule in made["rules"] if not rule["passed"]}


def test_candidate_against_the_champion(challenged):
    """On its cached detections; the interval is in the release, the time beside it."""
    status, words = stage(challenged, "promote")
    assert status == 0, words
    made = decision(challenged)
    champion = json.loads((challenged / "champion.json").read_text())["decision"]["candidate"]
    assert made["champion"] == champion
    assert made["candidate"]["detector"] != champion["detector"]
    whole = made["differences"]["metrics"]["AP"]
    assert whole["difference"] == round(made["candidate"]["metrics"]["AP"] - champion["metrics"]["AP"], 6) != 0
    assert whole["low"] < whole["difference"] < whole["high"]
    rules = [rule["rule"] for rule in made["rules"]]
    assert "the low end of the 0.95 interval of AP's difference is at least 0" in rules
    assert "the SavedModel's time is at most promote.max_latency_ratio of the champion's" in rules
    card = (challenged / "data" / "release" / CARD).read_text()
    recall = made["differences"]["metrics"]["AR100"]
    assert abs(recall["difference"]) > 0.001
    row = "".join(f" {recall[key]:+.3f} |" for key in ("difference", "low", "high"))
    assert f"| AR100 | {champion['metrics']['AR100']:.3f} |{row}" in card
    times = json.loads((challenged / "data" / "timings" / "promote.json").read_text())
    assert times["ratio"] == times["ms_an_image"] / times["champions_ms_an_image"]
    assert times["decision"] == gate._digest(made)  # as it was read from the file
    assert f"the champion's {times['champions_ms_an_image']:.3g}, ratio {times['ratio']:.3g}" in words

    before = content(challenged / "data" / "release")
    status, words = stage(challenged, "promote")
    assert status == 0, words
    assert content(challenged / "data" / "release") == before
    assert json.loads((challenged / "data" / "timings" / "promote.json").read_text()) != times


@pytest.fixture
def other_data(challenged, tmp_path):
    """The same with other ground truth: the first two images have lost their objects."""
    root = tmp_path / "work"
    shutil.copytree(challenged, root)
    path = root / "data" / "shards" / "ground_truth_val.json"
    truth = json.loads(path.read_text())
    first = [image["id"] for image in truth["images"][:2]]
    kept = [row for row in truth["annotations"] if row["image_id"] not in first]
    assert len(kept) < len(truth["annotations"])
    path.write_text(json.dumps({**truth, "annotations": kept}))
    status, words = stage(root, "evaluate")
    assert status == 0, words
    return root


def test_champion_is_judged_anew_on_other_data(other_data):
    status, words = stage(other_data, "promote")
    assert status == 0, words
    made = decision(other_data)
    assert made["decision"] != "refused"
    found = json.loads((other_data / "champion" / "detections.json").read_text())
    expected = coco_metrics(other_data / "data" / "shards" / "ground_truth_val.json", found)
    judged = json.loads((other_data / "champion.json").read_text())["decision"]["candidate"]
    assert judged["metrics"]["AP"] != expected["AP"]
    assert made["champion"]["metrics"]["AP"] == pytest.approx(expected["AP"], abs=1e-6)
    assert made["champion"]["ground_truth"] == made["candidate"]["ground_truth"] != judged["ground_truth"]


def test_champion_that_does_not_load(other_data):
    for name in ("weights.safetensors", "saved_model/saved_model.pb"):
        path = other_data / "champion" / "bundle" / name
        path.write_bytes(path.read_bytes()[:1000])
    status, words = stage(other_data, "promote")
    assert status == 0, words
    assert "Traceback" not in words
    made = decision(other_data)
    assert made["decision"] == "refused"
    why = failed(made)
    assert why.pop("the champion can be judged on this ground truth").startswith(
        "champion/bundle/weights.safetensors: is sha256:"
    )
    assert why == {"the champion's SavedModel detects in a fresh process": 0}
    assert "the champion's SavedModel does not run: champion/bundle/saved_model: not an exported model" in words


def test_champion_without_its_bundle(workplace):
    crown(workplace)
    shutil.rmtree(workplace / "champion")
    check_refused(workplace, "champion/bundle: the champion's bundle is not here; run `dvc pull champion/bundle`")


def test_rejected_candidate_is_a_result(workplace):
    set_limits(workplace, min_ap=0.9, formats=QUICK)
    status, words = stage(workplace, "promote")
    assert status == 0, words
    assert "candidate rejected" in words
    assert "FAIL  AP is at least promote.min_ap (no champion): " in words
    assert decision(workplace)["decision"] == "rejected"
    assert json.loads((workplace / "metrics.json").read_text())["gate"]["decision"] == "rejected"


def test_model_that_was_not_judged(workplace):
    write_trained_again(workplace)
    check_refused(workplace, r"data/eval/metrics\.json: judges weights sha256:")


def write_trained_again(root):
    """Other weights under the same description but for their hash."""
    shutil.rmtree(root / "data" / "model")
    write_trained(root / "data" / "model", "efficientdet-lite1", apply_exif=True)


def test_export_that_detects_something_else(workplace):
    """Detections that are not the model's: as after a fault in the export, one of both is wrong."""
    path = workplace / "data" / "eval" / "detections_val.json"
    results = json.loads(path.read_text())
    for result in results:
        result["bbox"][0] += 3
    path.write_text(json.dumps(results))
    set_limits(workplace, min_ap=0.0, formats=QUICK)
    check_refused(workplace, "saved_model: the exported model does not detect what the model did, on 10 of 10 images")


def test_int8_of_a_lower_ap(workplace):
    """The model's own AP raised, as if quantization had cost that much."""
    path = workplace / "data" / "eval" / "metrics.json"
    judged = json.loads(path.read_text())
    judged["splits"]["val"]["metrics"]["AP"] = 0.5
    path.write_text(json.dumps(judged))
    set_limits(workplace, min_ap=0.0, formats="[saved_model, litert_int8]")
    check_refused(
        workplace,
        r"model_int8\.tflite: AP 0\.\d{4} on ground_truth_val\.json, where the model has 0\.5000: more than 0\.02 low",
    )


def check_refused(workplace, pattern):
    """The stage ends with these words alone, and the former release stays."""
    before = content(workplace / "data" / "release")
    status, words = stage(workplace, "promote")
    assert status == 1
    assert re.search(rf"^error: {pattern}", words, re.MULTILINE), words
    assert "Traceback" not in words
    assert content(workplace / "data" / "release") == before
    assert not [path for path in (workplace / "data").iterdir() if path.name.endswith(".part")]
