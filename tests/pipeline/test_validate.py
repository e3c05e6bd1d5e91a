"""Validation against a data set in which everything is wrong once, and one in which nothing is."""

import base64
import contextlib
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline import params, validate
from pipeline.coco import CocoTables
from pipeline.drift import LABELS
from pipeline.duplicates import COLUMNS
from pipeline.errors import run
from pipeline.expectations import check
from pipeline.image_files import FileFacts
from pipeline.validation_tables import annotations_table
from tests.pipeline.made_data import CATEGORIES, filled, picture, write

REPORT = Path("data/reports/validation/report.json")
PAGE = Path("data/reports/validation/index.html")
EXCLUSIONS = Path("data/exclusions.json")


OWL = "<i>owl</i>"
TWIN = '"22" & <b>.jpg'  # a file's name that would be markup
# Of val alone. Its two pictures are 64 x 48 (side 55.4), each with one box of 10 x 8 (side 8.9) of category 3.
BASELINE = {
    "classes": {"3 cat": 1, "7 dog": 1},
    "box sizes": dict.fromkeys(LABELS["box sizes"], 0) | {"8-16": 7},
    "boxes an image": dict.fromkeys(LABELS["boxes an image"], 0) | {"1": 7},
    "image sizes": dict.fromkeys(LABELS["image sizes"], 0) | {"0-64": 9, "64-128": 1},
}


