"""`python -m pipeline.report BASE`: what this branch changed, for the reviewer of a pull request.

data/reports/review/report.md, which fits into a comment on the forge, and report.html, the same with the curves and the
pictures inside it. The branch as it lies here is held against the commit at which it left BASE. The outputs of both
come by the hashes in their dvc.lock, out of DVC's cache or from the default remote; the work tree stays as it is, and
neither a GPU nor TensorFlow is needed. What a side has not is said in the report, and is no error.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo
from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline import changed_pictures, comparison, revision
from pipeline.bootstrap import Interval, difference
from pipeline.comparison import METRICS, Intervals, Side
from pipeline.errors import PipelineError, run
from pipeline.files import read_json, written_whole
from pipeline.forge import COMMENT_LIMIT, REVIEW
from pipeline.gate import times_of
from pipeline.locked_data import LockedData, MissingError
from pipeline.params import Bootstrap
from pipeline.report_document import Block, Code, Document, Paragraph, Picture, Section, Table, html, markdown
from pipeline.timings import STAGES
from pipeline.verify import LOCK, SHOWN, Entry, Verification, read_lock, verify

OUT = Path("data/reports/review")
PARAMS = "params.yaml"
RESULTS = (str(LOCK), PARAMS, "metrics.json")  # which have sections of their own
FORMAT = (
    PipelineError,
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
)  # what other files' content raises
PICTURES = 10


def sides(repo: Repo, base: str, commit: str) -> tuple[Side, Side]:
    """The commit of the base, and what lies here."""

    def here(path: str) -> str | None:
        return Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).is_file() else None

    def there(path: str) -> str | None:
        return revision.text_at(commit, path)

    name = f"{base} at {commit[:SHOWN]}" if not re.fullmatch(r"[0-9a-f]{40}", base) else f"commit {commit[:SHOWN]}"
    return _side(repo, name, there), _side(repo, "this branch", here)


def _side(repo: Repo, name: str, text: Callable[[str], str | None]) -> Side:
    lock = _lock(text(str(LOCK)))
    return Side(name, _params(text(PARAMS)), lock, LockedData(repo, lock).json, text)


def _lock(text: str | None) -> Mapping[str, Entry]:
    try:
        return read_lock(text)
    except PipelineError:
        return {}


def _params(text: str | None) -> Mapping[str, Any] | None:
    try:
        content = YAML(typ="safe", pure=True).load(text or "")
    except (YAMLError, ValueError):
        return None
    return content if isinstance(content, Mapping) else None


def document(repo: Repo, base: str, commit: str) -> Document:
    """The report on this work tree against a commit, which stands on branch `base`."""
    before, after = sides(repo, base, commit)
    changed = [path for path in revision.changed_files(commit) if path not in RESULTS]
    pins = [path for path in changed if path.startswith("requirements/") and path.endswith(".txt")]
    verified = _verified(after.lock)
    try:
        results, why = _results(before, after)
        intervals = _intervals(results, after)
    except FORMAT as error:
        results, why, intervals = None, [_unknown(error)], None
    sections: dict[str, Callable[[], Iterable[Block]]] = {
        "Parameters": lambda: comparison.parameters(before, after),
        "Metrics": lambda: comparison.metrics(before, after, intervals),
        "Classes": lambda: comparison.classes(before, after, intervals),
        "Gate": lambda: [*comparison.gate(before, after), *_times(after)],
        "Stages": lambda: comparison.stages(before, after, verified, _seconds()),
        "Data": lambda: comparison.data(before, after),
        "Code": lambda: comparison.code(before, after, changed),
        "Environment": lambda: comparison.environment(before, after, pins),
        "Precision and recall": lambda: _curves(repo, before, after),
        "Pictures that changed most": lambda: why or _pictures(repo, after, results),
    }
    return Document(
        f"Review of this branch against {before.name}",
        _told(lambda: comparison.lead(before, after, verified)),
        [Section(title, _told(blocks)) for title, blocks in sections.items()],
    )


def _told(blocks: Callable[[], Iterable[Block]]) -> list[Block]:
    """The blocks, as far as they come: the files of a revision may be those of another version of the stages."""
    told: list[Block] = []
    try:
        told.extend(blocks())
    except FORMAT as error:
        told.append(_unknown(error))
    return told


def _unknown(error: Exception) -> Block:
    return Paragraph(f"A file of one side has another format than this version writes: {type(error).__name__} {error}.")


def _verified(lock: Mapping[str, Entry]) -> Verification:
    try:
        return verify(lock)
    except PipelineError as error:
        return Verification([], [], str(error))


def _times(after: Side) -> list[Block]:
    """What was measured for the decision, where it was here."""
    decision = after.found(comparison.DECISION)[0]
    told = times_of(decision) if decision else ""
    return [Paragraph(f"{told}.")] if told else []


def _seconds() -> dict[str, float]:
    """Stage -> how long its last run here took."""
    return {path.stem: float(read_json(path, "time of a stage")["seconds"]) for path in STAGES.glob("*.json")}


@dataclass(frozen=True)
class Results:
    """COCO results of both models on the gate's split, which was judged against the same ground truth."""

    split: str
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    truth: Mapping[str, Any]
    manifest: Mapping[str, Any]


