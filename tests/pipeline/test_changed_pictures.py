"""The pictures whose detections changed most."""

import io
import zipfile
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.changed_pictures import changes, read_image, triptych
from pipeline.errors import PipelineError
from tests.pipeline.conftest import jpeg


def row(image: int, score: float, box: tuple[float, ...] = (0, 0, 10, 10), category: int = 1) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def test_the_same_detections_are_no_change() -> None:
    assert changes([row(1, 0.9), row(2, 0.8)], [row(2, 0.8), row(1, 0.9)], 0.3) == {}


def test_a_detection_that_one_side_has_counts_its_score() -> None:
    assert changes([row(1, 0.9)], [row(2, 0.4)], 0.3) == {1: 0.9, 2: 0.4}


def test_what_scores_below_the_limit_does_not_count() -> None:
    assert changes([row(1, 0.29)], [row(1, 0.3)], 0.3) == {1: 0.3}


def test_a_detection_that_both_have_counts_what_moved() -> None:
    # 8 of 10 columns: IoU 80 / 100 = 0.8; 1 - 0.8 and 0.9 - 0.7.
    assert changes([row(1, 0.9)], [row(1, 0.7, (0, 0, 8, 10))], 0.3) == {1: pytest.approx(0.4)}


def test_another_class_or_place_is_another_detection() -> None:
    assert changes([row(1, 0.9)], [row(1, 0.9, category=2)], 0.3) == {1: pytest.approx(1.8)}
    assert changes([row(1, 0.9)], [row(1, 0.9, (6, 0, 10, 10))], 0.3) == {1: pytest.approx(1.8)}  # IoU 40 / 160


def test_each_detection_has_one_partner() -> None:
    both = [row(1, 0.9), row(1, 0.6)]  # the second, of the same place, is left over
    assert changes([row(1, 0.9)], both, 0.3) == {1: pytest.approx(0.6)}


def test_boxes_without_area() -> None:
    assert changes([row(1, 0.9, (3, 3, 0, 0))], [row(1, 0.9, (3, 3, 0, 0))], 0.3) == {1: pytest.approx(1.8)}


def archive(*names: str) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        for name in names:
            written.writestr(name, name)
    return file


def test_an_image_by_its_name_and_below_one_top_folder() -> None:
    assert read_image(archive("a/1.jpg", "b/1.jpg"), "b/1.jpg") == b"b/1.jpg"
    assert read_image(archive("val/1.jpg", "__MACOSX/val/1.jpg"), "1.jpg") == b"val/1.jpg"
    with pytest.raises(PipelineError, match=r"1\.jpg is not in the zip"):
        read_image(archive("a/1.jpg", "b/1.jpg"), "1.jpg")
    with pytest.raises(PipelineError, match="cannot be read"):
        read_image(io.BytesIO(b"no zip"), "1.jpg")


def test_three_pictures_beside_each_other() -> None:
    drawn = triptych(jpeg(1, 40, 20), [row(1, 1.0)], [], [row(1, 0.5), row(1, 0.9, category=9)], {1: "cat"}, False)
    image = Image.open(io.BytesIO(drawn))
    assert image.size == (3 * 400 + 2 * 8, 200 + 22)
    panels = [np.asarray(image, int)[22:, left : left + 400] for left in (0, 408, 816)]
    assert abs(panels[0] - panels[1]).max() > 60  # the truth's box, which `before` has not
    assert abs(panels[2] - panels[1]).max() > 60
    with pytest.raises(PipelineError, match="cannot be decoded"):
        triptych(b"no image", [], [], [], {}, False)
