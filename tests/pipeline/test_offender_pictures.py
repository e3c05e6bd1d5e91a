"""Pictures of offenders: which, how many, and where their boxes are drawn."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.coco import ImageArchive
from pipeline.duplicates import COLUMNS
from pipeline.offender_pictures import A_CHECK, IN_ALL, MARGIN, SIDE, Picture, pictures
from pipeline.raw_data import archive_file
from tests.pipeline.made_data import Split, facts, filled, write

ANNOTATIONS = ["id", "image_id", "category_id", *"xywh"]


def plain(width: int, height: int, kind: str = "JPEG", **options: Any) -> bytes:
    """A picture all black."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, kind, **options)
    return buffer.getvalue()


def shown(folder: Path, split: Split, failed: list[dict[str, Any]], apply_exif: bool = False) -> list[list[Picture]]:
    archive = write(folder, {"train": split}) / archive_file("train")
    images = pd.DataFrame(split.images)
    rows = [[r["id"], r["image_id"], r["category_id"], *map(float, r["bbox"])] for r in split.annotations]
    with ImageArchive(archive) as opened:
        table = pd.concat([images, facts(opened, images["file_name"])], axis=1).assign(**dict.fromkeys(COLUMNS))
        tables = {
            "images": table,
            "annotations": pd.DataFrame(rows, columns=ANNOTATIONS),
            "categories": pd.DataFrame(split.categories),
        }
        return pictures(failed, {"train": tables}, {"train": opened}, apply_exif)


def failure(table: str, *first: dict[str, Any], severity: str = "critical") -> dict[str, Any]:
    return {"split": "train", "table": table, "first": list(first), "severity": severity}


def pixels(picture: Picture) -> NDArray[np.int64]:
    with Image.open(io.BytesIO(picture.jpeg)) as image:
        assert image.size == (picture.width, picture.height)
        return np.asarray(image).astype(int)


def is_red(colour: NDArray[np.int64]) -> bool:
    return bool(colour[0] > 150 and colour[1:].max() < 110)


def one_box(bbox: list[float], content: bytes, **image: Any) -> tuple[Split, dict[str, Any]]:
    split = Split()
    split.add_image(1, content=content, **image)
    split.add_annotation(10, 1, bbox=bbox)
    return split, failure("annotations", {"id": 10, "image_id": 1})


def test_box_that_fails_is_red_where_it_is_and_others_are_white(tmp_path: Path) -> None:
    split, failed = one_box([10, 10, 20, 15], plain(80, 60))
    split.add_annotation(11, 1, bbox=[50, 20, 20, 20], category_id=7)
    ((picture,),) = shown(tmp_path, split, [failed])
    found = pixels(picture)
    assert found.shape == (60 * 4, 80 * 4, 3)  # SIDE is 320
    assert is_red(found[41, 80])  # y = 10 on the upper edge, x = 20 in its middle, by 4
    assert is_red(found[70, 119])  # the right edge, x = 30
    assert found[120, 200].min() > 120  # the left edge of the other, x = 50, in white
    assert found[150, 40].max() < 40
    assert picture.lines == ("train image 1", "001.jpg", "box 10 (cat)")


