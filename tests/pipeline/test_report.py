"""`python -m pipeline.report BASE`: real git and real DVC on a small pipeline that writes what the real one does."""

import dataclasses
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import gate, report
from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.timings import STAGES
from tests.pipeline.reviewed_pipeline import PARAMS, made, write_params
from tests.pipeline.small_pipeline import Repository

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return made(tmp_path_factory.mktemp("made") / "repository")


@pytest.fixture
def repository(made_once: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    copied = made_once.copy(tmp_path / "repository")
    monkeypatch.chdir(copied.path)
    for name in ("SERVER_URL", "REPOSITORY", "RUN_ID"):
        monkeypatch.delenv(f"GITHUB_{name}", raising=False)
    return copied


def change(repository: Repository, **changes: Any) -> None:
    write_params(repository, **changes)
    repository.run("dvc", "repro", "--quiet")
    repository.commit("change")


def reported(base: str = "main") -> tuple[str, str]:
    """Both files of the report."""
    report.main([base])
    return tuple((report.OUT / name).read_text() for name in ("report.md", "report.html"))  # type: ignore[return-value]


def words(page: str) -> str:
    """What is to be read on a page."""
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)))


def sections(text: str) -> dict[str, str]:
    """Title -> Markdown below it."""
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in text.split("\n## ")[1:]}


def test_identical(repository: Repository) -> None:
    text, page = reported()
    found = sections(text)
    assert "Nothing that a stage depends on changed." in text
    assert "No parameter changed." in found["Parameters"]
    assert "| AP | 0.4000 | 0.4000 | 0 |" in found["Metrics"]
    assert found["Stages"].count("| same as before |") == 3
    assert "The shards are the same." in found["Data"]
    assert "No file changed." in found["Code"]
    assert "No pinned package changed." in found["Environment"]
    assert "No detection with a score of at least 0.3 changed." in found["Pictures that changed most"]
    assert "WARNING" not in text
    assert "data:image" not in page


def test_parameters_only(repository: Repository) -> None:
    change(repository, evaluate__score=0.7, evaluate__ap=0.45, evaluate__per_class=[0.25, 0.65])
    write_json(STAGES / "evaluate.json", {"seconds": 12.4})
    text, page = reported()
    found = sections(text)
    assert "AP on val 0.4000 to 0.4500 \\(▲ +0.0500\\). The gate: accepted." in text
    assert "| `evaluate.ap` | `0.4` | `0.45` |" in found["Parameters"]
    assert "| `evaluate.score` | `0.5` | `0.7` |" in found["Parameters"]
    assert "picture_score" not in found["Parameters"]
    # The score rose and no other detection is of its class: whatever images are drawn, AP stays.
    assert (
        "| AP | 0.4000 | 0.4500 | ▲ +0.0500 | +0.0000 to +0.0000 |\n| AP50 | 0.7500 | 0.7500 | 0 |" in found["Metrics"]
    )
    assert "| APs | none | none |  | +0.0000 to +0.0000 |" in found["Metrics"]
    assert "Intervals: 95% of the differences in 1,000 draws" in found["Metrics"]
    winner = "| `dog` | 0.5000 | 0.6500 | ▲ +0.1500 |  |"  # without true boxes no interval
    loser = "| `cat` | 0.3000 | 0.2500 | ▼ -0.0500 | +0.0000 to +0.0000 |"
    assert f"{winner}\n{loser}" in found["Classes"]
    assert "| AP is at least promote.min\\_ap | 0.45 | 0.1 | pass |" in found["Gate"]
    made = json.loads((repository.path / "data/release/decision.json").read_text())
    measured = {"ms_an_image": 20.0, "champions_ms_an_image": 16.0, "ratio": 1.25}
    for times, told in (
        ({**measured, "decision": gate._digest(made)}, True),
        ({**measured, "decision": "other"}, False),
    ):
        write_json(Path(gate.TIMES), times)
        shown = "SavedModel, as measured for this decision: 20 ms an image, the champion's 16, ratio 1.25."
        assert (shown in sections(reported()[0])["Gate"]) is told
    assert re.search(r"`shard` \| same as before \|.*as a run produced it", found["Stages"])
    assert re.search(r"`evaluate` \| new: changed \| `parameters` \| 12 s \| as a run produced it", found["Stages"])
    assert re.search(r"`shard` .*\| unknown \|", found["Stages"])
    assert "The shards are the same." in found["Data"]
    assert "| 0.2 | 0.500 | 0.700 | 0.250 | 0.250 |" in found["Precision and recall"]
    # Image 1's detection went from 0.5 to 0.7, box and class the same: a change of 0.2. Image 2's stayed.
    assert "changed on 1 of 3 images of val" in found["Pictures that changed most"]
    assert "| `1.jpg` | 0.20 | 1 | 1 |" in found["Pictures that changed most"]
    assert page.count('src="data:image/jpeg;base64,') == 1
    assert page.count("<polyline") == 4
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)  # opens offline
    assert "Intervals" not in reported("HEAD")[0]
    for told in (
        "evaluate.score 0.5 0.7",
        "AP 0.4000 0.4500 ▲ +0.0500 +0.0000 to",
        "AP is at least promote.min_ap 0.45 0.1 pass",
    ):
        assert told in words(page)