def with_every_fault(folder: Path) -> Path:
    train = filled(1, 17, boxes=3)  # annotations 100 to 102 lie in image 1, and so on
    for image in train.images[1:4]:
        del train.files[image["file_name"]]
    train.files["003.jpg"] = b"a page of text"
    train.files["004.jpg"] = picture(4, "GIF")
    train.images[4]["width"] = 65
    train.files["006.jpg"] = picture(6)[:-300]
    train.images[6]["file_name"] = "008.jpg"
    train.images[8]["height"] = 0
    by_id = {record["id"]: record for record in train.annotations}
    by_id[100]["image_id"] = 99
    by_id[101]["category_id"] = 5
    by_id[1000] |= {"bbox": [1, 1, 0, 5]}
    by_id[1001] |= {"bbox": [1, 1, 5, -2]}
    by_id[500] |= {"bbox": [-1.25, 0, 10, 10]}  # 1.25 px to the left
    by_id[501] |= {"bbox": [60, 0, 5, 10]}  # 1 px to the right of 64: within the tolerance
    by_id[600]["iscrowd"] = 2
    by_id[601]["area"] = 0
    by_id[602] |= {"bbox": [1, 1, 10, 10], "area": 121.5}  # 121 = (10 + 1) * (10 + 1)
    by_id[1002] |= {"bbox": [1, 1, 10, 10], "area": 121}
    by_id[500]["category_id"] = 11
    train.categories = [*CATEGORIES, {"id": 11, "name": OWL}]
    train.annotations.append({**by_id[1100], "id": 5000})
    train.files["013.jpg"] = picture(12)
    train.files["014.jpg"] = picture(22)  # val's
    train.files["015.jpg"] = picture(15, mode="CMYK")
    train.files["016.jpg"] = picture(16, orientation=3)
    train.files["017.jpg"] = picture(17, "PNG")[:-12]  # without its last chunk
    val = filled(21, 2, boxes=1)
    val.images[1]["file_name"] = TWIN
    val.files[TWIN] = val.files.pop("022.jpg")
    val.categories = [{"id": 3, "name": "lion"}, {"id": 9, "name": "lion"}]
    (folder / "data_baseline.json").write_text(json.dumps({"distributions": {"val": BASELINE}}))
    return write(folder, {"train": train, "val": val}, validate={"min_boxes_per_class": 2})


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder after validation, and what was printed as the error."""
    folder = with_every_fault(tmp_path_factory.mktemp("faulty"))
    with contextlib.chdir(folder), pytest.raises(SystemExit) as error:
        run(validate.main)
    return folder, str(error.value)


FAULTS = {  # (split, table, expectation): severity, ids
    ("train", "images", "the file is in the archive"): ("critical", [2]),
    ("train", "images", "the file's header can be read"): ("critical", [3]),
    ("train", "images", "the file is a JPEG or PNG"): ("critical", [4]),
    ("train", "images", "width and height are the file's"): ("critical", [5, 9]),
    ("train", "images", "the file can be decoded"): ("critical", [6, 17]),
    ("train", "images", "the image is there once"): ("warning", [8, 13]),  # 7 and 8 share a file, 12 and 13 the bytes
    ("train", "images", "the image is in no later split"): ("critical", [14]),
    ("train", "images", "the picture is 8-bit grey or RGB"): ("warning", [15]),
    (
        "train",
        "images",
        "the EXIF orientation is 1 (boxes of others: of the stored picture, data.apply_exif: false)",
    ): ("warning", [16]),
    ("train", "images", "height is at least 1"): ("critical", [9]),
    ("train", "annotations", "the image exists"): ("critical", [100]),
    ("train", "annotations", "the category exists"): ("critical", [101]),
    ("train", "annotations", "the box's width is above 0"): ("critical", [1000]),
    ("train", "annotations", "the box's height is above 0"): ("critical", [1001]),
    # Image 9 has no height, so its three boxes lie below it.
    ("train", "annotations", "the box is inside the image, give or take 1 px"): ("critical", [500, 900, 901, 902]),
    ("train", "annotations", "iscrowd is 0 or 1"): ("critical", [600]),
    ("train", "annotations", "area is above 0"): ("critical", [601]),
    ("train", "annotations", "area is at most that of the box with 1 px added"): ("critical", [602]),
    ("train", "annotations", "no object is annotated twice"): ("warning", [5000]),
    ("val", "categories", "the category is one of train's"): ("critical", [3, 9]),
    ("val", "categories", "names are unique"): ("warning", [3, 9]),
    ("val", "classes", "the class has at least 2 boxes"): ("warning", [9]),
    ("val", "drift", "the classes are the baseline's"): ("warning", ["classes"]),
    ("val", "drift", "the population stability index is at most 0.2"): ("warning", ["classes", "image sizes"]),
}


def test_every_fault_is_found_and_nothing_else(faulty: tuple[Path, str]) -> None:
    report = json.loads((faulty[0] / REPORT).read_text())
    found = {
        (row["split"], row["table"], row["expectation"]): (
            row["severity"],
            [record.get("id", record.get("quantity")) for record in row["first"]],
        )
        for row in report["failed"]
    }
    assert found == FAULTS
    assert all(row["count"] == len(row["first"]) for row in report["failed"])
    assert report["success"] is False
    assert sum(not row["success"] for row in report["checks"]) == len(FAULTS)


def test_offenders_are_shown_with_what_was_found(faulty: tuple[Path, str]) -> None:
    failed = json.loads((faulty[0] / REPORT).read_text())["failed"]
    first = {(row["table"], row["expectation"]): row["first"][0] for row in failed}
    sizes = first["images", "width and height are the file's"]
    assert sizes == {
        "id": 5,
        "file_name": "005.jpg",
        "size_problem": "65 x 48 in the annotations, 64 x 48 in the file",
    }
    outside = first["annotations", "the box is inside the image, give or take 1 px"]
    assert outside == {"id": 500, "image_id": 5, "category_id": 11, "pixels_outside": 1.25}
    assert first["images", "the image is there once"]["duplicate_problem"] == "image 7, 008.jpg"
    assert first["images", "the image is in no later split"]["leakage_problem"] == f"in val too: image 22, {TWIN}"
    assert first["images", "the picture is 8-bit grey or RGB"]["mode"] == "CMYK: read as RGB"
    classes = first["drift", "the classes are the baseline's"]["class_problem"]
    assert classes == "not in the baseline: 3 lion, 9 lion; in the baseline alone: 3 cat, 7 dog"
    assert first["images", "the file is a JPEG or PNG"]["format"] == "GIF"
    assert "truncated" in first["images", "the file can be decoded"]["decode_problem"]
    assert first["images", "the file's header can be read"]["header_problem"] == "cannot identify image file"
    assert first["categories", "the category is one of train's"]["train_problem"] == "in train 'cat'"


def test_critical_failure_ends_the_stage_with_ids_and_the_place_of_the_report(faulty: tuple[Path, str]) -> None:
    folder, message = faulty
    assert message.startswith("error: the data set fails 16 critical checks; see data/reports/validation/index.html\n")
    assert "train annotations: expected that the box's width is above 0: 1 fail, ids 1000" in message
    assert "names are unique" not in message  # a warning
    assert "validate.quarantine: true in params.yaml (mends 15 of 16 checks)" in message  # not val's categories
    assert not (folder / EXCLUSIONS).exists()


def test_page_names_the_offenders_and_opens_offline(faulty: tuple[Path, str]) -> None:
    page = (faulty[0] / PAGE).read_text()
    assert "Failed: 16 critical checks" in page
    assert "cannot identify image file" in page
    assert not re.search(r"https?:|<script|<link|@import|url\(|src=(?!\"data:image/jpeg;base64,)", page)
    assert str(faulty[0]) not in page  # no path of the machine that wrote it


def caption(figure: str) -> str:
    """The caption's lines; the picture has the size that the page gives it."""
    data, width, height = re.findall(r'base64,(.*?)" alt=""\s+width="(\d+)" height="(\d+)"', figure)[0]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        image.load()
        assert image.size == (int(width), int(height))
    lines = re.findall(r"<figcaption>(.*?)</figcaption>", figure, re.DOTALL)[0].split("<br>")
    return "\n".join(html.unescape(line.strip()) for line in lines)