def test_around_a_box_outside_is_room(tmp_path: Path) -> None:
    split, failed = one_box([-5, 10, 20, 15], plain(80, 60))
    ((picture,),) = shown(tmp_path, split, [failed])
    assert (picture.width, picture.height) == (SIDE + 2 * MARGIN, 240 + 2 * MARGIN)
    found = pixels(picture)
    assert found[MARGIN // 2, MARGIN // 2].min() > 200  # the margin
    assert is_red(found[MARGIN + 70, MARGIN - 20 + 1])  # the left edge, x = -5


@pytest.mark.parametrize(
    "bbox",
    [[40, 30, 0, 0], [40, 30, -10, -10], [1e300, 1e300, 1e300, 1e300], [float("inf"), 0, 1, 1], [float("nan")] * 4],
)
def test_impossible_box_does_no_harm(tmp_path: Path, bbox: list[float]) -> None:
    split, failed = one_box([1, 1, 2, 2], plain(80, 60))
    split.annotations[0]["bbox"] = bbox
    ((picture,),) = shown(tmp_path, split, [failed])
    assert pixels(picture).shape[1] in (SIDE, SIDE + 2 * MARGIN)


def test_negative_size_is_drawn_from_corner_to_corner(tmp_path: Path) -> None:
    split, failed = one_box([40, 30, -20, -10], plain(80, 60))
    ((picture,),) = shown(tmp_path, split, [failed])
    assert is_red(pixels(picture)[81, 120])  # the upper edge at y = 20


def test_picture_is_turned_with_apply_exif_and_its_box_is_not(tmp_path: Path) -> None:
    half = Image.new("RGB", (80, 60))
    half.paste((0, 255, 0), (0, 0, 40, 60))  # green on the left; turned by 90 degrees to the right it is above
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    half.save(buffer, "JPEG", exif=exif)
    split, failed = one_box([10, 50, 30, 20], buffer.getvalue(), width=60, height=80)
    ((picture,),) = shown(tmp_path / "turned", split, [failed], apply_exif=True)
    assert (picture.width, picture.height) == (240, 320)
    found = pixels(picture)
    assert found[20, 120, 1] > 200
    assert found[300, 120, 1] < 50
    assert is_red(found[201, 100])  # y = 50, x = 25
    ((picture,),) = shown(tmp_path / "stored", split, [failed], apply_exif=False)
    assert picture.height == 240 + 2 * MARGIN  # and the box, at y = 70, is outside
    assert pixels(picture)[MARGIN + 120, MARGIN + 20, 1] > 200


def test_large_and_narrow_pictures_and_other_kinds(tmp_path: Path) -> None:
    split = Split()
    deep = io.BytesIO()
    Image.fromarray(np.full((48, 64), 300 * 128, np.uint16)).save(deep, "PNG")
    for number, content in enumerate([plain(3000, 2000), plain(2000, 1), deep.getvalue()], start=1):
        split.add_image(number, content=content)
    (found,) = shown(tmp_path, split, [failure("images", *({"id": number} for number in (1, 2, 3)))])
    assert [(picture.width, picture.height) for picture in found] == [(320, 213), (320, 1), (320, 240)]
    assert abs(pixels(found[2]) - 150).max() < 5  # 300 * 128 / 256


def test_what_cannot_be_decoded_has_no_picture_and_the_next_takes_its_place(tmp_path: Path) -> None:
    split = filled(1, 9)
    split.files["001.jpg"] = b"no picture"
    split.files["002.jpg"] = split.files["002.jpg"][:-300]
    del split.files["003.jpg"]
    (found,) = shown(tmp_path, split, [failure("images", *({"id": number} for number in range(1, 10)))])
    assert [picture.lines[0] for picture in found] == [f"train image {number}" for number in (4, 5, 6, 7)]
    assert len(found) == A_CHECK


def test_boxes_of_an_image_are_in_one_picture_and_too_many_are_not_named(tmp_path: Path) -> None:
    split = filled(1, 1, boxes=7)
    failed = failure("annotations", *({"id": 100 + k, "image_id": 1} for k in range(7)))
    ((picture,),) = shown(tmp_path, split, [failed])
    assert picture.lines[2] == "box 100 (cat), 101 (dog), 102 (cat), 103 (dog), 104 (cat), ..."


def test_there_are_at_most_so_many_and_critical_failures_have_theirs_first(tmp_path: Path) -> None:
    split = filled(1, 5, boxes=0)
    records = [{"id": number} for number in range(1, 6)]
    checks = IN_ALL // A_CHECK
    failed = [failure("images", *records, severity="warning")] + [failure("images", *records)] * checks
    found = shown(tmp_path, split, failed)
    assert [len(some) for some in found] == [0] + [A_CHECK] * checks


def test_checks_of_no_image_have_no_pictures(tmp_path: Path) -> None:
    failed = [failure("classes", {"id": 3}), failure("drift", {"quantity": "classes"}), failure("images")]
    assert shown(tmp_path, filled(1, 1), failed) == [[], [], []]