def _results(before: Side, after: Side) -> tuple[Results | None, list[Block]]:
    """None, and why, where the detections cannot be compared."""
    old, new, blocks = comparison.found_in_both(METRICS, before, after)
    if not (old and new):
        return None, blocks
    split = str(new["gate_split"])
    if not comparison.same_truth(old["splits"].get(split), new["splits"][split]):
        return None, [Paragraph(f"Not comparable: the ground truth of {split} is not the one before.")]
    path = f"data/eval/detections_{split}.json"
    try:
        rows = [side.json(path) for side in (before, after)]
        truth, manifest = (after.json(name) for name in (f"data/shards/ground_truth_{split}.json", comparison.MANIFEST))
    except MissingError as error:
        return None, [Paragraph(f"{error}.")]
    return Results(split, rows[0], rows[1], truth, manifest), []


def _intervals(results: Results | None, after: Side) -> Intervals | None:
    """Of what the models differ by; None where they detect the same, or cannot be compared."""
    if results is None or results.before == results.after:
        return None
    try:
        bootstrap = Bootstrap.model_validate(((after.params or {}).get("promote") or {}).get("bootstrap"))
    except ValidationError:
        return Intervals({}, {}, "Without intervals: params.yaml has no promote.bootstrap that says how to draw.")
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder, "ground_truth.json")
        truth.write_text(json.dumps(results.truth))
        found = difference(truth, results.after, results.before, **bootstrap.model_dump())
    names = {row["category_id"]: row["name"] for row in results.manifest["classes"]}
    by_class = {names[number]: interval for number, interval in found.per_class.items() if number in names}
    words = (
        f"Intervals: {bootstrap.confidence:.0%} of the differences in {bootstrap.resamples:,} draws of the images, "
        "with repetition. One that holds 0: the difference may be chance."
    )
    return Intervals(_bounds(found.metrics), _bounds(by_class), words)


def _bounds(found: Mapping[str, Interval]) -> dict[str, tuple[float, float]]:
    return {name: (one.low, one.high) for name, one in found.items() if one.low is not None and one.high is not None}


def _curves(repo: Repo, before: Side, after: Side) -> list[Block]:
    old, new, blocks = comparison.found_in_both(METRICS, before, after)
    if not (old and new):
        return blocks
    split = new["gate_split"]
    path = f"data/eval/precision_recall_{split}.csv"
    tables = []
    for side in (before, after):
        try:
            tables.append(comparison.table_of(LockedData(repo, side.lock).read(path).decode()))
        except (PipelineError, UnicodeDecodeError) as error:
            return [Paragraph(f"{side.name}: {error}.")]
    return comparison.curves(split, *tables)