def test_page_shows_offenders_that_can_be_decoded_and_both_of_a_pair(faulty: tuple[Path, str]) -> None:
    page = (faulty[0] / PAGE).read_text()
    shown: dict[str, list[str]] = {}
    for section in page.partition("<h2>Every check")[0].split("<h3>")[1:]:
        expectation = section.partition("</h3>")[0].partition(": ")[2]
        for figure in re.findall(r"<figure>.*?</figure>", section, re.DOTALL):
            shown.setdefault(html.unescape(expectation), []).append(caption(figure))
    assert {key: len(captions) for key, captions in shown.items() if "file" in key} == {
        "the file is a JPEG or PNG": 1,
        "the file can be decoded": 1,  # 17, in which Pillow decodes every pixel
        "width and height are the file's": 2,
    }
    assert shown["the image is there once"] == [
        "train image 8\n008.jpg",
        "train image 7\n008.jpg",
        "train image 13\n013.jpg",
        "train image 12\n012.jpg",
    ]
    assert shown["the image is in no later split"] == ["train image 14\n014.jpg", f"val image 22\n{TWIN}"]
    assert shown["the box's height is above 0"] == ["train image 10\n010.jpg\nbox 1001 (dog)"]


def test_page_shows_the_index_of_each_quantity_and_what_moved(faulty: tuple[Path, str]) -> None:
    page = (faulty[0] / PAGE).read_text()
    rows = re.findall(r"<tr>.*?</tr>", page.partition("<h2>Drift</h2>")[2].partition("<h2>")[0], re.DOTALL)
    cells = [[re.sub(r"<.*?>", "|", cell) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)] for row in rows[1:]]
    assert [(name, train) for name, train, _ in cells] == [
        (f"|{name}|", "|not in the baseline|") for name in ("classes", "box sizes", "boxes an image", "image sizes")
    ]
    # (1 - 0.9) * ln(1 / 0.9) + (0.1 - 0.0001) * ln(0.1 / 0.0001) = 0.0105 + 0.6901
    assert cells[3][2] == "|0.701||64-128: 10.0% to 0.0%||"
    assert cells[1][2] == "|0.000|"
    assert len(re.findall(r'class="warning"', "".join(rows))) == 2


def test_foreign_words_are_no_markup_on_the_page(faulty: tuple[Path, str]) -> None:
    page = (faulty[0] / PAGE).read_text()
    assert OWL not in page
    assert TWIN not in page
    assert "500 (&lt;i&gt;owl&lt;/i&gt;)" in page
    assert "&#34;22&#34; &amp; &lt;b&gt;.jpg" in page


def run_validate(folder: Path) -> dict[Path, bytes]:
    with contextlib.chdir(folder):
        validate.main()
        return {path: path.read_bytes() for path in (REPORT, PAGE, EXCLUSIONS)}


