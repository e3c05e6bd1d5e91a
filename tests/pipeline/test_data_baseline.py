"""The accepted data set: its file, the command that writes it, and that it changes nothing but the report."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import validate
from pipeline.data_baseline import accept, read_baseline
from pipeline.drift import LABELS
from pipeline.errors import PipelineError
from tests.pipeline.made_data import filled, write

ROOT = Path(__file__).parents[2]
REPORT = Path("data/reports/validation/report.json")
EXCLUSIONS = Path("data/exclusions.json")


def split_counts() -> dict[str, dict[str, int]]:
    return {"classes": {"3 cat": 2}, **{name: dict.fromkeys(labels, 1) for name, labels in LABELS.items()}}


def report(**failure: Any) -> dict[str, Any]:
    row = {"split": "val", "table": "drift", "expectation": "it is so", "severity": "critical", "quarantined": 0}
    return {"failed": [{**row, **failure}], "distributions": {"val": split_counts()}}


@pytest.mark.parametrize("content", ["{}\n", None])
def test_empty_or_no_file_is_no_baseline(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "b.json").write_text(content)
    assert read_baseline(tmp_path / "b.json") == {}


def test_file_of_the_repository_is_read() -> None:
    read_baseline(ROOT / "data_baseline.json")


def test_what_is_accepted_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(json.dumps(accept(report())))
    assert read_baseline(path) == {"val": split_counts()}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda val: val["classes"].update({"3 cat": -1}), "val.classes.3 cat: input should be greater than or equal"),
        (lambda val: val["classes"].update({"3 cat": 0.5}), "val.classes.3 cat: expected an integer, got 0.5"),
        (lambda val: val["box sizes"].update({"0-8000": 1}), "val: not the quantities and bins of this version"),
        (lambda val: val.pop("image sizes"), "val: not the quantities and bins of this version"),
        (lambda val: val.pop("classes"), "val: not the quantities and bins of this version"),
    ],
)
def test_baseline_of_anything_else_is_refused_by_name(tmp_path: Path, damage: Any, words: str) -> None:
    content = {"distributions": {"val": split_counts()}}
    damage(content["distributions"]["val"])
    path = tmp_path / "b.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PipelineError) as error:
        read_baseline(path)
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    "failure", [{"table": "drift"}, {"table": "images", "quarantined": 2}, {"severity": "warning"}]
)
def test_data_that_stops_for_drift_alone_may_be_accepted(failure: dict[str, Any]) -> None:
    assert accept(report(**failure)) == {"distributions": {"val": split_counts()}}


def test_data_that_fails_otherwise_is_no_baseline() -> None:
    with pytest.raises(
        PipelineError, match=r"fails 1 critical checks, so it is no baseline; the first: val images: it is"
    ):
        accept(report(table="images"))


def command(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.data_baseline"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_command_without_a_report_says_what_to_do(tmp_path: Path) -> None:
    done = command(tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"error: {REPORT}: report of the validate stage not found; run `dvc repro`\n"
    assert not (tmp_path / "data_baseline.json").exists()


@pytest.mark.slow
def test_neither_a_baseline_nor_its_bound_changes_what_comes_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train is accepted with a cat an image, and compared when it has two cats and a dog."""
    found = {}
    settings = {"quarantine": True, "min_boxes_per_class": 0}
    for name, boxes, changed in (("first", 1, {}), ("second", 3, {}), ("bound", 3, {"max_psi": 99.0})):
        train = filled(1, 4, boxes=boxes)
        train.annotations[0]["bbox"] = [1, 1, 0, 0]  # quarantined
        write(tmp_path, {"train": train, "val": filled(21, 2)}, validate={**settings, **changed})
        with contextlib.chdir(tmp_path):
            validate.main()
        found[name] = [(tmp_path / path).read_bytes() for path in (REPORT, EXCLUSIONS)]
        if name == "first":
            assert json.loads(found[name][0])["drift"]["baseline"] is False
            assert command(tmp_path).returncode == 0
            baseline = (tmp_path / "data_baseline.json").read_bytes()
    drift = json.loads(found["second"][0])["drift"]["splits"]["train"]
    assert {row["quantity"]: row["psi"] > 0.2 for row in drift} == {
        "classes": True,
        "box sizes": False,
        "boxes an image": True,
        "image sizes": False,
    }
    printed = capsys.readouterr().err
    assert (
        "warning: train drift: expected that the population stability index is at most 0.2: 2 fail, classes ("
        in printed
    )
    assert [row["table"] for row in json.loads(found["second"][0])["failed"]].count("drift") == 1
    assert [row["table"] for row in json.loads(found["bound"][0])["failed"]].count("drift") == 0
    with contextlib.chdir(tmp_path):
        assert command(tmp_path).returncode == 0
        assert (tmp_path / "data_baseline.json").read_bytes() != baseline
        validate.main()
    accepted = [(tmp_path / path).read_bytes() for path in (REPORT, EXCLUSIONS)]
    assert {row["psi"] for row in json.loads(accepted[0])["drift"]["splits"]["train"]} == {0}
    assert found["second"][1] == found["bound"][1] == accepted[1]
    assert len({found["second"][0], found["bound"][0], accepted[0]}) == 3