def test_an_interval_that_is_known(repository: Repository) -> None:
    """Of two images with a cat each, both models find the one of image 1, and the candidate that of image 2, too."""
    before = [{"image_id": 1, "category_id": 1, "bbox": [2, 2, 9, 9], "score": 0.9}]
    after = [*before, {"image_id": 2, "category_id": 1, "bbox": [2, 2, 9, 9], "score": 0.8}]
    truth = json.loads((repository.path / "data/shards/ground_truth_val.json").read_text())
    manifest = {"classes": [{"class_id": 0, "category_id": 1, "name": "cat"}]}
    here = report.Side("this branch", PARAMS, {}, {}.get, {}.get)
    results = report.Results("val", before, after, truth, manifest)
    found = report._intervals(results, here)
    assert found
    low, high = found.per_class["cat"]
    # Image 2 is not drawn at all in some: 0. Only image 2 is drawn in as many: 1 - 0.
    assert (low, high) == (0.0, 1.0)
    assert found.metrics["AP"] == (0.0, 1.0)
    older = report._intervals(results, dataclasses.replace(here, params={"promote": {"min_ap": 0.1}}))
    assert older == report.Intervals({}, {}, older.words)
    assert older.words.startswith("Without intervals: params.yaml has no promote.bootstrap")


def test_data_only(repository: Repository) -> None:
    change(repository, data__images=4, data__boxes=[3, 1])
    text, page = reported()
    found = sections(text)
    assert "| val: images | 3 | 4 | +1 |" in found["Data"]
    assert "The shards changed. Other annotations: val." in found["Data"]
    assert "| val | `categories: each class has boxes` | warning | 1 |" in found["Data"]
    # Shares 1/2, 1/2 to 3/4, 1/4: (3/4 - 1/2) ln(3/2) + (1/4 - 1/2) ln(1/2) = 0.101 + 0.173 = 0.275.
    assert "| val: classes | `dog: 50.0% to 25.0%` | 0.2747 \\(above 0.2\\) |" in found["Data"]
    assert "val: judged on other ground truth than before" in found["Metrics"]
    assert "the ground truth of val is not the one before" in found["Pictures that changed most"]
    assert "`data/shards, parameters`" not in found["Stages"]
    assert "`data/shards`" in found["Stages"]
    assert "data:image" not in page


def test_new_and_lost_classes(repository: Repository) -> None:
    change(repository, data__classes=["cat", "bird"])
    found = sections(reported()[0])
    assert "New classes: bird. Gone classes: dog." in found["Data"]
    assert "| `dog` | 0.5000 | none |  |" in found["Classes"]
    assert "| `bird` | none | 0.5000 |  |" in found["Classes"]


