"""champion.json, and the champion on the candidate's ground truth. Models that run are in test_promote.py."""

import json

import pytest

from pipeline import champion
from pipeline.bootstrap import difference
from pipeline.champion import Champion, compare, read_champion
from pipeline.class_table import Class
from pipeline.errors import PipelineError
from pipeline.files import checksum
from pipeline.gate import Decision, Judged
from pipeline.params import Bootstrap
from tests.pipeline.test_bootstrap import made

CLASSES = [Class(class_id=place, category_id=number, name=f"c{number}") for place, number in enumerate((2, 4, 7, 9))]
SETTINGS = Bootstrap(confidence=0.9, resamples=100, seed=5)


def decided(candidate, made="accepted"):
    return Decision(decision=made, candidate=candidate, champion=None, differences=None, rules=[])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The champion, the candidate and its detections: two models on the same ground truth."""
    monkeypatch.chdir(tmp_path)
    truth, theirs = made(3, shift=0.15)
    ours = made(3, shift=0.02)[1]
    truth_path = tmp_path / "data" / "shards" / "ground_truth_val.json"
    champion.DETECTIONS.parent.mkdir()
    truth_path.parent.mkdir(parents=True)
    truth_path.write_text(json.dumps(truth))
    champion.DETECTIONS.write_text(json.dumps(theirs))
    intervals = difference(truth_path, ours, theirs, resamples=100, seed=5, confidence=0.9)

    def judged(side, name):
        return Judged(
            detector=f"sha256:{side}",
            split="val",
            ground_truth=checksum(truth_path, "sha256"),
            classes=CLASSES,
            metrics={key: getattr(one, side) for key, one in intervals.metrics.items()},
            per_class={f"c{key}": getattr(one, side) for key, one in intervals.per_class.items()},
        )

    old, new = judged("champion", "val"), judged("candidate", "val")
    fields = {"version": "v0.1.0", "revision": "0" * 40, "ground_truth": old.ground_truth}
    return Champion(**fields, decision=decided(old), detections=checksum(champion.DETECTIONS, "sha256")), new, ours


def failed(rules):
    return [(rule.rule, rule.candidate, rule.required) for rule in rules if not rule.passed]


def test_cached_detections_are_used_where_nothing_changed(files):
    old, new, ours = files
    rules, incumbent = compare(old, new, ours, {}, SETTINGS)
    assert failed(rules) == []
    assert incumbent.judged == old.decision.candidate
    gain = new.metrics["AP"] - old.decision.candidate.metrics["AP"]
    whole = incumbent.differences.metrics["AP"]
    assert whole.difference == round(gain, 6) > 0
    assert 0 < whole.low < whole.difference < whole.high
    assert incumbent.differences.per_class["c2"].difference is None
    assert incumbent.differences.per_class["c9"].difference > 0


def test_other_classes_are_refused_and_named(files):
    old, new, ours = files
    wolf = [*CLASSES[:3], Class(class_id=3, category_id=9, name="wolf")]
    rules, incumbent = compare(old, new.model_copy(update={"classes": wolf}), ours, {}, SETTINGS)
    assert incumbent is None
    assert failed(rules) == [
        ("the champion's classes", "class 3 is 'wolf' (category 9)", "class 3 is 'c9' (category 9)")
    ]


@pytest.mark.parametrize("change", [lambda path: path.write_text("[]"), lambda path: path.unlink()])
def test_other_detections_than_the_champions_are_refused(files, change):
    old, new, ours = files
    change(champion.DETECTIONS)
    rules, incumbent = compare(old, new, ours, {}, SETTINGS)
    assert incumbent is None
    ((rule, why, required),) = failed(rules)
    assert (rule, required) == ("the champion can be judged on this ground truth", "it can")
    assert "dvc checkout champion/detections.json" in why


def test_a_champion_that_does_not_load_on_other_data_is_refused(files):
    old, new, ours = files
    rules, incumbent = compare(old, new.model_copy(update={"ground_truth": "sha256:new"}), ours, {}, SETTINGS)
    assert incumbent is None
    ((rule, why, required),) = failed(rules)
    assert (rule, required) == ("the champion can be judged on this ground truth", "it can")
    assert "champion/bundle/model.json: model description not found" in why


@pytest.mark.parametrize("nms", [None, {"method": "gaussian", "top": 5}])
def test_a_champion_with_post_processing_of_another_version_is_refused(files, monkeypatch, nms):
    old, new, ours = files
    monkeypatch.setattr(champion, "read_bundle", lambda _: (None, nms))
    rules, incumbent = compare(old, new.model_copy(update={"ground_truth": "sha256:new"}), ours, {}, SETTINGS)
    assert incumbent is None
    assert "champion/bundle: its post-processing is of another version of this code" in failed(rules)[0][1]


@pytest.mark.parametrize("whose", ["candidate", "champion"])
@pytest.mark.parametrize("wrong", [{"APs": 0.123}, {"APs": None}, {}])
def test_figures_that_the_detections_do_not_give_are_refused(files, whose, wrong):
    old, new, ours = files
    model = new if whose == "candidate" else old.decision.candidate
    right = model.metrics["APs"]
    kept = {name: value for name, value in model.metrics.items() if name != "APs"}
    changed = model.model_copy(update={"metrics": {**kept, **wrong}})
    if whose == "candidate":
        rules, _ = compare(old, changed, ours, {}, SETTINGS)
    else:
        rules, _ = compare(old.model_copy(update={"decision": decided(changed)}), new, ours, {}, SETTINGS)
    assert failed(rules) == [(f"the {whose}'s APs is that of the detections", wrong.get("APs"), right)]


# champion.json --------------------------------------------------------------------------------------------------------


def written(tmp_path, content):
    path = tmp_path / "champion.json"
    path.write_text(json.dumps(content))
    return path


def test_champion_file(tmp_path, files):
    assert read_champion(written(tmp_path, {})) is None
    assert read_champion(written(tmp_path, files[0].model_dump(mode="json"))) == files[0]


def test_rejected_candidate_is_no_champion(tmp_path, files):
    old = files[0].model_copy(update={"decision": decided(files[1], "rejected")})
    with pytest.raises(PipelineError, match=r"champion\.json: holds a candidate that was rejected"):
        read_champion(written(tmp_path, old.model_dump(mode="json")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decision": "perhaps"}, r"decision\.decision: .*'perhaps'"),
        ({"extra": 1}, r"decision\.extra: "),
        ({"candidate": {"detector": "sha256:a"}}, r"decision\.candidate\.split: Field required"),
    ],
)
def test_champion_file_that_cannot_be_read(tmp_path, files, change, words):
    content = files[0].model_dump(mode="json")
    path = written(tmp_path, {**content, "decision": {**content["decision"], **change}})
    with pytest.raises(PipelineError, match=words):
        read_champion(path)


def test_champion_file_without_a_version(tmp_path, files):
    with pytest.raises(PipelineError, match=r"version: Field required.* promote` writes it"):
        read_champion(written(tmp_path, files[0].decision.model_dump(mode="json")))


def test_champion_file_that_is_no_json(tmp_path):
    path = tmp_path / "champion.json"
    path.write_text("{")
    with pytest.raises(PipelineError, match="champion is not JSON"):
        read_champion(path)