def test_valid_data_passes_with_the_same_bytes_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = filled(1, 70)  # more than one task of files
    train.add_image(500, content=picture(500, "PNG"))
    train.add_annotation(1, 500, iscrowd=1, bbox=[0, 0, 64, 48])
    train.add_image(501)  # without objects
    for number, name in ((1, "night/IMG_1.JPG"), (500, "night/far/IMG.500.PNG"), (501, "501")):
        record = next(record for record in train.images if record["id"] == number)
        train.files[name] = train.files.pop(record["file_name"])
        record["file_name"] = name
    splits = {"train": train, "val": filled(601, 5), "test": filled(701, 1)}
    results = []
    for workers in ("1", "3"):
        monkeypatch.setenv("EFFDET_LOADER_WORKERS", workers)
        results.append(run_validate(write(tmp_path / workers, splits, validate={"decode_fraction": 0.5})))
    assert results[0] == results[1]
    report = json.loads(results[0][REPORT])
    assert report["success"] is True
    assert report["failed"] == []
    nothing: dict[str, list[int]] = {"images": [], "annotations": []}
    assert json.loads(results[0][EXCLUSIONS]) == {"train": nothing, "val": nothing, "test": nothing}
    assert report["splits"]["train"] == {
        "images": 72,
        "images_without_annotations": 1,
        "annotations": 141,
        "crowds": 1,
        "most_annotations_in_an_image": 2,
        "categories": 2,
        "quarantined_images": 0,
        "quarantined_annotations": 0,
        "files_decoded": 36,
    }
    assert report["classes"] == [
        {"id": 3, "name": "cat", "boxes": {"train": 70, "val": 5, "test": 1}},
        {"id": 7, "name": "dog", "boxes": {"train": 70, "val": 5, "test": 1}},
    ]
    # Boxes are 10 x 8 and 10 x 9 (sides 8.9 and 9.5), and one of 64 x 48 (side 55.4).
    assert report["box_sizes"]["boxes"]["train"] == [0, 140, 0, 1, 0, 0, 0, 0]
    assert "0 warnings" in capsys.readouterr().out


def test_warnings_are_printed_and_do_not_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = {"train": filled(1, 1), "val": filled(2, 1, boxes=1)}
    results = run_validate(write(tmp_path, splits, validate={"min_boxes_per_class": 1}))
    assert json.loads(results[REPORT])["success"] is True
    assert "Passed, with 1 warning." in results[PAGE].decode()
    assert "No baseline is accepted, so nothing was compared." in results[PAGE].decode()
    expected = "warning: val classes: expected that the class has at least 1 boxes: 1 fail, ids 7\n"
    assert expected in capsys.readouterr().err


SETTINGS = params.Validate(
    decode_fraction=1.0,
    min_boxes_per_class=1,
    box_tolerance=1.0,
    max_psi=0.2,
    severity=params.Severities(duplicates="warning", leakage="critical", drift="warning"),
    quarantine=False,
)


def failures(tables: dict[str, pd.DataFrame]) -> dict[str, list[Any]]:
    outcomes = check({"train": tables}, SETTINGS, apply_exif=False)
    return {o.expectation: [list(record.values()) for record in o.first] for o in outcomes if not o.success}


def test_repeated_ids_and_boxes_that_are_not_finite() -> None:
    images = pd.DataFrame({"id": [1], "file_name": ["a"], "width": [64], "height": [48]})
    rows = [(7, 1, 3, 1.0, 1.0, np.inf, 2.0, 4.0, 0), (7, 1, 3, np.nan, 1.0, 2.0, 2.0, 4.0, 0)]
    columns = ["id", "image_id", "category_id", "x", "y", "w", "h", "area", "iscrowd"]
    found = CocoTables(images, pd.DataFrame(rows, columns=columns), pd.DataFrame(CATEGORIES))
    failed = failures({"annotations": annotations_table(found, SETTINGS.box_tolerance)})
    assert failed == {
        "ids are unique": [[7, 1, 3], [7, 1, 3]],
        "the box is finite": [[7, 1, 3, False], [7, 1, 3, False]],
        "the box is inside the image, give or take 1 px": [[7, 1, 3, "inf"]],
    }


def test_split_without_images_or_annotations_fails() -> None:
    empty = {
        "images": pd.DataFrame(
            columns=["id", "file_name", "width", "height", *FileFacts._fields, "size_problem", *COLUMNS]
        ),
        "annotations": annotations_table(
            CocoTables(
                pd.DataFrame(columns=["id", "file_name", "width", "height"]),
                pd.DataFrame(columns=["id", "image_id", "category_id", *"xywh", "area", "iscrowd"], dtype=float),
                pd.DataFrame(CATEGORIES),
            ),
            SETTINGS.box_tolerance,
        ),
    }
    assert failures(empty) == {"there is an image": [], "there is an annotation": []}