def test_no_baseline(repository: Repository) -> None:
    text, _ = reported("before-all")
    found = sections(text)
    assert re.search("There is no baseline: before-all at [0-9a-f]{8} has no dvc.lock that can be read.", text)
    assert "has no params.yaml that can be read." in found["Parameters"]
    assert "| `evaluate.ap` | - | `0.4` |" in found["Parameters"]
    assert "data/eval/metrics.json is no output in dvc.lock." in found["Metrics"].replace("\\", "")
    assert "| AP | none | 0.4000 |  |" in found["Metrics"]
    assert "new, first entry" in found["Stages"]
    assert "accepted" in found["Gate"]


def test_data_of_the_baseline_that_is_gone(repository: Repository) -> None:
    change(repository, evaluate__ap=0.5)
    before = repository.run("git", "show", "main:dvc.lock")
    lost = re.search(r"data/eval\n\s+hash: md5\n\s+md5: (\w\w)(\w+\.dir)", before[before.index("  evaluate:") :])
    assert lost
    (repository.path / ".dvc/cache/files/md5" / lost[1] / lost[2]).unlink()
    found = sections(reported()[0])
    assert "data/eval/metrics.json is not in the cache, and there is no default remote." not in found["Metrics"]
    assert "data/eval is not in the cache, and there is no default remote." in found["Metrics"]
    assert "| AP | none | 0.5000 |  |" in found["Metrics"]