def _pictures(repo: Repo, after: Side, results: Results | None) -> Iterator[Block]:
    """The images whose detections changed most: a table, and pictures as far as the images can be had."""
    if results is None:
        return
    min_score = float(_at_evaluate(after, "picture_score", 0.3))
    changed = changed_pictures.changes(results.before, results.after, min_score)
    if not changed:
        yield Paragraph(f"No detection with a score of at least {min_score:g} changed.")
        return
    most = sorted(changed, key=lambda number: (-changed[number], number))[:PICTURES]
    files = {image["id"]: image.get("file_name", str(image["id"])) for image in results.truth["images"]}
    yield Paragraph(
        f"Detections with a score of at least {min_score:g} changed on {len(changed)} of {len(files)} images of "
        f"{results.split}. A detection that only one side has counts its score; one that both have, what its score "
        "moved and 1 - IoU."
    )
    shown = [_of_images(rows, most, min_score) for rows in (results.before, results.after)]
    rows = [
        (Code(files[n]), f"{changed[n]:.2f}", str(len(shown[0][n])), str(len(shown[1][n]))) for n in most if n in files
    ]
    yield Table(["image", "change", "detections before", "after"], rows)
    yield from _drawn(repo, after, results, [n for n in most if n in files], files, shown)


def _at_evaluate(side: Side, key: str, otherwise: float) -> Any:
    return ((side.params or {}).get("evaluate") or {}).get(key, otherwise)


def _of_images(
    rows: Sequence[Mapping[str, Any]], images: Sequence[int], min_score: float
) -> dict[int, list[Mapping[str, Any]]]:
    """Image id -> its detections that count, the best first."""
    found: dict[int, list[Mapping[str, Any]]] = {number: [] for number in images}
    for row in rows:
        if row["image_id"] in found and row.get("score", 1.0) >= min_score:
            found[row["image_id"]].append(row)
    return {number: sorted(some, key=lambda row: -row.get("score", 1.0)) for number, some in found.items()}


def _drawn(
    repo: Repo,
    after: Side,
    results: Results,
    images: Sequence[int],
    files: Mapping[int, str],
    shown: Sequence[Mapping[int, list[Mapping[str, Any]]]],
) -> Iterator[Block]:
    boxes = _of_images(results.truth["annotations"], images, 0.0)
    names = {row["category_id"]: row["name"] for row in results.manifest["classes"]}
    try:
        for number in images:
            with LockedData(repo, after.lock).open(f"data/raw/{results.split}.zip") as archive:
                encoded = changed_pictures.read_image(archive, files[number])
            sides = (boxes[number], shown[0][number], shown[1][number])
            jpeg = changed_pictures.triptych(encoded, *sides, names, results.manifest["apply_exif"])
            yield Picture(jpeg, (Code(files[number]),))
    except PipelineError as error:
        yield Paragraph(f"The images cannot be drawn: {error}.")


def _more() -> str:
    """Where the whole report is, as Markdown; in a workflow, its page."""
    server, repository, number = (os.environ.get(f"GITHUB_{name}") for name in ("SERVER_URL", "REPOSITORY", "RUN_ID"))
    if server and repository and number:
        page = f"{server}/{repository}/actions/runs/{number}"
        return f"Curves and pictures: `report.html` in the artifact `review` of [this run]({page})."
    return "Curves and pictures: `report.html`, which `make report` writes beside this file."


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description="what this branch changed")
    parser.add_argument("base", help="branch, tag or commit that the branch is to be merged into")
    base = parser.parse_args(arguments).base
    commit = revision.commit_of(base)
    commit = revision.merge_base(commit, "HEAD") or commit
    try:
        with Repo() as repo:
            found = document(repo, base, commit)
    except DvcException as error:
        raise PipelineError(f"DVC cannot open this repository: {error}") from None
    limit = COMMENT_LIMIT - len(REVIEW) - 1
    for name, text in (("report.md", markdown(found, limit, _more())), ("report.html", html(found))):
        with written_whole(OUT / name) as part:
            part.write_text(text, encoding="utf-8")
        print(OUT / name)


if __name__ == "__main__":
    run(main)