def test_data_on_the_remote_alone_is_enough_and_nothing_is_fetched(repository: Repository, tmp_path: Path) -> None:
    repository.run("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    repository.run("dvc", "push", "--quiet")
    change(repository, evaluate__score=0.7)
    repository.run("dvc", "push", "--quiet", "--run-cache")
    shutil.rmtree(repository.path / ".dvc/cache")
    shutil.rmtree(repository.path / "data")
    text, page = reported()
    assert "| 0.2 | 0.500 | 0.700 | 0.250 | 0.250 |" in text
    assert page.count('src="data:image/jpeg;base64,') == 1
    assert "WARNING" not in text
    assert not list((repository.path / ".dvc/cache").glob("files/md5/*/*"))
    assert sorted(path.name for path in (repository.path / "data").iterdir()) == ["reports"]


def test_a_damaged_file_in_the_cache_is_said(repository: Repository) -> None:
    change(repository, evaluate__ap=0.5)
    for path in (repository.path / ".dvc/cache/files/md5").glob("*/*"):
        if b"gate_split" in path.read_bytes():
            path.chmod(0o644)
            path.write_text("{}")
    assert "data/eval/metrics.json is damaged" in reported()[0].replace("\\", "")


def test_metrics_that_are_null(repository: Repository) -> None:
    change(repository, evaluate__ap=None, evaluate__per_class=[None, 0.5])
    text, _ = reported()
    assert "AP on val 0.4000 to none. The gate: rejected." in text
    assert "| AP | 0.4000 | none |  |" in text
    assert "> [!WARNING]\n> After: rejected." in text
    assert "▼ FAIL" in text
    assert "| `dog` | 0.5000 | 0.5000 | 0 |" in text
    assert "`cat`" not in text


def test_files_of_another_version_are_said(repository: Repository) -> None:
    repository.edit("make.py", '"gate_split"', '"the_gates_split"')
    repository.edit("make.py", '"rules": [rule]', '"rules": [{}]')
    change(repository)
    found = sections(reported()[0].replace("\\", ""))
    words = "A file of one side has another format than this version writes: KeyError"
    assert all(words in found[title] for title in ("Classes", "Gate", "Precision and recall"))
    assert words in found["Pictures that changed most"]
    assert "The shards are the same." in found["Data"]


def test_code_and_environment(repository: Repository) -> None:
    repository.edit("make.py", '"""Writes', '"""It writes')
    repository.edit("requirements/ml.txt", "numpy==1.0", "numpy==1.1")
    repository.edit("requirements/ml.txt", "pillow==2.0", "scipy==3.0")
    repository.run("dvc", "commit", "--force", "--quiet")
    repository.commit("code")
    text, _ = reported()
    found = sections(text)
    assert "| `evaluate` | 1 | `make.py` |" in found["Code"]
    assert "| no stage | 1 | `requirements/ml.txt` |" in found["Code"]
    assert "| `requirements/ml.txt` | `numpy` | `1.0` | `1.1` |" in found["Environment"]
    assert "| `requirements/ml.txt` | `pillow` | `2.0` | - |" in found["Environment"]
    assert "| `requirements/ml.txt` | `scipy` | - | `3.0` |" in found["Environment"]
    assert found["Stages"].count("the same bytes: accepted by dvc commit, or run again") == 3


def test_an_entry_that_no_run_produced_is_warned_of(repository: Repository) -> None:
    change(repository, evaluate__ap=0.5)
    shutil.rmtree(repository.path / ".dvc/cache/runs")
    text, page = reported()
    assert "> [!WARNING]\n> dvc.lock cannot be verified: no run-cache here" in text
    assert '<p class="warning">dvc.lock cannot be verified' in page
    repository.edit("params.yaml", '"ap": 0.5', '"ap": 0.6')
    assert "verify: evaluate: params.yaml: evaluate.ap: 0.6 here, and 0.5 in the entry." in words(reported()[1])


def test_names_of_others_do_nothing(repository: Repository) -> None:
    name = "a|b`<script>alert(1)</script>@octocat"
    change(repository, data__classes=[name, "dog"], evaluate__per_class=[0.2, 0.5])
    text, page = reported()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    row = next(line for line in sections(text)["Classes"].splitlines() if "script" in line)
    assert row == "| `a\\|b'<script>alert(1)</script>@octocat` | none | 0.2000 |  |"
    plain = next(line for line in sections(text)["Data"].splitlines() if "New classes" in line)
    assert "a\\|b\\`\\<script\\>" in plain
    assert "@octocat" not in plain


def test_a_report_that_is_too_long_is_cut(repository: Repository) -> None:
    write_params(repository, **{f"promote__key{n}": "long " * 40 for n in range(900)})
    text, page = reported()
    assert len(text) <= 65_536
    assert "more rows" in text
    assert "## Pictures that changed most" in text
    assert "promote.key899" in page


def test_the_base_is_where_the_branch_left_it(repository: Repository) -> None:
    change(repository, evaluate__ap=0.5)
    repository.run("git", "checkout", "--quiet", "main")
    change(repository, promote__min_ap=0.2)
    repository.run("git", "checkout", "--quiet", "change")
    assert "min_ap" not in sections(reported()[0])["Parameters"]


def test_the_work_tree_is_left_alone(repository: Repository) -> None:
    change(repository, evaluate__ap=0.5)
    reported()
    assert repository.run("git", "status", "--porcelain") == ""
    assert "up to date" in repository.run("dvc", "status")


def test_a_base_that_is_not_there(repository: Repository) -> None:
    with pytest.raises(PipelineError, match=r"^nowhere: no revision of this repository"):
        report.main(["nowhere"])
    with pytest.raises(PipelineError, match=r"^--help: no revision"):
        report.main(["--", "--help"])


def test_in_a_workflow_the_run_is_linked(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SERVER_URL", "https://forge.example"), ("REPOSITORY", "o/r"), ("RUN_ID", "5")):
        monkeypatch.setenv(f"GITHUB_{name}", value)
    assert "[this run](https://forge.example/o/r/actions/runs/5)" in reported()[0]


def test_neither_tensorflow_nor_work_is_needed(repository: Repository) -> None:
    script = "import sys; from pipeline import report; report.main(['main']); assert 'tensorflow' not in sys.modules"
    repository.run("python", "-c", script)
